"""Which rows of the cache's pools belong to whom: counts of use, and a table of rows for each
lane.

One numbering holds for the pools of all layers. To accept tokens is to append their rows to a
table, to reject them is to release the rows: nothing moves on the device. Lanes that begin alike
list the same rows.

Layers with a window have smaller pools. Only a row that some lane can still see has a place in
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jlayer.plan.shapes import SLOTS, PoolSizes

NO_PLACE = -1


class Window:
    """The places of rows in the pools of layers that see the last `size` tokens.

    A long prompt goes through a layer chunk by chunk, and a chunk sees no more than the window
    before it: so its rows take the places of rows of the same pass that came long before.
    """

    def __init__(self, size: int):
        self.size, self.n_rows = size, 0
        self.places = np.zeros(0, np.int32)  # of each row of the numbering; NO_PLACE: none
        self._holder = np.zeros(0, np.int32)  # of each place the row that was written to it last
        self._free: list[int] = []

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_behind(self) -> int:
        """How many tokens before it a token sees."""
        return self.size - 1

    def grow(self, n_numbered: int, n_rows: int) -> None:
        """`n_numbered`: the rows that are numbered in all; `n_rows`: those that have a place."""
        more = n_numbered - len(self.places)
        self.places = np.concatenate([self.places, np.full(more, NO_PLACE, np.int32)])
        self._free = [*range(n_rows - 1, self.n_rows - 1, -1), *self._free]
        self.n_rows = max(n_rows, self.n_rows)
        fresh = self.n_rows - len(self._holder)
        self._holder = np.concatenate([self._holder, np.full(fresh, NO_PLACE, np.int32)])

    def ring(self, chunk: int | None) -> int | None:
        """How many new rows of a lane have places of their own, if they come in chunks of this
        size: what a chunk sees, and what it writes. None: all."""
        return None if chunk is None else self.n_behind + chunk

    def take(self, rows: np.ndarray, ring: int | None = None) -> None:
        """Gives new rows of a lane, in order, their places."""
        count = len(rows) if ring is None else min(len(rows), ring)
        assert count <= len(self._free), "what a pass writes is planned, beside what lanes see"
        own = np.array([self._free.pop() for _ in range(count)], np.int32)
        places = np.resize(own, len(rows))  # from the first one on again, as often as needed
        self.places[rows] = places
        self._holder[places] = rows  # of those that share a place the last one

    def release(self, rows: np.ndarray) -> None:
        held = rows[self.places[rows] != NO_PLACE]
        places = self.places[held]
        self._free += places[self._holder[places] == held][::-1].tolist()
        self.places[held] = NO_PLACE

    def keep(self, sequences: Iterable[np.ndarray]) -> None:
        """Releases the places of all rows but those that the next token of one of these sequences
        of rows can see."""
        is_seen = np.zeros(len(self.places), bool)
        for rows in sequences:
            is_seen[rows[max(0, len(rows) - self.n_behind) :]] = True
        self.release(np.flatnonzero(~is_seen & (self.places != NO_PLACE)))

    def holds(self, rows: np.ndarray) -> bool:
        """Whether all that the next token of a sequence of rows can see has its place."""
        seen = rows[max(0, len(rows) - self.n_behind) :]
        places = self.places[seen]
        return bool((places != NO_PLACE).all() and (self._holder[places] == seen).all())


class Pool:
    """The rows of a pool: how many tables list each. Rows that none lists are free.

    `windows`: the sizes of the windows that some layers have. `has_state`: whether some layers have
    a state, for which each table has slots; then lanes that begin alike share nothing.
    """

    def __init__(self, windows: Sequence[int] = (), *, has_state: bool = False):
        self._uses = np.zeros(0, np.int32)
        self._free: list[int] = []  # the next one to be taken last
        self.windows = tuple(map(Window, windows))
        self.has_state, self.n_slots = has_state, 0
        self._free_slots: list[int] = []

    @property
    def n_rows(self) -> int:
        return len(self._uses)

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_free_everywhere(self) -> int:
        """Free rows for which every layer has room, those with a window too."""
        return min([self.n_free, *(window.n_free for window in self.windows)])

    @property
    def sizes(self) -> PoolSizes:
        windows = tuple(window.n_rows for window in self.windows)
        return PoolSizes(self.n_rows, windows, self.n_slots)

    def grow(self, sizes: PoolSizes) -> None:
        """Adds free rows, up to so many in all."""
        more = range(sizes.n_rows - 1, self.n_rows - 1, -1)
        self._free = [*more, *self._free]
        self._uses = np.concatenate([self._uses, np.zeros(len(more), np.int32)])
        for window, n_rows in zip(self.windows, sizes.windows, strict=True):
            window.grow(self.n_rows, n_rows)
        self._free_slots = [*range(sizes.slots - 1, self.n_slots - 1, -1), *self._free_slots]
        self.n_slots = max(self.n_slots, sizes.slots)

    def take_slots(self) -> list[int]:
        """The slots of a lane; none where no layer has a state."""
        return [self._free_slots.pop() for _ in range(SLOTS * self.has_state)]

    def release_slots(self, slots: Sequence[int]) -> None:
        self._free_slots += slots

    def take(
        self, count: int, *, n_seen: int | None = None, chunk: int | None = None
    ) -> np.ndarray:
        """`count` free rows, int32, each used once from now on. `n_seen`: only the last so many
        will be seen by a layer with a window; None: all. `chunk`: they are a lane's next ones, and
        written in chunks of at most so many."""
        assert count <= self.n_free, "runs are admitted by their entries, and cannot use more"
        rows = np.array(self._free[len(self._free) - count :][::-1], np.int32)
        del self._free[len(self._free) - count :]
        self._uses[rows] = 1
        for window in self.windows:
            seen = rows[0 if n_seen is None else max(0, count - n_seen) :]
            window.take(seen, window.ring(chunk))
        return rows

    def share(self, rows: np.ndarray) -> None:
        """Counts one more use of rows that are in use."""
        self._uses[rows] += 1

    def release(self, rows: np.ndarray) -> None:
        """Counts one use less; a row without any is free."""
        self._uses[rows] -= 1
        free = rows[self._uses[rows] == 0]
        self._free += free[::-1].tolist()
        for window in self.windows:
            window.release(free)

    def keep(self, sequences: Sequence[np.ndarray]) -> None:
        """Makes room in the pools of layers with a window: see `Window.keep`."""
        for window in self.windows:
            window.keep(sequences)

    def keeps(self, n_shared: int, n_new: int, n_written: int, chunk: int) -> bool:
        """Whether the first `n_shared` tokens of a lane can be continued after a pass in which it
        writes the last `n_new` of its `n_written`, in chunks of at most `chunk`."""
        rings = [window.ring(chunk) for window in self.windows]
        return all(
            n_new <= ring or n_shared - window.n_behind >= n_written - ring
            for ring, window in zip(rings, self.windows, strict=True)
        )

    def holds(self, rows: np.ndarray) -> bool:
        """Whether a sequence of rows can be continued: every layer still has what is seen."""
        return all(window.holds(rows) for window in self.windows)


class Table:
    """The pool rows of a lane, by position: those of its committed tokens. Where the model has
    states, also the slots of its own: the first has its state after these tokens."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._rows = np.zeros(0, np.int32)
        self._length = 0
        self._slots: list[int] = []
        self._n_in_state = 0
        self.is_closed = False

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> np.ndarray:
        """int32 [positions]; a view."""
        return self._rows[: self._length]

    @property
    def source(self) -> int:
        """The slot of its state; beyond all slots where it has none yet."""
        return self._slots[0] if self._slots and self._n_in_state else self._pool.n_slots

    @property
    def target(self) -> int:
        """The slot that the next forward pass writes its state to."""
        if self._pool.has_state and not self._slots:
            self._slots = self._pool.take_slots()
        return self._slots[1] if self._slots else self._pool.n_slots

    @property
    def can_go_on(self) -> bool:
        """Whether every layer still has what the next token sees."""
        is_whole = not self._pool.has_state or self._n_in_state == self._length
        return is_whole and self._pool.holds(self.rows)

    def append(self, rows: Sequence[int] | np.ndarray) -> None:
        """Adds rows that were taken or shared for this table."""
        length = self._length + len(rows)
        if length > len(self._rows):
            longer = np.zeros(max(length, 2 * len(self._rows), 64), np.int32)
            longer[: self._length] = self.rows
            self._rows = longer
        self._rows[self._length : length] = rows
        self._length = length

    def share(self, other: Table, count: int) -> None:
        """Adds the first rows of another table, which both then list."""
        rows = other.rows[:count].copy()
        self._pool.share(rows)
        self.append(rows)

    def become(self, other: Table) -> None:
        """Lists the rows of another table, which both then do, in place of its own."""
        count = min(len(self), len(other))
        differ = np.flatnonzero(self.rows[:count] != other.rows[:count])
        n_same = int(differ[0]) if len(differ) else count
        self.cut(n_same)
        rows = other.rows[n_same:].copy()
        self._pool.share(rows)
        self.append(rows)

    def commit(self, rows: Sequence[int] | np.ndarray) -> None:
        """Adds the rows of a forward pass, which has also written the state after them."""
        self.append(rows)
        self._slots.reverse()
        self._n_in_state = self._length

    def cut(self, length: int) -> None:
        """Releases the rows from position `length` on."""
        if length < self._length:
            rows, self._length = self._rows[length : self._length], length
            self._pool.release(rows.copy())
        if not length:
            self._n_in_state = 0

    def close(self) -> None:
        """Releases all rows; it is not used again."""
        self.cut(0)
        self._pool.release_slots(self._slots)
        self._slots, self.is_closed = [], True
