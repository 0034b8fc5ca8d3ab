"""Kernels for what other tools write: every weight, and products of all kinds of shapes."""

import platform

import ml_dtypes
import numpy as np
import pytest

from jlayer.cores import kernels
from jlayer.cores.cores import Cores, Matrix
from jlayer.cores.decode import decoded, some_rows
from jlayer.cores.native import missing
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.linear import INT8_SCB, LINEAR
from jlayer.encodings.registry import encoding
from jlayer.encodings.tables import TABLES
from jlayer.model.products import Encoded, dequantize
from tests.cores.matrices import assert_is_product, inputs, placed
from tests.encoded import random_pieces

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
# A row of scales of a grid is for 128 rows.
ROWS = {"fp8_128x128": 131, "fp8_128x128_bfloat16": 131}
FORMS = (
    *BLOCKS,
    *("int8_g32_float16", "int8_row_float32", "int8_scb", "packed8_g64_bfloat16"),
    *("fp8_128x128", "fp8_128x128_bfloat16", "fp8_row_float16", "fp8_tensor"),
    *TABLES,
    *("packed4_g32_bfloat16", "packed4_g128_float16", "packed4_row_float32"),
    *("uint4_g64_float16", "uint4_g128_bfloat16_bytes", "uint4_row_float32", "uint8_g32_float32"),
)
# A kernel for such a group takes LLVM a second, and is one for a shorter group with more blocks of
# it; nf4_g4096 is in every session.
LONG = ("nf4_g1024", "nf4_g2048", "fp4_g1024", "fp4_g2048", "fp4_g4096")
QUICK = [form for form in FORMS if form not in LONG]
# One of each kind of integers. Those whose inputs are sorted have no kernel.
KINDS = {
    (row.bits, row.q_dtype, row.zero_dtype, row.is_ordered, row.factor): name
    for name, row in LINEAR.items()
    if row.group == 32 or row is INT8_SCB
}
# What is taken away from the processor.
FEATURES = {"as it is": ""}
if platform.machine() == "x86_64":
    FEATURES["without AVX-512"] = "-avx512f"


@pytest.fixture(scope="module", params=FEATURES)
def cores(request):
    with Cores(2, features=FEATURES[request.param]) as found:
        yield found


def on_each(forms, quick):
    """Parametrizes by the processor and the form. In every session all `quick` forms run on the
    processor as it is, and each third of them on narrower registers, from the same source."""
    every_third = {"as it is": quick, "without AVX-512": sorted(quick)[::3]}
    slow = pytest.mark.slow
    rows = [
        pytest.param(name, form, marks=() if form in every_third[name] else slow)
        for name in FEATURES
        for form in forms
    ]
    return pytest.mark.parametrize(("cores", "form"), rows, indirect=["cores"])


@on_each(FORMS, QUICK)
def test_every_weight_is_the_decoded_one(cores, form):
    """Bit for bit: each column has a single input that is not zero."""
    rows, width = ROWS.get(form, 5), 256
    pieces = random_pieces(form, rows, width)
    (y,) = cores.multiply([placed(form, pieces, width)], np.eye(width, dtype=np.float32))
    expected = decoded(form, some_rows(form, pieces, 0, rows), width)
    if form == INT8_SCB.name:  # the scale and a 127th are multiplied first
        np.testing.assert_allclose(y.T, expected, rtol=2**-22)
    else:
        np.testing.assert_array_equal(y.T, expected)


@on_each(FORMS, QUICK)
def test_a_product_is_that_of_the_decoded_weights(cores, form):
    """A block alone or a short last group, and more inputs than a part of many columns has; of any
    alignment."""
    for rows, width in ((1, BLOCKS[form].width_unit if form in BLOCKS else 144), (7, 2304)):
        assert kernels.is_native(form, width)
        some = placed(form, random_pieces(form, rows, width), width, offset=3)
        for n_columns in (1, 2, 7, 12):
            x = inputs(n_columns, width)
            assert_is_product(cores.multiply([some], x)[0], x, some)


@on_each(sorted({*FORMS, *KINDS.values()}), {*QUICK, *KINDS.values()})
def test_weights_are_multiplied_as_a_program_decodes_them(cores, form):
    rows, width = ROWS.get(form, 7), 256
    pieces = random_pieces(form, rows, width)
    weights = dequantize(Encoded(pieces, encoding=form, block_bytes=1 << 20), width)
    (y,) = cores.multiply([placed(form, pieces, width)], np.eye(width, dtype=np.float32))
    np.testing.assert_allclose(y.T, np.asarray(weights), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "form", ["q4_k", "int8_g32_float16", "mxfp4", "nvfp4", "uint4_g64_float16"]
)
def test_any_number_of_columns(cores, form):
    """All columns are those of the product of most of them."""
    some, x = placed(form, random_pieces(form, 9, 512), 512), inputs(64, 512)
    (expected,) = cores.multiply([some], x)
    assert_is_product(expected, x, some)
    for n_columns in range(1, 18):
        (y,) = cores.multiply([some], x[:n_columns])
        assert_is_product(y, x[:n_columns], some)


