"""Tensors of a model-parallel checkpoint, whose parts lie in several files, joined while read.

Joins a block of rows at a time, never a whole matrix; reads each part from start to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jlayer.convert.sources.files import CHUNK_BYTES, FileSource, Place, Room, TensorInfo, row_bytes
from jlayer.convert.sources.rules import Rule


@dataclass(frozen=True)
class Parts:
    """How a published tensor is joined: the rule, and the parts in the order of their files."""

    rule: Rule
    places: tuple[Place, ...]
    infos: tuple[TensorInfo, ...]


class JoinedSource(FileSource):
    """Published tensors, each joined from parts. Parts that each hold the whole are compared."""

    def __init__(
        self, tensors: dict[str, TensorInfo], parts: dict[str, Parts], *, head_dim: int
    ) -> None:
        super().__init__(tensors, {name: of.places for name, of in parts.items()})
        self._parts = parts
        self._head_dim = head_dim

    def chunks(self, name: str, room: Room | None = None) -> Iterator[memoryview]:
        parts, info = self._parts[name], self.tensors[name]
        if parts.rule.axis is None:
            yield from super().chunks(name, room)
            return
        n_rows, unit = info.shape[0], self._head_dim if parts.rule.by_head else 1
        step = max(1, CHUNK_BYTES // row_bytes(info) // unit) * unit
        for first in range(0, n_rows, step):
            block = np.empty((min(step, n_rows - first), row_bytes(info)), np.uint8)
            self._read_block(parts, first, block)
            yield memoryview(parts.rule.reorder(block, head_dim=self._head_dim)).cast("B")

    def _read_block(self, parts, first, block):
        """Fills `block` with the bytes of the joined tensor's rows from `first` on."""
        start = 0  # where a part begins in the whole: in rows, or in bytes of a row
        for place, info in zip(parts.places, parts.infos, strict=True):
            width = row_bytes(info)
            if parts.rule.axis == 1:
                rows = np.empty((len(block), width), np.uint8)
                self.read_place(place, first * width, memoryview(rows).cast("B"), info)
                block[:, start : start + width] = rows
                start += width
            else:
                end = start + info.shape[0]
                low, high = max(first, start), min(first + len(block), end)
                if low < high:
                    rows = block[low - first : high - first]
                    self.read_place(place, (low - start) * width, memoryview(rows).cast("B"), info)
                start = end
