"""Tensors that lie in parts, one in each file of a model-parallel checkpoint, joined as they are
read.

A block of rows at a time, never a whole matrix; each part is read from its start to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.sources.files import CHUNK_BYTES, FileSource, Place, Room, TensorInfo, row_bytes
from convert.sources.rules import Rule


@dataclass(frozen=True)
class Parts:
    """What a published tensor is made of: a rule, and its parts in the order of their files."""

    rule: Rule
    places: tuple[Place, ...]
    infos: tuple[TensorInfo, ...]


class JoinedSource(FileSource):
    """Published tensors, each made of parts. Where every part holds the whole, they are
    compared."""

    def __init__(
        self, tensors: dict[str, TensorInfo], parts: dict[str, Parts], *, head_dim: int
    ) -> None:
        super().__init__(tensors, {name: found.places for name, found in parts.items()})
        self._parts = parts
        self._head_dim = head_dim

    def chunks(self, name: str, room: Room | None = None) -> Iterator[memoryview]:
        found, info = self._parts[name], self.tensors[name]
        if found.rule.axis is None:
            yield from super().chunks(name, room)
            return
        n_rows, unit = info.shape[0], self._head_dim if found.rule.by_head else 1
        step = max(1, CHUNK_BYTES // row_bytes(info) // unit) * unit
        for first in range(0, n_rows, step):
            block = np.empty((min(step, n_rows - first), row_bytes(info)), np.uint8)
            self._read_block(found, first, block)
            yield memoryview(found.rule.reorder(block, head_dim=self._head_dim)).cast("B")

    def _read_block(self, found, first, block):
        """Rows of the joined tensor, from `first` on, as their bytes."""
        start = 0  # of a part, in the whole: rows, or bytes of each row
        for place, info in zip(found.places, found.infos, strict=True):
            width = row_bytes(info)
            if found.rule.axis == 1:
                rows = np.empty((len(block), width), np.uint8)
                self._read(place, first * width, memoryview(rows).cast("B"), info)
                block[:, start : start + width] = rows
                start += width
            else:
                end = start + info.shape[0]
                low, high = max(first, start), min(first + len(block), end)
                if low < high:
                    rows = block[low - first : high - first]
                    self._read(place, (low - start) * width, memoryview(rows).cast("B"), info)
                start = end
