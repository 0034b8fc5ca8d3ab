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


MOST = min(2, len(gpu_memories()))  # GPUs


@pytest.fixture(scope="module", autouse=True)
def all_of_them():
    """JAX has the GPUs of the first model that is opened, for good."""
    with AutoModel.from_pretrained(BUNDLED, device="gpu", devices=MOST):
        yield


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
    for n in range(1, MOST + 1):
        own, found = given(tmp_path / "model", host_share=share, devices=n, adapter=adapter)
        np.testing.assert_array_equal(own, tokens)
        np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_beside_quantized_weights(tmp_path, adapter, scheme):
    convert_checkpoint(BUNDLED, tmp_path / "model", quantize=scheme)
    tokens, logits = given(tmp_path / "model", host_share=1, adapter=adapter)
    for n in range(1, MOST + 1):
        own, found = given(tmp_path / "model", host_share=0, devices=n, adapter=adapter)
        np.testing.assert_array_equal(own, tokens)
        np.testing.assert_allclose(found, logits, rtol=0, atol=3e-5 * np.abs(logits).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tile_bytes", [None, 20_000])
def test_lengths_of_rows_as_merged(tmp_path, monkeypatch, tile_bytes, dtype):
    """Also where tiles are parts of a longer array, and of 16 bits."""
    if tile_bytes:
        monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    own = write_adapter(tmp_path / "adapter", BUNDLED, has_lengths=True)
    convert_checkpoint(BUNDLED, tmp_path / "model", dtype=dtype)
    export_checkpoint(tmp_path / "model", tmp_path / "wide", format="huggingface")
    convert_checkpoint(tmp_path / "wide", tmp_path / "plain", dtype="float32")
    export_checkpoint(tmp_path / "plain", tmp_path / "source", format="huggingface")
    convert_checkpoint(tmp_path / "source", tmp_path / "merged", merge=own)
    tokens, logits = given(tmp_path / "merged", host_share=0)
    for n in range(1, MOST + 1):
        found = given(tmp_path / "model", host_share=0, devices=n, adapter=own)
        np.testing.assert_array_equal(found[0], tokens)
        np.testing.assert_allclose(found[1], logits, rtol=0, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize("share", [0, 0.5])
def test_several_share_their_passes(tmp_path, monkeypatch, adapter, share):
    monkeypatch.setattr(plans, "TILE_BYTES", (20_000,))
    other = write_adapter(tmp_path / "other", BUNDLED, rank=5, targets=("q_proj", "up_proj"))
    folders = {"one": adapter, "other": other}
    alone = {name: given(BUNDLED, adapter=each) for name, each in folders.items()}
    alone[None] = given(BUNDLED)
    how = {"device": "gpu", "dtype": "float32", "host_share": share}
    with AutoModel.from_pretrained(BUNDLED, adapters=folders, **how) as model:
        asked = {
            name: model.submit(IDS[0], adapter=name, max_new_tokens=24, temperature=0)
            for name in alone
        }
        for name, (tokens, logits) in alone.items():
            assert IDS[0] + asked[name].result().token_ids == tokens[0]
            found = model.logits(IDS, adapter=name)
            np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5 * np.abs(logits).max())
