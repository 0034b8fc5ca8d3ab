"""A product with weights of any encoding is that of the decoded weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlayer.cores.decode import decoded
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.registry import ENCODINGS
from jlayer.model.products import Encoded, InBlob, embedded, product

ROWS = 21
FORMS = (
    *BLOCKS,
    *("nf4", "packed4_g32_bfloat16", "packed8_row_float16", "uint4_g64_float32_bytes"),
    *("int8_g128_float16", "int8_scb"),
)


def width_of(form):
    """Three units of blocks; for others a width whose last group is short."""
    return 3 * ENCODINGS[form].width_unit if form in BLOCKS else 80


def pieces_of(form, *, seed=0):
    """Random codes; every number of more than a byte is moderate."""
    rng, found, row = np.random.default_rng(seed), {}, ENCODINGS[form]
    for name, (dtype, shape) in row.pieces((ROWS, width_of(form))).items():
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if kind.itemsize == 1:
            found[name] = rng.integers(0, 256, shape, dtype=np.uint8).view(kind)
        else:
            found[name] = rng.uniform(0.5, 2, shape).astype(kind)
    if form in BLOCKS:
        blocks = found["q"].reshape(-1, row.n_block_bytes)
        for at, dtype in row.numbers:
            numbers = rng.integers(120, 130, len(blocks)).astype(np.uint8)
            if dtype == "float16":
                numbers = rng.uniform(0.5, 2, len(blocks)).astype("<f2")
            raw = numbers.view(np.uint8).reshape(len(blocks), -1)
            blocks[:, at : at + raw.shape[1]] = raw
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_the_decoded_weights(form):
    """In blocks that overlap, from pieces in one array of bytes."""
    pieces, width = pieces_of(form), width_of(form)
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
    found = jax.jit(product)(jnp.asarray(x), weight)
    assert found.dtype == jnp.float32
    assert (np.abs(found - x @ exact.T) <= 1e-6 * (np.abs(x) @ np.abs(exact.T))).all()


@pytest.mark.parametrize("form", ["q4_k", "q8_0", "nf4", "int8_scb"])
def test_rows_of_an_embedding_are_decoded(form):
    pieces, width = pieces_of(form), width_of(form)
    table = Encoded({name: jnp.asarray(a) for name, a in pieces.items()}, form, 1 << 20)
    found = embedded(table, jnp.array([4, 0, 20]), width=width, dtype=jnp.float32)
    np.testing.assert_array_equal(found, decoded(form, pieces, width)[[4, 0, 20]])
