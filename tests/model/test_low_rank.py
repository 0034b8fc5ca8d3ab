"""What adapters add, and the lengths that they give rows, against numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlayer.additions import Addition, Columns
from jlayer.cores.decode import decoded
from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.encodings.registry import ENCODINGS
from jlayer.model.low_rank import low_rank_product, row_factors
from jlayer.model.products import Encoded
from tests.encoded import random_pieces

WIDTH, RANK, SCALE = 80, 3, 1.7


def chosen(*args, cpu, default, on_gpu):
    return (default if on_gpu else cpu)(*args)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8_g128_float16", "fp8_128x128"])
@pytest.mark.parametrize("rows", [8, 16, 21])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rows_have_their_lengths_whatever_a_block_holds(form, rows, platform, monkeypatch):
    """A block of 8 rows: one, two, and a last one that overlaps the one before. What a GPU would
    run is run here."""
    monkeypatch.setitem(BLOCK_BYTES, platform, 8 * 4 * WIDTH)
    monkeypatch.setattr(jax.lax, "platform_dependent", partial(chosen, on_gpu=platform == "gpu"))
    if ENCODINGS[form].is_plain:
        weight = drawn(rows, WIDTH).astype(getattr(ml_dtypes, form, form))
        exact, held = weight.astype(np.float64), jnp.asarray(weight)
    else:
        pieces = random_pieces(form, rows, WIDTH)
        exact = decoded(form, pieces, WIDTH).astype(np.float64)
        held = Encoded({name: jnp.asarray(a) for name, a in pieces.items()}, form, 1 << 20)
    a, b, lengths = drawn(RANK, WIDTH, seed=1), drawn(rows, RANK, seed=2), drawn(rows, seed=3)
    added = Addition((Columns(RANK, SCALE),), has_lengths=True)
    found = jax.jit(partial(row_factors, added=added))(held, a, b, lengths)
    expected = lengths / np.linalg.norm(exact + SCALE * b.astype(np.float64) @ a, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_each_row_gets_what_its_own_adapter_adds():
    """Numbers of adapters may be any, in any order; what has none, or another, gets zeros."""
    ranks, scales, numbers = (2, 1, 4), (0.5, 3.0, -1.0), (4, 0, 7)
    a, b = drawn(sum(ranks), 6), drawn(5, sum(ranks), seed=1)
    x, adapters = drawn(6, 6, seed=2), np.array([7, -1, 0, 4, 7, 3], np.int32)
    columns = tuple(Columns(*each) for each in zip(ranks, scales, numbers, strict=True))
    found = jax.jit(partial(low_rank_product, added=Addition(columns)))(x, a, b, adapters=adapters)
    ends = np.cumsum((0, *ranks))
    for row, number in enumerate(adapters):
        expected = np.zeros(5)
        if number in numbers:
            at = numbers.index(number)
            own = slice(ends[at], ends[at + 1])
            expected = scales[at] * (b[:, own].astype(np.float64) @ (a[own] @ x[row]))
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)
