"""Reads single rows of the embedding table; the whole table is never in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jlayer.checkpoint.store import Store
from jlayer.families.registry import family_of
from jlayer.plan.cutting import parts_of
from jlayer.plan.tiles import Part, Weights
from jlayer.streaming.cached import PageCache
from jlayer.streaming.direct import RowReader


class Embedding:
    """The open embedding table of a store: one array, or its quantized pieces."""

    def __init__(self, store: Store, weights: Weights):
        leaf = family_of(weights.cfg).embedding
        self.parts: list[Part] = parts_of(leaf, leaf.published, weights)
        self._readers = {}
        try:
            for part in self.parts:
                segment = store.segment_of(part.tensor)
                self._readers[part.tensor] = RowReader(
                    segment, n_rows=part.shape[0], identity=store.identities[segment.file]
                )
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> list[str]:
        """The names of the table's tensors on disk."""
        return list(self._readers)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by number, integers [n] -> by leaf the rows [n, ...] of each part, as stored.

        Raises CheckpointError or StorageError.
        """
        return {
            part.leaf: self._readers[part.tensor].read(rows).view(np.dtype(part.dtype))
            for part in self.parts
        }

    def rows_of(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of tokens [R], by leaf [R, ...], each read once; of one below 0 any row. Raises
        what `read` raises."""
        real, row_of = tokens >= 0, np.zeros(tokens.shape, np.int32)
        ids, row_of[real] = np.unique(tokens[real], return_inverse=True)
        found = self.read(ids if len(ids) else np.zeros(1, tokens.dtype))
        return {leaf: unique[row_of] for leaf, unique in found.items()}

    def begin_whole(self, tensor: str, take: Callable[..., None], page_cache: PageCache) -> None:
        """Starts reading the whole of one of `tensors`; see `RowReader.begin_whole`."""
        self._readers[tensor].begin_whole(take, page_cache)

    def settle(self) -> None:
        """Waits for the reads that `begin_whole` started; raises their errors."""
        for reader in self._readers.values():
            reader.settle()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
