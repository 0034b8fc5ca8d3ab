"""Rows of the embedding table by number, as they are stored: a few a token, never the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jlayer.checkpoint.store import Store
from jlayer.families.registry import family_of
from jlayer.plan.tiles import Part, Weights, parts_of
from jlayer.streaming.direct import RowReader


class Embedding:
    """A store's table, opened: one array, or the pieces that it is quantised to."""

    def __init__(self, store: Store, weights: Weights):
        leaf = family_of(weights.cfg).embedding
        self.parts: list[Part] = parts_of(leaf, leaf.published, weights)
        self._readers = {}
        for part in self.parts:
            segment = store.segment_of(part.tensor)
            identity = store.identities[segment.file]
            self._readers[part.tensor] = RowReader(segment, n_rows=part.shape[0], identity=identity)

    @property
    def tensors(self) -> list[str]:
        """The names of what it reads."""
        return list(self._readers)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by number, integers [n] -> those of each part by leaf, [n, ...] in its own dtype.

        Raises CheckpointError or StorageError.
        """
        return {
            part.leaf: self._readers[part.tensor].read(rows).view(np.dtype(part.dtype))
            for part in self.parts
        }

    def begin_whole(self, tensor: str, take: Callable[..., None]) -> None:
        """Starts reading one of `tensors` from end to end; see `RowReader.begin_whole`."""
        self._readers[tensor].begin_whole(take)

    def settle(self) -> None:
        """Waits for what was begun; raises what went wrong."""
        for reader in self._readers.values():
            reader.settle()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
