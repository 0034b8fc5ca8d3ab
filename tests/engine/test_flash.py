"""The engine compiles its programs for flash attention where the device has it."""

import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jlayer import AutoModel
from jlayer.engine import compiles, programs
from jlayer.plan import making as plans
from tests.campaigns import slow_but
from tests.model.test_attention import stand_in

pytestmark = pytest.mark.usefixtures("all_shapes")


@pytest.mark.parametrize("tile_bytes", slow_but([None, 30_000], (30_000,)), ids=["whole", "tiles"])
def test_a_prompt_of_two_chunks(tiny, monkeypatch, tile_bytes):
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    ids = np.random.default_rng(0).integers(0, 100, (1, 300))  # chunks of 256 and 64 rows
    calls = []

    def counted(*given, **more):
        calls.append(given)
        return stand_in(*given, **more)

    found = []
    for has in (False, True):
        monkeypatch.setattr(compiles, "all_programs", {})  # one device has it or has it not
        monkeypatch.setattr(programs, "has_flash", lambda *_, has=has, **__: has)
        monkeypatch.setattr(cudnn, "dot_product_attention", counted)
        with AutoModel.from_pretrained(tiny, device="cpu", dtype="float32") as model:
            found.append(model.logits(ids))
        assert bool(calls) is has
    plain, flash = found
    np.testing.assert_allclose(flash, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
