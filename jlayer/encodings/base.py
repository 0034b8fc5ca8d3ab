"""The interface of an encoding: how the numbers of a matrix are stored as bytes.

An encoding stores a matrix [out, in] as one or more pieces: arrays with one row for each row of the
matrix, or for several of them (`rows_per`). So ranges of rows can be stored, moved and multiplied
alone; where an encoding is not `by_rows`, a matrix is moved as a whole. Standard library only: the
arithmetic is in `model.products` (JAX) and in the converter (numpy), by the encoding's name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from jlayer.spec import STORED_BYTES

WHOLE = ""  # the only piece of a plain tensor: it has the tensor's own name


@dataclass(frozen=True)
class Encoding(ABC):
    """One way of storing a tensor; subclasses define the pieces.

    `product` names the function of `model.products` that multiplies by such a matrix.
    """

    name: str
    product: str
    main: str = WHOLE  # the piece that has the numbers themselves

    @abstractmethod
    def pieces(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The arrays that store a tensor of this shape: piece -> (dtype, shape)."""

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, all pieces together."""
        return sum(
            STORED_BYTES[dtype] * math.prod(piece) for dtype, piece in self.pieces(shape).values()
        )

    @property
    def is_plain(self) -> bool:
        """Whether the stored numbers are multiplied directly, without decoding."""
        return True

    @property
    def by_rows(self) -> bool:
        """Whether a row of a piece is of one row of the matrix."""
        return True

    def rows_per(self, piece: str) -> int:
        """The rows of the matrix that one row of a piece is for; 0: the piece is for all of them.
        The last row of a piece may be for fewer."""
        return 1

    def number_format(self, piece: str) -> str | None:
        """What the bytes of a piece stand for, where its dtype does not tell: the name of a row of
        `convert.transform.cast`, which knows NaN and infinite numbers by it."""
        return None

    @property
    def row_unit(self) -> int:
        """Ranges of rows begin at multiples of this number."""
        return math.lcm(
            *(n for piece in self.pieces((1, self.width_unit)) if (n := self.rows_per(piece)))
        )

    @property
    def width_unit(self) -> int:
        """The inputs of a row are a multiple of this."""
        return 1

    @abstractmethod
    def decoded_bytes(self, n_rows: int, width: int, *, dtype: str, platform: str) -> int:
        """Bytes of the decoded copy that a product in `dtype` makes at a time, of `n_rows` rows."""
