"""Rows of the embedding table by number, as floats: a few a token, never the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jlayer.families import EMBEDDING
from jlayer.quantization import SCHEMES
from jlayer.weights.direct import RowReader
from jlayer.weights.packed import dequantize
from jlayer.weights.store import Store
from jlayer.weights.tiles import parts_of


class Embedding:
    """A store's table, opened: one array, or the pieces that it is quantised to."""

    def __init__(self, store: Store):
        self._scheme = SCHEMES.get(store.dtype_of(EMBEDDING.published))
        parts = parts_of(EMBEDDING, EMBEDDING.published, store.cfg, store.dtype_of)
        n_rows, self._width = EMBEDDING.shape(store.cfg)
        self._readers = {}
        for part in parts:
            segment = store.segment_of(part.tensor)
            identity = store.identities[segment.file]
            reader = RowReader(segment, n_rows=n_rows, identity=identity)
            self._readers[part.tensor] = (reader, part.dtype)

    @property
    def tensors(self) -> list[str]:
        """The names of what it reads."""
        return list(self._readers)

    def read(self, rows) -> np.ndarray:
        """[len(rows), D], in the stored dtype, or float32 where the table is quantised. Raises
        CheckpointError or StorageError."""
        found = [
            reader.read(rows).view(np.dtype(dtype)) for reader, dtype in self._readers.values()
        ]
        if self._scheme is None:
            return found[0]
        return dequantize(self._scheme, *found, width=self._width)

    def begin_whole(self, tensor: str, take: Callable[..., None]) -> None:
        """Starts reading one of `tensors` from end to end; see `RowReader.begin_whole`."""
        self._readers[tensor][0].begin_whole(take)

    def settle(self) -> None:
        """Waits for what was begun; raises what went wrong."""
        for reader, _ in self._readers.values():
            reader.settle()

    def close(self) -> None:
        for reader, _ in self._readers.values():
            reader.close()
