"""FP8: every code is what its bits say, and products decode before they multiply, in blocks of rows
that begin anywhere in the grid."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jlayer.cores import decode
from jlayer.encodings.fp8 import FP8
from jlayer.model.products import Encoded, dequantize, product

ROWS, WIDTH = 300, 140  # the last blocks of the grid have 44 rows and 12 inputs


def pieces_of(form, rows=ROWS, width=WIDTH):
    """All codes but NaN, and scales of either sign."""
    rng, row = np.random.default_rng(0), FP8[form]
    (_, shape), (dtype, scales) = row.pieces((rows, width)).values()
    codes = rng.integers(0, 254, shape).astype(np.uint8)
    codes += codes >= 127  # without 127 and 255, which stand for no number
    numbers = rng.standard_normal(scales).astype(getattr(ml_dtypes, dtype, dtype))
    return {"q": codes.view(ml_dtypes.float8_e4m3fn), "scale": numbers}


def value(code):
    """One number of e4m3: 4 bits of exponent with a bias of 7, 3 of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else mantissa * 2.0**-9
    return -size if sign else size


@pytest.mark.parametrize("form", FP8)
def test_every_weight_is_its_code_times_its_scale(form):
    pieces, row = pieces_of(form), FP8[form]
    codes = np.vectorize(value)(pieces["q"].view(np.uint8)).astype(np.float32)
    scales = pieces["scale"].astype(np.float32)
    if scales.ndim == 2:
        high, wide = row.rows, row.group or WIDTH
        scales = np.repeat(np.repeat(scales, high, axis=0), wide, axis=1)[:ROWS, :WIDTH]
    weight = Encoded(pieces, encoding=form, block_bytes=1 << 20)
    found = jax.jit(dequantize, static_argnums=1)(weight, WIDTH)
    np.testing.assert_array_equal(found, codes * scales)
    some = decode.decoded(form, decode.some_rows(form, pieces, 97, 61), WIDTH)
    np.testing.assert_array_equal(some, (codes * scales)[97 : 97 + 61])


@pytest.mark.parametrize("form", ["fp8_128x128", "fp8_row_bfloat16", "fp8_tensor"])
@pytest.mark.parametrize("n_columns", [1, 20])
def test_a_product_in_blocks_of_rows_is_that_of_the_decoded_matrix(form, n_columns):
    """Blocks of 40 rows: they begin in the middle of the grid's, and the last overlaps."""
    pieces = pieces_of(form)
    x = np.random.default_rng(1).standard_normal((n_columns, WIDTH)).astype(np.float32)
    weight = Encoded(pieces, encoding=form, block_bytes=40 * WIDTH * 4)
    whole = decode.decoded(form, decode.some_rows(form, pieces, 0, ROWS), WIDTH)
    expected = x.astype(np.float64) @ whole.T.astype(np.float64)
    found = jax.jit(product)(x, weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    by_numpy = decode.product(x, form, pieces, WIDTH)
    np.testing.assert_allclose(by_numpy, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_code_that_is_no_number_stays_none():
    """In place nothing looks for it: the logits show it."""
    pieces = pieces_of("fp8_tensor")
    pieces["q"][5, 7] = np.nan
    weight = Encoded(pieces, encoding="fp8_tensor", block_bytes=1 << 20)
    (where,) = np.argwhere(np.isnan(np.asarray(dequantize(weight, WIDTH))))
    assert where.tolist() == [5, 7]
