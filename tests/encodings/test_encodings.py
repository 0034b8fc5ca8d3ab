"""Quantized weights: packed and unpacked exactly, whatever the shape, and every scale by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.checkpoint.quantization import (
    INT4_BITS,
    Quantization,
    block_matrices,
    quantization_of,
    stored_tensors,
)
from jlayer.convert.transform.packed import LEVELS, decode_scales, dequantize, pack, unpack
from jlayer.encodings import plain
from jlayer.encodings.grouped import Grouped
from jlayer.encodings.int4 import INT4
from jlayer.encodings.int8 import INT8
from jlayer.encodings.linear import ORDER
from jlayer.encodings.registry import (
    ENCODINGS,
    SCHEMES,
    piece_name,
    split_piece,
)
from jlayer.encodings.tables import MXFP4
from jlayer.spec import STORED_BYTES


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_unpack_is_the_inverse_of_pack(rows, width, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (rows, width), dtype=np.uint8)
    packed = pack(codes)
    assert ("uint8", packed.shape) == INT4.pieces(codes.shape)["q"]
    assert np.array_equal(unpack(packed, width), codes)
    # Rows stay rows, so that a range of them is consecutive bytes.
    assert np.array_equal(pack(codes[1:]), packed[1:])


def test_halves_of_a_row_lie_in_halves_of_its_bytes():
    (packed,) = pack(np.array([[1, 2, 3, 4, 5]], np.uint8))
    assert packed.tolist() == [1 | 4 << 4, 2 | 5 << 4, 3]


def test_every_scale_is_what_its_bits_say():
    for code, found in enumerate(decode_scales(np.arange(256, dtype=np.uint8))):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        assert found == (-1) ** sign * 2.0 ** (exponent - 14) * (1 + mantissa / 8)


def test_every_level_is_what_its_half_byte_says():
    assert LEVELS.dtype == np.float32
    for code, level in enumerate(LEVELS):
        u = code - 7
        assert level == u + u**3 / 128


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("width", [1, 5, 31, 32, 33, 100, 128, 129, 300])
def test_each_weight_is_its_number_times_its_groups_scale(scheme, width):
    rng = np.random.default_rng(width)
    pieces = {
        name: rng.integers(0, 256, shape, dtype=np.uint8)
        for name, (_, shape) in scheme.pieces((3, width)).items()
    }
    if scheme is INT8:
        pieces = {"q": pieces["q"].view(np.int8), "scale": pieces["scale"].astype(np.float32) / 64}
    found = dequantize(scheme, pieces["q"], pieces["scale"], width=width)
    assert found.dtype == np.float32
    for row in range(3):
        for at in range(width):
            scale = pieces["scale"][row, at // scheme.group]
            if scheme is INT8:
                expected = np.float32(pieces["q"][row, at]) * scale
            else:
                half = (width + 1) // 2
                byte = int(pieces["q"][row, at % half])
                code = byte >> 4 if at >= half else byte & 15
                expected = LEVELS[code] * decode_scales(scale[None])[0]
            assert found[row, at] == expected


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
@settings(max_examples=20)
@given(rows=st.integers(1, 9), units=st.integers(1, 300))
def test_rows_stay_rows_in_each_piece_and_names_of_pieces_are_told_apart(encoding, rows, units):
    width = units * encoding.width_unit
    pieces = encoding.pieces((rows, width))
    assert encoding.main in pieces
    axis = 0 if encoding.by_rows else -1
    for piece, (_, shape) in pieces.items():
        per = encoding.rows_per(piece)
        if per:
            assert shape[axis] == -(-rows // per)
        else:  # for all rows: one number, or one for each input
            assert shape == ((width,) if piece == ORDER else (1,))
    all_rows = encoding.n_bytes((rows, width))
    assert all_rows == sum(STORED_BYTES[d] * math.prod(shape) for d, shape in pieces.values())
    if encoding.row_unit == 1 and all(map(encoding.rows_per, pieces)):
        assert all_rows == rows * encoding.n_bytes((1, width))
    for piece in pieces:
        assert split_piece(piece_name("a.q_proj.weight", piece)) == ("a.q_proj.weight", piece)
    assert encoding.is_plain == (encoding in plain.ENCODINGS)
    if isinstance(encoding, Grouped):
        dtype, shape = pieces[encoding.main]
        n_weights = 8 // encoding.bits * math.prod(shape) * STORED_BYTES[dtype]
        assert rows * width <= n_weights < rows * (width + 8 // encoding.bits)


def test_bits_are_what_is_promised_all_included():
    assert INT8.n_bytes((10, 1280)) * 8 == 12800 * 8.125
    assert INT4.n_bytes((10, 1280)) * 8 == 12800 * 4.25
    assert MXFP4.n_bytes((10, 1280)) * 8 == 12800 * 4.25


SHAPES = {
    "model.embed_tokens.weight": (100, 256),
    "model.layers.0.input_layernorm.weight": (256,),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.self_attn.k_proj.weight": (32, 256),
    "model.layers.0.mlp.up_proj.weight": (1024, 256),
    "model.layers.1.self_attn.q_proj.weight": (256, 256),
    "model.layers.1.self_attn.k_proj.weight": (32, 256),
    "model.layers.1.mlp.up_proj.weight": (1024, 256),
    "lm_head.weight": (100, 256),
}


def test_matrices_whose_error_for_their_size_stands_out_stay_at_int8():
    """k_proj has an eighth of q_proj's weights, and up_proj, the typical one, 32 times as many."""
    first, second = (f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1))
    query = "model.layers.1.self_attn.q_proj.weight"
    assert quantization_of("int4", SHAPES).at_int8 == (first, second)
    assert quantization_of("int8", SHAPES).at_int8 == ()
    errors = dict.fromkeys(block_matrices(SHAPES), 0.006)
    assert quantization_of("int4", SHAPES, {**errors, second: 0.0005}).at_int8 == (first,)
    # A matrix that would take more than what is left does not keep others from it.
    assert quantization_of("int4", SHAPES, {**errors, query: 0.5}).at_int8 == (first, second)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_the_average_stays_within_its_limit_whatever_the_errors(errors):
    found = quantization_of("int4", SHAPES, dict(zip(block_matrices(SHAPES), errors, strict=True)))
    assert found.block_bits(SHAPES) <= INT4_BITS
    assert found.scheme_of("lm_head.weight", (100, 256)) is INT8
    assert found.scheme_of("model.layers.0.input_layernorm.weight", (256,)) is None


def test_a_quantized_tensor_is_stored_as_its_pieces_and_a_vector_as_itself():
    found = stored_tensors(SHAPES, Quantization("int4"))
    assert found["model.layers.0.mlp.up_proj.weight.q"] == (1024, 128)
    assert found["model.layers.0.mlp.up_proj.weight.scale"] == (1024, 8)
    assert found["lm_head.weight.q"] == (100, 256)
    assert found["lm_head.weight.scale"] == (100, 2)
    assert found["model.layers.0.input_layernorm.weight"] == (256,)
    assert len(found) == 2 * 8 + 1
    assert {split_piece(name)[0] for name in found} == SHAPES.keys()
    assert stored_tensors(SHAPES, None) == SHAPES


def test_what_the_manifest_says_is_read_back_and_anything_else_is_refused():
    made = quantization_of("int4", SHAPES)
    assert Quantization.from_dict(made.as_dict()) == made
    for change in ({"scheme": "int3"}, {"groups": {"int4": 64, "int8": 128}}, {"more": 1}):
        with pytest.raises(ValueError):
            Quantization.from_dict({**made.as_dict(), **change})


def test_average_bits_count_scales_too():
    bits = Quantization("int4").block_bits(SHAPES)
    assert math.isclose(bits, 4.25)
