"""Encodings by levels and of integers: every weight is what its formula says, in numpy and JAX."""

import statistics
from itertools import product

import jax
import numpy as np
import pytest

from jlayer.cores.decode import decoded, some_rows
from jlayer.cores.decode import product as by_cores
from jlayer.encodings.grouped import WHOLE_ROW
from jlayer.encodings.linear import GROUPS, INT8_SCB, LINEAR
from jlayer.encodings.registry import ENCODINGS
from jlayer.encodings.tables import E2M1, FP4, NF4
from jlayer.model.products import Encoded, dequantize
from jlayer.model.products import product as times
from tests.encoded import random_pieces

# The last group of 32 and of 64 is short, of 128 too.
WIDTH = 336
FORMS = (
    *("nf4", "fp4", "packed4_g32_bfloat16", "packed8_g64_float16", "uint4_g128_float32"),
    *("uint4_g64_float16_bytes", "uint4_row_bfloat16", "int8_g32_float16", "int8_row_float32"),
    *("int8_scb", "nvfp4", "nvfp4_modelopt", "uint8_g64_float16", "uint8_g128_bfloat16_bytes"),
    *("ordered_packed4_g32_float16", "ordered_packed8_g64_bfloat16"),
    *("ordered_uint4_g128_float16_bytes", "ordered_uint8_g32_float32_bytes"),
)


LEVELS = {"nf4": NF4, "fp4": FP4, "nvfp4": E2M1, "nvfp4_modelopt": E2M1}


def by_formula(form, pieces, row, at):
    """One weight, float32, from what the format's own documents say."""
    encoding, f32 = ENCODINGS[form], np.float32
    if "order" in pieces:
        at = list(pieces["order"]).index(at)
    group = 0 if encoding.group == WHOLE_ROW else at // encoding.group
    scale = f32(pieces["scale"][row, group])
    if form == "nvfp4":
        scale = scale / pieces["global_scale"][0]
    if form == "nvfp4_modelopt":
        scale = scale * pieces["global_scale"][0]
    if encoding.bits == 8:
        code = int(pieces["q"][row, at])
    else:
        byte = int(pieces["q"][row, at // 2])
        is_high = (at % 2 == 1) != form.startswith(("nf4", "fp4"))
        code = byte >> 4 if is_high else byte & 15
    if form in LEVELS:
        return f32(LEVELS[form][code]) * scale
    if form == INT8_SCB.name:
        return f32(code) * scale * f32(7.874015718698502e-3)
    if "zero" in pieces:
        zero = f32(pieces["zero"][row, group])
    else:
        kind = form.removeprefix("ordered_").partition("_")[0]
        zero = f32({"packed4": 8, "packed8": 128, "int8": 0}[kind])
    return (f32(code) - zero) * scale


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_what_its_formula_says(form):
    pieces = random_pieces(form, 3, WIDTH)
    expected = [[by_formula(form, pieces, row, at) for at in range(WIDTH)] for row in range(3)]
    found = decoded(form, pieces, WIDTH)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    weight = Encoded(pieces, encoding=form, block_bytes=1 << 20)
    np.testing.assert_array_equal(jax.jit(dequantize, static_argnums=1)(weight, WIDTH), found)
    for first, end in ((0, 1), (1, 3), (2, 3)):
        some = some_rows(form, pieces, first, end - first)
        np.testing.assert_array_equal(decoded(form, some, WIDTH), found[first:end])


def test_the_names_say_what_an_encoding_has():
    for (ending, group), dtype in product(GROUPS.items(), ("bfloat16", "float16", "float32")):
        for kind, bits, zero in (
            ("packed4", 4, None),
            ("packed8", 8, None),
            ("int8", 8, None),
            ("uint4", 4, dtype),
            ("uint8", 8, dtype),
        ):
            row = LINEAR[f"{kind}_{ending}_{dtype}"]
            assert (row.bits, row.group, row.scale_dtype) == (bits, group, dtype)
            assert row.zero_dtype == zero
        assert LINEAR[f"uint4_{ending}_{dtype}_bytes"].zero_dtype == "uint8"
    assert LINEAR["uint4_g64_float16"].pieces((5, 200)) == {
        "q": ("uint8", (5, 100)),
        "scale": ("float16", (5, 4)),
        "zero": ("float16", (5, 4)),
    }
    assert LINEAR["int8_row_float32"].pieces((5, 200))["scale"] == ("float32", (5, 1))


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    """As QLoRA defines them, to a little less than float32's precision."""
    quantile, offset = statistics.NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*below, 0, *above]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=2e-6)


def test_the_levels_of_fp4_are_a_sign_and_twelfths():
    twelfths = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)
    expected = np.concatenate([twelfths, -twelfths]) / twelfths.max()
    assert np.array_equal(np.array(FP4, np.float32), expected)


@pytest.mark.parametrize("form", ["ordered_uint4_g64_float16_bytes", "ordered_packed8_g32_float32"])
def test_the_product_takes_the_inputs_in_the_order_of_the_weights(form):
    """Of all rows, some at a time, and by the host's cores, as of the decoded matrix."""
    pieces = random_pieces(form, 20, WIDTH)
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    expected = x @ decoded(form, pieces, WIDTH).T
    weight = Encoded(pieces, encoding=form, block_bytes=8 * 4 * WIDTH)
    for found in (jax.jit(times)(x, weight), by_cores(x, form, pieces, WIDTH)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
