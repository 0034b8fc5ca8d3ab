"""A product with weights of any encoding is that of the decoded weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer.cores.decode import decoded
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.registry import ENCODINGS
from jlayer.model.products import Encoded, InBlob, embedded, product
from tests.encoded import random_pieces

ROWS = 21
FORMS = (
    *BLOCKS,
    *("nf4", "packed4_g32_bfloat16", "packed8_row_float16", "uint4_g64_float32_bytes"),
    *("int8_g128_float16", "int8_scb", "nvfp4", "fp8_128x128", "fp8_tensor_bfloat16"),
)


def width_of(form):
    """Three units of blocks; for others a width whose last group is short."""
    return 3 * ENCODINGS[form].width_unit if form in BLOCKS else 80


def chosen(*args, cpu, default, on_gpu):
    return (default if on_gpu else cpu)(*args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_product_is_that_of_the_decoded_weights(form, on_gpu, monkeypatch):
    """In blocks that overlap, from pieces in one array of bytes. What a GPU would run is run
    here."""
    monkeypatch.setattr(jax.lax, "platform_dependent", partial(chosen, on_gpu=on_gpu))
    width = width_of(form)
    pieces = random_pieces(form, ROWS, width)
    exact = decoded(form, pieces, width)
    raw = [np.full(5, 7, np.uint8), *(a.reshape(-1).view(np.uint8) for a in pieces.values())]
    offsets = np.cumsum([a.size for a in raw[:-1]])
    blob = jnp.asarray(np.concatenate(raw))
    held = {
        name: InBlob(blob, int(at), piece.shape, piece.dtype.name)
        for at, (name, piece) in zip(offsets, pieces.items(), strict=True)
    }
    weight = Encoded(held, encoding=form, block_bytes=8 * 4 * width)
    x = np.random.default_rng(1).standard_normal((3, width)).astype(np.float32)
    found = jax.jit(lambda x, weight: product(x, weight))(jnp.asarray(x), weight)
    assert found.dtype == jnp.float32
    assert (np.abs(found - x @ exact.T) <= 1e-6 * (np.abs(x) @ np.abs(exact.T))).all()


@pytest.mark.parametrize("form", ["q4_k", "q8_0", "nf4", "int8_scb"])
def test_rows_of_an_embedding_are_decoded(form):
    width = width_of(form)
    pieces = random_pieces(form, ROWS, width)
    table = Encoded({name: jnp.asarray(a) for name, a in pieces.items()}, form, 1 << 20)
    found = embedded(table, jnp.array([4, 0, 20]), width=width, dtype=jnp.float32)
    np.testing.assert_array_equal(found, decoded(form, pieces, width)[[4, 0, 20]])
