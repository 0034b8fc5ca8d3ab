"""An adapter beside the weights on GPUs gives what its merged weights give there."""

import os

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.engine.gpu import gpu_memories
from jlayer.plan import making as plans
from tests.adapters import write_adapter
from tests.conftest import BUNDLED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_memories(), reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(
        os.environ["JAX_PLATFORMS"] == "cpu",
        reason="JAX is held to the CPU here: run this file by itself with JAX_PLATFORMS=cuda",
    ),
]
IDS = np.random.default_rng(0).integers(0, 4096, (1, 40)).tolist()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", BUNDLED)


def given(folder, **options):
    """The tokens that follow IDS, and the logits of IDS."""
    with AutoModel.from_pretrained(folder, device="gpu", dtype="float32", **options) as model:
        return model.generate(IDS, max_new_tokens=24, do_sample=False), model.logits(IDS)


@pytest.mark.parametrize("tile_bytes", [100_000, 20_000])
@pytest.mark.parametrize("share", [0, 0.5])
def test_as_merged_weights(tmp_path, monkeypatch, adapter, tile_bytes, share):
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    convert_checkpoint(BUNDLED, tmp_path / "model", dtype="float32")
    export_checkpoint(tmp_path / "model", tmp_path / "plain", format="huggingface")
    convert_checkpoint(tmp_path / "plain", tmp_path / "merged", merge=adapter)
    tokens, logits = given(tmp_path / "merged", host_share=0)
    plain, _ = given(tmp_path / "model", host_share=0)
    assert not np.array_equal(plain, tokens)  # the adapter says something
    for n in range(1, min(2, len(gpu_memories())) + 1):
        own, found = given(tmp_path / "model", host_share=share, devices=n, adapter=adapter)
        np.testing.assert_array_equal(own, tokens)
        np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_beside_quantized_weights(tmp_path, adapter, scheme):
    convert_checkpoint(BUNDLED, tmp_path / "model", quantize=scheme)
    tokens, logits = given(tmp_path / "model", host_share=1, adapter=adapter)
    for n in range(1, min(2, len(gpu_memories())) + 1):
        own, found = given(tmp_path / "model", host_share=0, devices=n, adapter=adapter)
        np.testing.assert_array_equal(own, tokens)
        np.testing.assert_allclose(found, logits, rtol=0, atol=3e-5 * np.abs(logits).max())
