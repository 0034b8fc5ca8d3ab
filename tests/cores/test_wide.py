"""Products of many bfloat16 columns: rows are decoded once, rounded as a device rounds them."""

import math

import ml_dtypes
import numpy as np
import pytest

from jlayer.cores import cores as module
from jlayer.cores import wide
from jlayer.cores.cores import Cores, padded_columns
from jlayer.cores.jobs import aligned
from jlayer.cores.native import Compiler, missing
from jlayer.cores.packing import packed_shape
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.registry import encoding
from tests.campaigns import covering
from tests.cores.matrices import FORMS, assert_is_product, inputs, matrix, placed
from tests.cores.test_kernels import FORMS as OTHERS
from tests.cores.test_kernels import with_scales_of_all_kinds
from tests.cores.tiles import SoftwareTiles
from tests.encoded import random_pieces

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
BFLOAT16 = ml_dtypes.bfloat16
# Some rows more than are taken at a time, widths of less than a part, of some and of all but a few.
SHAPES = ((32, 64), (33, 192), (131, 2112), (259, 1024))
# One group of 16, more of them than one call takes, and some more.
COLUMNS = (1, 5, 16, 17, 40, 64, 130)
# How many-column kernels may multiply: as this processor can, or without Intel's tiles.
WITHOUT_TILES, IN_SOFTWARE = "-amx-tile", "-amx-tile,-amx-bf16"


def has_wide():
    return missing() is None and Compiler().has_bfloat16


needs_wide = pytest.mark.skipif(not has_wide(), reason="no AVX-512 with bfloat16")


PROCESSORS = ("as it is", "without tiles", "tiles in software")


@pytest.fixture(scope="module", params=PROCESSORS)
def cores(request):
    """The kernels of tiles run on every processor: where it has none, in software."""
    in_software = request.param == "tiles in software"
    features = {"as it is": "", "without tiles": WITHOUT_TILES}.get(request.param, IN_SOFTWARE)
    with pytest.MonkeyPatch.context() as patch:
        if in_software:
            patch.setattr(module, "Compiler", SoftwareTiles)
        with Cores(1 if in_software else 2, features=features) as found:
            assert found.code.has_amx or not in_software
            yield found


@pytest.fixture
def any_columns(monkeypatch):
    """Any number of columns counts as many."""
    monkeypatch.setattr(module, "WIDE_COLUMNS", {True: {}, False: {}})
    monkeypatch.setattr(module, "WIDE_ANYWAY", {True: 1, False: 1})


def is_wide(cores, matrices, x):
    """Which of the matrices are multiplied by all columns at a time."""
    results = [np.empty((padded_columns(len(x)), one.n_rows), np.float32) for one in matrices]
    return cores.jobs(matrices, results, len(x), x.dtype).is_wide.tolist()


def columns(n_columns, width):
    return inputs(n_columns, width).astype(BFLOAT16)


def random(form, rows, width):
    return placed(form, random_pieces(form, rows, width), width, offset=3)


@needs_wide
@pytest.mark.parametrize("n_columns", COLUMNS)
@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_a_product_is_that_of_the_rounded_weights(cores, any_columns, form, n_columns):
    for rows, width in SHAPES:
        some, x = matrix(form, rows, width, offset=3), columns(n_columns, width)
        assert is_wide(cores, [some], x) == [True]
        (y,) = cores.multiply([some], x)
        assert_is_product(y, x, some, rounded=True)


