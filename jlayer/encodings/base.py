"""The interface of an encoding: how the numbers of a matrix lie in bytes.

An encoding keeps a matrix [out, in] as one or more pieces, arrays whose rows are the matrix's own
rows. So any range of rows can be stored, moved and multiplied by itself. Standard library only: the
arithmetic is in `model.products` (JAX) and in the converter (numpy), by the encoding's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jlayer.spec import STORED_BYTES

WHOLE = ""  # the piece of a tensor that is stored as it is: it bears the tensor's own name


@dataclass(frozen=True)
class Encoding:
    """What every encoding states of itself. Subclasses give the pieces.

    `product` names the function of `model.products` that multiplies by such a matrix.
    """

    name: str
    product: str
    main: str = WHOLE  # the piece that has the numbers themselves

    def pieces(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The arrays that a tensor of this shape is stored as: piece -> its dtype and shape."""
        raise NotImplementedError

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, all pieces together."""
        return sum(
            STORED_BYTES[dtype] * math.prod(own) for dtype, own in self.pieces(shape).values()
        )

    @property
    def is_plain(self) -> bool:
        """Whether numbers are multiplied as they lie, without being decoded first."""
        return True

    def decoded_bytes(self, n_rows: int, width: int, *, dtype: str, platform: str) -> int:
        """Bytes that a product in `dtype` writes out of the matrix before it multiplies."""
        raise NotImplementedError
