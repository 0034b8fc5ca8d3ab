"""The encodings that are known, by name, and the names of their pieces."""

from __future__ import annotations

from jlayer.encodings import plain
from jlayer.encodings.base import WHOLE, Encoding
from jlayer.encodings.grouped import SCALE, Grouped, Q
from jlayer.encodings.int4 import INT4
from jlayer.encodings.int8 import INT8

# A new encoding is a file beside this one, a line here, and a product in `model.products`.
ENCODINGS: dict[str, Encoding] = {row.name: row for row in (*plain.ENCODINGS, INT8, INT4)}
# Those that the converter can quantise to.
SCHEMES: dict[str, Grouped] = {row.name: row for row in (INT8, INT4)}
_PIECES = (Q, SCALE)
# How many weights a number of a piece of this dtype holds; no two schemes share one.
WEIGHTS_A_NUMBER = {scheme.q_dtype: 8 // scheme.bits for scheme in SCHEMES.values()}


def encoding(name: str) -> Encoding:
    return ENCODINGS[name]


def piece_name(name: str, piece: str) -> str:
    """The name of a piece of a tensor, or leaf: `X.weight.q`; `X.weight` itself where it is
    whole."""
    return name if piece == WHOLE else f"{name}.{piece}"


def split_piece(name: str) -> tuple[str, str]:
    """The inverse: (the tensor's or leaf's own name, the piece)."""
    base, _, piece = name.rpartition(".")
    return (base, piece) if piece in _PIECES else (name, WHOLE)
