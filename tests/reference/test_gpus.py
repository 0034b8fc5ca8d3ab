"""Two GPUs give what one gives: the same tokens in float32, however tiles cross to them."""

import os

import jax
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.engine.gpu import gpu_memories
from jlayer.plan import making as plans
from jlayer.streaming.devices import MESH_AXES, ROWS
from tests.conftest import BUNDLED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(gpu_memories()) < 2, reason="no two NVIDIA GPUs on this machine"),
    pytest.mark.skipif(
        os.environ["JAX_PLATFORMS"] == "cpu",
        reason="JAX is held to the CPU here: run this file by itself with JAX_PLATFORMS=cuda",
    ),
]
IDS = np.random.default_rng(0).integers(0, 4096, (1, 40)).tolist()


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """Of a model, which starts JAX within its promise."""
    folder = tmp_path_factory.mktemp("two") / "model"
    convert_checkpoint(BUNDLED, folder)
    with AutoModel.from_pretrained(folder, device="gpu", devices=2) as model:
        yield model.engine.devices


def test_what_they_exchange_is_what_xla_exchanges(devices):
    assert devices.by_copies
    for shape in ((2, 4), (512, 14336)):
        put = jax.device_put(np.random.default_rng(0).random(shape, np.float32), devices.over(ROWS))

        def each(gather, x):
            for step in range(3):  # each needs what the one before gave
                x = gather(x * (step + 2)).sum(0) / 7 - x
            return gather(x)

        found, expected = (
            np.asarray(jax.jit(devices.on_each(function, (put,), devices.everywhere))(put))
            for function in (
                lambda x: each(devices.all_gather, x),
                lambda x: each(lambda x: jax.lax.all_gather(x, MESH_AXES[ROWS]), x),
            )
        )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("tile_bytes", [100_000, 20_000])
def test_a_model(tmp_path, monkeypatch, scheme, tile_bytes):
    convert_checkpoint(BUNDLED, tmp_path / "model", quantize=scheme)
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    found = []
    for n in (1, 2):
        how = {"device": "gpu", "dtype": "float32", "devices": n, "host_share": 0}
        with AutoModel.from_pretrained(tmp_path / "model", **how) as model:
            assert model.engine.devices.by_copies == (n == 2)
            tokens = model.generate(IDS, max_new_tokens=48, do_sample=False)
            found.append((tokens, model.logits(IDS)))
    (tokens, logits), (own, of_two) = found
    assert np.array_equal(own, tokens)
    np.testing.assert_allclose(of_two, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
