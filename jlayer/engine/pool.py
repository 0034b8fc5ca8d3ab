"""Which rows of the cache's pools belong to whom: counts of use, and a table of rows for each
lane.

One numbering holds for the pools of all layers. To accept tokens is to append their rows to a
table, to reject them is to release the rows: nothing moves on the device. Lanes that begin alike
list the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Pool:
    """The rows of a pool: how many tables list each. Rows that none lists are free."""

    def __init__(self):
        self._uses = np.zeros(0, np.int32)
        self._free: list[int] = []  # the next one to be taken last

    @property
    def n_rows(self) -> int:
        return len(self._uses)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def grow(self, n_rows: int) -> None:
        """Adds free rows, up to `n_rows` in all."""
        more = range(n_rows - 1, self.n_rows - 1, -1)
        self._free = [*more, *self._free]
        self._uses = np.concatenate([self._uses, np.zeros(len(more), np.int32)])

    def take(self, count: int) -> np.ndarray:
        """`count` free rows, int32, each used once from now on."""
        assert count <= self.n_free, "runs are admitted by their entries, and cannot use more"
        rows = np.array(self._free[len(self._free) - count :][::-1], np.int32)
        del self._free[len(self._free) - count :]
        self._uses[rows] = 1
        return rows

    def share(self, rows: np.ndarray) -> None:
        """Counts one more use of rows that are in use."""
        self._uses[rows] += 1

    def release(self, rows: np.ndarray) -> None:
        """Counts one use less; a row without any is free."""
        self._uses[rows] -= 1
        self._free += rows[self._uses[rows] == 0][::-1].tolist()


class Table:
    """The pool rows of a lane, by position: those of its committed tokens."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._rows = np.zeros(0, np.int32)
        self._length = 0
        self.is_closed = False

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> np.ndarray:
        """int32 [positions]; a view."""
        return self._rows[: self._length]

    def append(self, rows: Sequence[int] | np.ndarray) -> None:
        """Adds rows that were taken or shared for this table."""
        length = self._length + len(rows)
        if length > len(self._rows):
            longer = np.zeros(max(length, 2 * len(self._rows), 64), np.int32)
            longer[: self._length] = self.rows
            self._rows = longer
        self._rows[self._length : length] = rows
        self._length = length

    def cut(self, length: int) -> None:
        """Releases the rows from position `length` on."""
        if length < self._length:
            rows, self._length = self._rows[length : self._length], length
            self._pool.release(rows.copy())

    def close(self) -> None:
        """Releases all rows; it is not used again."""
        self.cut(0)
        self.is_closed = True
