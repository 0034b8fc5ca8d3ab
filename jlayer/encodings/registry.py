"""All known encodings by name, and the names of their pieces."""

from __future__ import annotations

from jlayer.encodings import plain
from jlayer.encodings.base import WHOLE, Encoding
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.fp8 import FP8
from jlayer.encodings.grouped import Grouped
from jlayer.encodings.int4 import INT4
from jlayer.encodings.int8 import INT8
from jlayer.encodings.linear import LINEAR
from jlayer.encodings.tables import TABLES

# A new encoding is a file beside this one, a line here, and how it is decoded in `model.decoding`
# and `cores.decode`; one with other levels is a row of `tables`.
_ROWS = (
    *plain.ENCODINGS,
    *(INT8, INT4),
    *TABLES.values(),
    *LINEAR.values(),
    *BLOCKS.values(),
    *FP8.values(),
)
ENCODINGS: dict[str, Encoding] = {row.name: row for row in _ROWS}
assert len(ENCODINGS) == len(_ROWS), "two encodings have one name"
# Of arrays that stand beside a matrix, and are no matrices.
_BESIDE = {row.name: row for row in plain.FOR_ALL_ROWS.values()}
# The encodings that the converter can quantize to.
SCHEMES: dict[str, Grouped] = {row.name: row for row in (INT8, INT4)}
# The names of the pieces of all encodings; which there are does not depend on a matrix's shape.
_PIECES = {piece for row in _ROWS for piece in row.pieces((1, row.width_unit))} - {WHOLE}


def encoding(name: str) -> Encoding:
    return ENCODINGS.get(name) or _BESIDE[name]


def piece_names(name: str) -> frozenset[str]:
    """The pieces of an encoding, whatever the shape of a matrix."""
    row = ENCODINGS[name]
    return frozenset(row.pieces((1, row.width_unit)))


def piece_name(name: str, piece: str) -> str:
    """The name of a piece of a tensor or leaf: `X.weight.q`, or `X.weight` for the piece WHOLE."""
    return name if piece == WHOLE else f"{name}.{piece}"


def split_piece(name: str) -> tuple[str, str]:
    """The inverse of `piece_name`: (name of the tensor or leaf, piece)."""
    base, _, piece = name.rpartition(".")
    return (base, piece) if piece in _PIECES else (name, WHOLE)
