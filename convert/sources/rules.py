"""How a published tensor is made from the parts of a foreign checkpoint: a closed set of rules.

A rule says along which axis the parts are joined, and whether the rows of each head are reordered.
It works on numbers or on the bytes of rows alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """`axis`: the axis along which parts are joined; None where every part holds the whole tensor.

    `by_head`: the two numbers of a rotary pair are neighbours in the foreign form and lie half a
    head apart in the published one.
    """

    name: str
    axis: int | None
    by_head: bool = False

    def joined_shape(self, shapes: Sequence[Shape]) -> Shape | None:
        """The shape of the joined tensor; None where parts of these shapes do not fit."""
        first = shapes[0]
        if self.axis is None:
            return first if set(shapes) == {first} else None
        if {len(shape) for shape in shapes} != {2}:
            return None
        across = {shape[1 - self.axis] for shape in shapes}
        along = sum(shape[self.axis] for shape in shapes)
        if len(across) != 1:
            return None
        return (along, *across) if self.axis == 0 else (*across, along)

    def reorder(self, rows: np.ndarray, *, head_dim: int) -> np.ndarray:
        """Joined rows [whole heads, any width] in their published order."""
        if not self.by_head:
            return rows
        pairs = rows.reshape(-1, head_dim // 2, 2, math.prod(rows.shape[1:]))
        return pairs.swapaxes(1, 2).reshape(rows.shape)


KEEP = Rule("keep", axis=None)
JOIN_ROWS = Rule("join_rows", axis=0)
JOIN_COLUMNS = Rule("join_columns", axis=1)
UNPERMUTE_ROPE = Rule("unpermute_rope", axis=0, by_head=True)
