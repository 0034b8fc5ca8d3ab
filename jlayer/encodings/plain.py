"""Tensors as published: one array of floating-point numbers, of a matrix in one of two orders."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.base import WHOLE, Encoding
from jlayer.spec import ITEM_BYTES


@dataclass(frozen=True)
class Plain(Encoding):
    """A tensor of any shape in one dtype, which is also the name of the encoding."""

    product: str = "plain"

    def pieces(self, shape):
        return {WHOLE: (self.name, shape)}

    def decoded_bytes(self, n_rows, width, *, dtype, platform):
        return 0 if self.name == dtype else n_rows * width * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class InputsFirst(Encoding):
    """A matrix [out, in] whose numbers, of `dtype`, lie as [in, out]: so some publish experts."""

    product: str = "inputs_first"
    dtype: str = "float32"

    @property
    def by_rows(self):
        return False

    def pieces(self, shape):
        return {WHOLE: (self.dtype, shape[::-1])}

    def decoded_bytes(self, n_rows, width, *, dtype, platform):
        return 0 if self.dtype == dtype else n_rows * width * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class ForAllRows(Plain):
    """An array that comes whole with each range of a matrix's rows: what an adapter multiplies the
    inputs by. It has no rows of the matrix."""

    main: str = "none"
    dtype: str = "float32"

    def pieces(self, shape):
        return {WHOLE: (self.dtype, shape)}

    def rows_per(self, piece):
        return 0

    @property
    def row_unit(self):
        return 1

    def decoded_bytes(self, n_rows, width, *, dtype, platform):
        return 0


# dtype -> the encoding of an array that is for all rows.
FOR_ALL_ROWS = {name: ForAllRows(f"{name}_for_all_rows", dtype=name) for name in ITEM_BYTES}
# dtype -> the encoding of matrices whose inputs come first.
INPUTS_FIRST = {name: InputsFirst(f"{name}_inputs_first", dtype=name) for name in ITEM_BYTES}
ENCODINGS = (*(Plain(name) for name in ITEM_BYTES), *INPUTS_FIRST.values())
