"""Published tensors of which some are scales that are stored as codes: they are decoded as they are
read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jlayer.checkpoint.nested import Nested
from jlayer.convert.sources.files import CHUNK_BYTES, FileSource, Place, Room, TensorInfo


class NestedSource(FileSource):
    """`nested`: what the codes of a tensor, one byte for each of its numbers, stand for."""

    def __init__(
        self,
        tensors: dict[str, TensorInfo],
        places: dict[str, tuple[Place, ...]],
        nested: Mapping[str, Nested],
    ) -> None:
        super().__init__(tensors, places)
        self._nested = nested

    def chunks(self, name: str, room: Room | None = None) -> Iterator[memoryview]:
        if name not in self._nested:
            yield from super().chunks(name, room)
            return
        (place,), n_codes = self.places_of(name), int(np.prod(self.tensors[name].shape))
        stored = TensorInfo("uint8", (n_codes,))
        for first in range(0, n_codes, CHUNK_BYTES):
            codes = np.empty(min(CHUNK_BYTES, n_codes - first), np.uint8)
            self.read_place(place, first, memoryview(codes), stored)
            scales = np.empty(len(codes), np.float32)
            self._nested[name].decode(codes, scales, first=first)
            yield memoryview(scales).cast("B")