@on_each(FORMS, QUICK)
def test_rows_can_be_cut_at_every_unit(cores, form):
    """Each range of rows is multiplied as it is within the whole matrix."""
    unit = encoding(form).row_unit
    rows, width = 5 * unit + 1 if unit > 1 else 9, 256
    pieces, x = random_pieces(form, rows, width), inputs(2, width)
    (whole,) = cores.multiply([placed(form, pieces, width)], x)
    for first in range(0, rows, unit):
        some = {
            name: piece if not (per := encoding(form).rows_per(name)) else piece[first // per :]
            for name, piece in pieces.items()
        }
        (y,) = cores.multiply([Matrix(form, some, width)], x)
        np.testing.assert_allclose(y, whole[:, first:], rtol=1e-5, atol=1e-3)


def numbers_of_all_kinds(dtype):
    """Zeros, the smallest and the largest numbers, infinite ones, and no number."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    limits = ml_dtypes.finfo(dtype)
    found = [0, 1, limits.smallest_subnormal, limits.tiny, limits.max / 256]
    more = [] if dtype.itemsize == 1 else [np.inf, -np.inf]
    return np.array([*found, *(-np.array(found, np.float32)), *more, np.nan]).astype(dtype)


def with_scales_of_all_kinds(form, width):
    """(a matrix that has a row for each, its decoded weights)"""
    row = encoding(form)
    dtype, _ = row.pieces((1, width))["scale"]
    scales = np.arange(256, dtype=np.uint8) if dtype == "uint8" else numbers_of_all_kinds(dtype)
    rows = len(scales) * max(1, row.rows_per("scale"))
    pieces = random_pieces(form, rows, width)
    pieces["scale"] = np.resize(scales, pieces["scale"].shape[::-1]).T.copy()
    with np.errstate(all="ignore"):
        expected = decoded(form, some_rows(form, pieces, 0, rows), width)
    return placed(form, pieces, width), expected


# One number is the scale of all rows of the others.
WITH_SCALES = [form for form in FORMS if form not in BLOCKS and encoding(form).rows_per("scale")]


@on_each(WITH_SCALES, QUICK)
def test_scales_of_all_kinds(cores, form):
    """A row for each. Where a weight of it is infinite or no number, the product shows it."""
    some, expected = with_scales_of_all_kinds(form, 128)
    (y,) = cores.multiply([some], np.eye(128, dtype=np.float32))
    finite = np.isfinite(expected).all(axis=1)
    assert len(finite) // 2 <= finite.sum() < len(finite)
    assert not np.isfinite(y[:, ~finite]).all(axis=0).any()
    # Of bitsandbytes the scale and a 127th are multiplied first: the smallest scales lose bits.
    rtol, atol = (2**-22, 2**-126) if form == INT8_SCB.name else (0, 0)
    np.testing.assert_allclose(y.T[finite], expected[finite], rtol=rtol, atol=atol)


def test_each_square_of_a_grid_has_its_scale(cores):
    """Also where a thread begins in the middle of one."""
    some = placed("fp8_128x128", random_pieces("fp8_128x128", 700, 1168), 1168)
    for n_columns in (1, 5):
        x = inputs(n_columns, 1168)
        assert_is_product(cores.multiply([some], x)[0], x, some)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_no_number_is_seen_in_the_product_of_its_row_alone(cores, code):
    for at in (0, 127, 128, 1100, 1167):
        pieces = random_pieces("fp8_128x128", 9, 1168)
        pieces["q"].view(np.uint8)[7, at] = code
        for n_columns in (1, 4, 8):
            some = placed("fp8_128x128", pieces, 1168)
            (y,) = cores.multiply([some], inputs(n_columns, 1168))
            assert np.argwhere(np.isnan(y)).tolist() == [[n, 7] for n in range(n_columns)]


def test_rows_without_whole_blocks_have_no_kernel():
    assert [width for width in range(1, 900) if kernels.is_native("q4_k", width)] == [256, 512, 768]
    assert [width for width in range(1, 99) if kernels.is_native("q8_0", width)] == [32, 64, 96]


def test_scales_that_are_no_numbers_are_seen_in_the_product(cores):
    """So a file that has them cannot pass unseen."""
    pieces = random_pieces("q4_k", 3, 256)
    pieces["q"][1, :2] = np.array([np.nan], "<f2").view(np.uint8)
    (y,) = cores.multiply([placed("q4_k", pieces, 256)], inputs(2, 256))
    assert np.isnan(y).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(("n_scales", "code"), [(251, None), (256, 0x11)])
def test_every_scale_of_mxfp4_is_exact(cores, n_scales, code):
    """Those below float32's full precision too. Of the largest a level may be infinite: there all
    are the smallest one."""
    pieces = random_pieces("gguf_mxfp4", n_scales, 32)
    pieces["q"][:, 0] = range(n_scales)
    if code is not None:
        pieces["q"][:, 1:] = code
    (y,) = cores.multiply([placed("gguf_mxfp4", pieces, 32)], np.eye(32, dtype=np.float32))
    np.testing.assert_array_equal(y.T, decoded("gguf_mxfp4", pieces, 32))
