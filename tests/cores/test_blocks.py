"""Kernels for the block types of GGUF: every weight, and products of all kinds of shapes."""

import platform

import numpy as np
import pytest

from jlayer.cores import kernels
from jlayer.cores.cores import Cores
from jlayer.cores.decode import decoded
from jlayer.cores.native import missing
from jlayer.encodings.blocks import BLOCKS
from tests.cores.matrices import assert_is_product, inputs, placed
from tests.encoded import random_pieces

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
# What is taken away from the processor.
FEATURES = ["", *(["-avx512f"] if platform.machine() == "x86_64" else [])]


@pytest.fixture(
    scope="module", params=FEATURES, ids=["as it is", "without AVX-512"][: len(FEATURES)]
)
def cores(request):
    with Cores(2, features=request.param) as found:
        yield found


@pytest.mark.parametrize("form", BLOCKS)
def test_every_weight_is_the_decoded_one(cores, form):
    """Bit for bit: each column has a single input that is not zero."""
    width = 256
    pieces = random_pieces(form, 5, width)
    (y,) = cores.multiply([placed(form, pieces, width)], np.eye(width, dtype=np.float32))
    np.testing.assert_array_equal(y.T, decoded(form, pieces, width))


@pytest.mark.parametrize("form", BLOCKS)
def test_a_product_is_that_of_the_decoded_weights(cores, form):
    """A block alone, and more inputs than a part of many columns has; of any alignment."""
    unit = BLOCKS[form].width_unit
    for rows, width in ((1, unit), (7, 2304)):
        assert kernels.is_native(form, width)
        some = placed(form, random_pieces(form, rows, width), width, offset=3)
        for n_columns in (1, 2, 7, 12):
            x = inputs(n_columns, width)
            assert_is_product(cores.multiply([some], x)[0], x, some)


def test_rows_without_whole_blocks_have_no_kernel():
    assert [width for width in range(1, 900) if kernels.is_native("q4_k", width)] == [256, 512, 768]
    assert [width for width in range(1, 99) if kernels.is_native("q8_0", width)] == [32, 64, 96]


def test_scales_that_are_no_numbers_are_seen_in_the_product(cores):
    """So a file that has them cannot pass unseen."""
    pieces = random_pieces("q4_k", 3, 256)
    pieces["q"][1, :2] = np.array([np.nan], "<f2").view(np.uint8)
    (y,) = cores.multiply([placed("q4_k", pieces, 256)], inputs(2, 256))
    assert np.isnan(y).tolist() == [[False, True, False]] * 2


def test_every_scale_of_mxfp4_is_exact(cores):
    """Those below float32's full precision too; beyond, a level may be infinite."""
    pieces = random_pieces("gguf_mxfp4", 251, 32)
    pieces["q"][:, 0] = range(251)
    (y,) = cores.multiply([placed("gguf_mxfp4", pieces, 32)], np.eye(32, dtype=np.float32))
    np.testing.assert_array_equal(y.T, decoded("gguf_mxfp4", pieces, 32))
