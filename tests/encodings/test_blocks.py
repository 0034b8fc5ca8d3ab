"""GGUF's block types, decoded by numpy and by JAX: bit for bit as llama.cpp's package gguf does,
and as llama.cpp itself decodes the blocks that it has quantized."""

import jax
import numpy as np
import pytest

from jlayer.cores.decode import decoded
from jlayer.encodings.blocks import BLOCKS
from jlayer.model.products import Encoded, dequantize
from tests.encoded import random_pieces

gguf = pytest.importorskip("gguf")

WIDTH = 512
# The bits of a float16: zeros, the smallest and the largest numbers without full precision, the
# largest number of all, infinity and what is no number.
EXTREMES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF)


def type_of(row):
    return gguf.GGMLQuantizationType[row.name.removeprefix("gguf_").upper()]


def random_rows(row, n_rows, width, *, seed=0):
    shape = row.pieces((n_rows, width))["q"][1]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def extreme_rows(row):
    """Rows of random codes, of bytes of ones and of zeros; with each extreme number in each place
    of one."""
    rows = [*random_rows(row, 4, WIDTH), *np.outer([0, 255], np.ones(WIDTH * 2)).astype(np.uint8)]
    n_bytes = WIDTH // row.weights * row.n_block_bytes
    rows = np.array([some[:n_bytes] for some in rows])
    for at, dtype in row.numbers:
        numbers = np.array(EXTREMES, np.uint16) if dtype == "float16" else np.arange(0, 256, 5)
        raw = numbers.astype("<u2" if dtype == "float16" else "u1").view(np.uint8)
        for number in raw.reshape(len(numbers), -1):
            more = random_rows(row, 1, WIDTH, seed=1).reshape(-1, row.n_block_bytes)
            more[:, at : at + len(number)] = number
            rows = np.vstack([rows, more.reshape(1, -1)])
    return rows


def assert_same_bits(found, expected):
    """All that is no number counts as the same."""
    assert found.dtype == expected.dtype == np.float32
    same = found.view(np.uint32) == expected.view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(expected))).all()


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_every_code_decodes_to_what_gguf_says(row):
    assert gguf.GGML_QUANT_SIZES[type_of(row)] == (row.weights, row.n_block_bytes)
    q = extreme_rows(row)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(q, type_of(row))
    assert np.isnan(expected).any() or row.numbers[0][1] != "float16"
    assert_same_bits(decoded(row.name, {"q": q}, WIDTH), expected)
    weight = Encoded({"q": q}, encoding=row.name, block_bytes=1 << 20)
    found = np.asarray(jax.jit(dequantize, static_argnums=1)(weight, WIDTH))
    # XLA's CPU takes scales that float32 has no full precision for as zero: below 2 ** -126.
    is_small = np.abs(expected) < 2.0**-120 if row.numbers[0][1] == "e8m0" else False
    assert_same_bits(
        np.where(is_small, np.float32(0), found), np.where(is_small, np.float32(0), expected)
    )
    assert (np.abs(found[is_small]) < 2.0**-120).all()


def weights_to_quantize():
    """Rows as of a trained matrix, some with outliers, large, tiny, of one sign, sparse, zero."""
    rows = np.random.default_rng(0).normal(0, 0.05, (64, WIDTH)).astype(np.float32)
    rows[8:16, ::37] *= 20
    rows[16:24] *= np.float32(1000)
    rows[24:32] *= np.float32(1e-5)
    rows[32:40] = np.abs(rows[32:40])
    rows[40:48, 100:] = 0
    rows[48] = 0
    return rows


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_what_llama_cpp_has_quantized_decodes_as_it_says(row):
    quantizer = pytest.importorskip("tests.gguf.quantizer")
    weights = weights_to_quantize()
    q = quantizer.quantize(weights, type_of(row))
    expected = quantizer.dequantize(q, type_of(row))
    # These are real blocks: near what was quantized, with many codes.
    assert np.abs(expected - weights)[:8].max() < 0.3 * np.abs(weights[:8]).max()
    assert len(np.unique(q)) > 100
    assert_same_bits(decoded(row.name, {"q": q}, WIDTH), expected)
    weight = Encoded({"q": q}, encoding=row.name, block_bytes=1 << 20)
    assert_same_bits(np.asarray(jax.jit(dequantize, static_argnums=1)(weight, WIDTH)), expected)


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_rows_are_decoded_alone_as_among_others(row):
    q, width = random_rows(row, 5, row.weights), row.weights
    with np.errstate(all="ignore"):
        everything = decoded(row.name, {"q": q}, width)
    for first in range(5):
        for end in range(first + 1, 6):
            found = decoded(row.name, {"q": q[first:end]}, width)
            assert_same_bits(found, everything[first:end])


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_a_block_has_the_numbers_that_its_row_names_and_no_others(row):
    """All other bytes are random: one that is part of a number would be infinite now and then."""
    width = 8 * row.weights
    pieces = random_pieces(row.name, 64, width)
    assert np.isfinite(decoded(row.name, pieces, width)).all()
    for at, dtype in row.numbers if row.numbers[0][1] == "float16" else ():
        q = pieces["q"][:1].copy()
        q[:, at : at + 2] = np.array([np.nan], "<f2").view(np.uint8)
        found = decoded(row.name, {"q": q}, width)
        assert np.isnan(found[:, : row.weights]).all(), (at, dtype)
        assert np.isfinite(found[:, row.weights :]).all()
