"""How a tensor's published form is made of a foreign one: the closed set of rules, each with its
inverse.

A rule says along which axis the parts of a tensor are joined, and whether the rows of a head are
put in another order. What it is made of does not matter: numbers, or the bytes of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """`axis`: along which parts are joined; None where every part holds the whole tensor.

    `by_head`: rotary pairs, which the foreign form keeps side by side, become halves of the head.
    `inverse` names what `split` does.
    """

    name: str
    inverse: str
    axis: int | None
    by_head: bool = False

    def joined_shape(self, shapes: Sequence[Shape]) -> Shape | None:
        """The shape that parts of these shapes make together; None where they do not fit."""
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

    def join(self, parts: Sequence[np.ndarray], *, head_dim: int) -> np.ndarray:
        """The published tensor."""
        whole = parts[0] if self.axis is None else np.concatenate(parts, axis=self.axis)
        return self.reorder(whole, head_dim=head_dim)

    def split(self, whole: np.ndarray, n_parts: int, *, head_dim: int) -> list[np.ndarray]:
        """The inverse of `join`."""
        if self.by_head:
            whole = _swap(whole, 2, head_dim // 2)
        return [whole] * n_parts if self.axis is None else np.split(whole, n_parts, axis=self.axis)

    def reorder(self, rows: np.ndarray, *, head_dim: int) -> np.ndarray:
        """Rows of whole heads in their published order: what `join` does to a block of rows."""
        return _swap(rows, head_dim // 2, 2) if self.by_head else rows


def _swap(rows, outer, inner):
    """Within every `outer` x `inner` rows, the order of a transposed matrix."""
    grouped = rows.reshape(-1, outer, inner, math.prod(rows.shape[1:]))
    return grouped.swapaxes(1, 2).reshape(rows.shape)


KEEP = Rule("keep", "keep", axis=None)
JOIN_ROWS = Rule("join_rows", "split_rows", axis=0)
JOIN_COLUMNS = Rule("join_columns", "split_columns", axis=1)
UNPERMUTE_ROPE = Rule("unpermute_rope", "permute_rope", axis=0, by_head=True)
RULES = (KEEP, JOIN_ROWS, JOIN_COLUMNS, UNPERMUTE_ROPE)
