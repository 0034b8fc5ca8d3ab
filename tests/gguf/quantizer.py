"""llama.cpp's own quantizers, and the types that it gives the matrices of a model.

The package xllamacpp has them in its shared library; the package gguf has those of the older types
alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")


class _Traits(ctypes.Structure):
    """What ggml.h calls ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


_LIBRARY = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
_LIBRARY.ggml_get_type_traits.argtypes = [ctypes.c_int]
_LIBRARY.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
_LIBRARY.ggml_quantize_chunk.argtypes = [
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),  # the type, from, to
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),  # the first weight, rows, weights of a row
    ctypes.c_void_p,  # how much each input matters
]
_LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t


def quantize(array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of blocks, uint8 [..., bytes of a row], of a float32 array; plain numbers by gguf."""
    traits = _traits(kind)
    if not traits.is_quantized:
        return gguf.quantize(array, kind)
    width = array.shape[-1]
    assert width % traits.blck_size == 0
    flat = np.ascontiguousarray(array, np.float32).reshape(-1, width)
    raw = np.zeros((len(flat), width // traits.blck_size * traits.type_size), np.uint8)
    sizes = (0, len(flat), width, None)
    written = _LIBRARY.ggml_quantize_chunk(kind, flat.ctypes.data, raw.ctypes.data, *sizes)
    assert written == raw.nbytes
    return raw.reshape(*array.shape[:-1], -1)


def dequantize(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """What blocks stand for, float32 [rows, width]. `raw`: uint8 [rows, bytes of a row]."""
    traits, raw = _traits(kind), np.ascontiguousarray(raw)
    width = raw.shape[1] // traits.type_size * traits.blck_size
    found = np.empty((len(raw), width), np.float32)
    traits.to_float(raw.ctypes.data, found.ctypes.data, found.size)
    return found


def _traits(kind):
    found = _LIBRARY.ggml_get_type_traits(kind).contents
    # The structure is laid out as it is above.
    assert (found.blck_size, found.type_size) == gguf.GGML_QUANT_SIZES[kind]
    return found


# The mixes of llama-quant.cpp, for dense models with fewer than 8 layers: the usual type, and that
# of some matrices.
_MIXES = {
    "Q2_K": ("Q2_K", {"attn_v": "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}),
    "Q3_K_M": ("Q3_K", {"attn_v": "Q4_K", "attn_output": "Q4_K", "ffn_down": "Q4_K"}),
    "Q4_K_M": ("Q4_K", {}),
    "Q5_K_M": ("Q5_K", {}),
    "IQ4_XS": ("IQ4_XS", {}),
}
# That of attn_v where four query heads or more share a key head.
_OF_FOUR_HEADS = {"Q2_K": "Q4_K", "IQ4_XS": "Q5_K"}
# Rows that are no multiple of 256 have blocks of 32.
_INSTEAD = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def mixed(mix: str, config: dict) -> dict[str, str]:
    """Name of a matrix in a file -> its type, as llama.cpp chooses it. `config`: of a model whose
    head is its embedding."""
    width = config["hidden_size"]
    inputs = {"attn_output": config["num_attention_heads"] * config["head_dim"]}
    inputs["ffn_down"] = config["intermediate_size"]
    found = {"token_embd.weight": "Q8_0" if width % 256 else "Q6_K"}
    for layer in range(config["num_hidden_layers"]):
        for name in _MATRICES:
            kind = _kind(mix, name, layer, config)
            is_wide = inputs.get(name, width) % 256 == 0
            found[f"blk.{layer}.{name}.weight"] = kind if is_wide else _INSTEAD[kind]
    return found


def _kind(mix, name, layer, config):
    usual, others = _MIXES[mix]
    n_layers = config["num_hidden_layers"]
    n_shared = config["num_attention_heads"] // config["num_key_value_heads"]
    if name == "attn_v" and n_shared >= 4 and mix in _OF_FOUR_HEADS:
        return _OF_FOUR_HEADS[mix]
    if name == "attn_v" and mix == "Q3_K_M" and layer < 2:
        return "Q5_K"
    has_more = layer >= 7 * n_layers // 8 or layer % 3 == 2
    if name in ("attn_v", "ffn_down") and mix in ("Q4_K_M", "Q5_K_M") and has_more:
        return "Q6_K"
    return others.get(name, usual)