@needs_wide
@pytest.mark.parametrize(
    ("cores", "form", "n_columns"),
    covering(
        [("as it is", form, 9) for form in OTHERS]
        + [(name, form, 9) for name in PROCESSORS[1:] for form in OTHERS[::3]]
        + [("as it is", OTHERS[0], 64)],
        *(PROCESSORS, OTHERS, (9, 64)),
    ),
    indirect=["cores"],
)
def test_other_tools_weights_are_rounded_once_too(cores, any_columns, form, n_columns):
    for rows, width in SHAPES[1:3]:
        unit = encoding(form).width_unit if form in BLOCKS else 1
        some = random(form, rows, -(-width // unit) * unit)
        x = columns(n_columns, some.width)
        assert is_wide(cores, [some], x) == [True]
        (y,) = cores.multiply([some], x)
        assert_is_product(y, x, some, rounded=True)


@pytest.mark.parametrize("form", FORMS)
def test_columns_of_bfloat16_are_multiplied_everywhere(form):
    """Also where there are few rows or columns, no such kernel, and no kernel at all."""
    x = columns(20, 130)
    for native in (True, False):
        with Cores(2, native=native) as cores:
            for width in (96, 130):
                some = matrix(form, 9, width)
                assert_is_product(cores.multiply([some], x[:, :width])[0], x[:, :width], some)


@needs_wide
def test_matrices_of_many_kinds_in_one_product(cores, any_columns):
    """Each takes the columns as its kernel wants them."""
    some = [
        matrix(form, rows, 192, seed=number)
        for number, (form, rows) in enumerate([("int4", 70), ("float16", 70), ("int8", 3)] * 2)
    ]
    x = columns(18, 192)
    kinds = is_wide(cores, some, x)
    assert kinds == [True, False, False] * 2
    for y, one, kind in zip(cores.multiply(some, x), some, kinds, strict=True):
        assert_is_product(y, x, one, rounded=kind)


@needs_wide
def test_results_beside_are_left_alone(cores, any_columns):
    """Rows before and after, and columns beyond."""
    some, x = matrix("int8", 45, 128), columns(17, 128)
    memory = np.full((19, 80), 7, np.float32)
    cores.begin(cores.jobs([some], [memory[:17, 20:65]], 17, x.dtype), x).finish()
    assert_is_product(memory[:17, 20:65], x, some, rounded=True)
    memory[:17, 20:65] = 7
    assert (memory == 7).all()


@needs_wide
def test_few_columns_and_columns_in_float32_take_the_other_kernels(cores):
    some = matrix("int8", 64, 128)
    for x in (columns(2, 128), inputs(33, 128)):
        assert is_wide(cores, [some], x) == [False]
        assert_is_product(cores.multiply([some], x)[0], x, some)
    assert is_wide(cores, [some], columns(33, 128)) == [True]


@needs_wide
@pytest.mark.parametrize("form", ["mxfp4", "nf4", "nvfp4", "uint4_g64_float16", "fp8_128x128"])
def test_scales_of_all_kinds(cores, any_columns, form):
    """The smallest numbers are zeros here: what multiplies bfloat16 knows none below 2 ** -126."""
    width = 128
    some, expected = with_scales_of_all_kinds(form, width)
    with np.errstate(over="ignore"):
        expected = expected.astype(BFLOAT16).astype(np.float32)
    some = repeated(some, 32)
    expected = np.resize(expected, (some.n_rows, width))
    (y,) = cores.multiply([some], np.eye(width, dtype=BFLOAT16))
    finite = np.isfinite(expected).all(axis=1)
    assert len(finite) // 2 <= finite.sum() < len(finite)
    assert not np.isfinite(y[:, ~finite]).all(axis=0).any()
    np.testing.assert_allclose(y.T[finite], expected[finite], rtol=0, atol=2**-126)


def repeated(some, least):
    """A matrix again and again, until it has so many rows."""
    times = -(-least // some.n_rows)
    pieces = {
        name: np.concatenate([piece] * times) if encoding(some.form).rows_per(name) else piece
        for name, piece in some.pieces.items()
    }
    return placed(some.form, pieces, some.width)


@needs_wide
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_no_number_is_seen_in_the_product_of_its_row_alone(cores, any_columns, code):
    """Also in the last rows, which are multiplied together with some before them."""
    for row in (7, 40):
        pieces = random_pieces("fp8_row", 41, 128)
        pieces["q"].view(np.uint8)[row, 50] = code
        for n_columns in (3, 64):
            x = columns(n_columns, 128)
            (y,) = cores.multiply([placed("fp8_row", pieces, 128)], x)
            assert np.argwhere(np.isnan(y)).tolist() == [[n, row] for n in range(n_columns)]


def test_shapes_with_a_kernel():
    assert wide.is_native("int4", 32, 128)
    assert not wide.is_native("int4", 32, 96)
    assert wide.is_native("int8", 32, 128)
    assert not wide.is_native("int8", 32, 96)
    assert not wide.is_native("int8", 31, 128)
    assert not wide.is_native("bfloat16", 32, 80)
    assert not wide.is_native("float16", 32, 96)
    assert wide.is_native("nvfp4", 32, 96)
    assert not wide.is_native("nvfp4", 32, 48)
    assert wide.is_native("q4_k", 32, 256)
    assert not wide.is_native("q4_k", 32, 128)
    assert not wide.is_native("ordered_packed4_g32_bfloat16", 32, 128)


def test_packed_columns():
    """Beyond the last one it stands again: what is multiplied there is dropped."""
    x = inputs(18, 64).astype(BFLOAT16)
    shape = packed_shape(18, 64)
    packed = aligned(2 * math.prod(shape)).view(BFLOAT16).reshape(shape)
    with Cores(1) as cores:
        cores.code.pack(x, packed)
    assert shape == (2, 32, 16, 2)
    flat = packed.transpose(0, 2, 1, 3).reshape(32, 64)
    assert (flat[:18] == x).all()
    assert (flat[18:] == x[-1]).all()


def test_steps_take_up_to_four_groups_of_columns():
    assert wide.steps(1) == [(1, 0)]
    assert wide.steps(64) == [(4, 0)]
    assert wide.steps(97) == [(4, 0), (3, 64)]
