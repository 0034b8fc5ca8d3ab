"""Memory of the device in which tiles of one shape take turns, filled by the driver.

JAX makes new arrays for what it puts, in memory that is free once all programs called so far have
run: so its copies wait for these programs, and 40 us pass from one copy to the next. Here an array
is written again, and the driver copies without a pause, beside whatever runs: 0.98 of the link for
copies of 9 MB, where JAX reaches 0.81 (H100, PCIe 5).

The host waits for nothing of that: copies wait on the device for the program that used a room, and
programs for the copies, both by what DLPack says of streams. Unsafe as host slots are: JAX takes an
array to be immutable. So programs get a room's arrays from `arrays_of`, and are told of by `ran`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import jax
import numpy as np

BY_JAX = 0  # the number of what JAX itself put: its programs wait for it
KEPT_RUNS = 4  # outputs that are kept to wait for; an earlier run has ended when a later one has


class Copies(Protocol):
    """The part of `driver.Driver` that fills rooms, in order."""

    def event(self): ...
    def begin(self, addresses: Sequence[int], arrays: Sequence[np.ndarray], event) -> None: ...
    def after(self, array: jax.Array) -> None: ...
    def have_stream_wait(self, stream: int, event) -> None: ...
    def wait(self, event) -> None: ...
    def has_come(self, event) -> bool: ...
    def close(self) -> None: ...


class Room:
    """Arrays of the device, one or by leaf. Can be waited for as an array can."""

    def __init__(self, key, arrays, copies: Copies, event):
        self.key, self.arrays, self.event = key, arrays, event
        self.last_run = 0  # the number of the run that used it last
        self.number = BY_JAX  # of what it holds, among all that the driver has copied
        self._copies, self._addresses = copies, None

    def fill(self, arrays: Sequence[np.ndarray], number: int) -> None:
        """Begins to copy pinned arrays over what it holds."""
        if self._addresses is None:
            leaves = jax.tree.leaves(self.arrays)
            self._addresses = [leaf.unsafe_buffer_pointer() for leaf in leaves]
        self._copies.begin(self._addresses, arrays, self.event)
        self.number = number

    def arriving(self):
        """Its arrays for a program that is to wait for what is copied there, and to all rooms
        before: of one of them JAX is told that it is there when that is."""
        if isinstance(self.arrays, jax.Array):
            return jax.dlpack.from_dlpack(_Arriving(self.arrays, self._copies, self.event))
        first = next(iter(self.arrays))
        arriving = _Arriving(self.arrays[first], self._copies, self.event)
        return self.arrays | {first: jax.dlpack.from_dlpack(arriving)}

    def block_until_ready(self) -> None:
        """Returns once all of it is there."""
        if self.number == BY_JAX:
            jax.block_until_ready(self.arrays)
        else:
            self._copies.wait(self.event)

    def is_ready(self) -> bool:
        if self.number == BY_JAX:
            return all(leaf.is_ready() for leaf in jax.tree.leaves(self.arrays))
        return self._copies.has_come(self.event)


class _Arriving:
    """An array, exported by the protocol of DLPack; who takes it waits for an event."""

    def __init__(self, array: jax.Array, copies: Copies, event):
        self._array, self._copies, self._event = array, copies, event

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **how):
        if stream is None:
            self._copies.wait(self._event)
        else:
            self._copies.have_stream_wait(stream, self._event)
        return self._array.__dlpack__(**how)


class Rooms:
    """All rooms of a device. `put` makes arrays of the device from such of the host: the first that
    come to a room."""

    def __init__(self, put, copies: Copies):
        self._put, self._copies = put, copies
        self._free: dict[tuple, deque[Room]] = defaultdict(deque)
        self._events: list = []  # of rooms that were released
        self._n_begun, self._n_there = 0, 0  # copies of the driver, as far as is known
        self._n_runs, self._n_ended = 0, 0  # the same of runs
        self._runs: deque[tuple[int, jax.Array]] = deque(
            maxlen=KEPT_RUNS
        )  # and the last output of each

    def fill(self, views) -> Room:
        """Begins to copy pinned arrays, by leaf or one, to the room that is free for the longest,
        or to a new one."""
        leaves, key = _shape_of(views)
        if not self._free[key]:
            event = self._events.pop() if self._events else self._copies.event()
            return Room(key, self._put(views), self._copies, event)
        room = self._free[key].popleft()
        if room.last_run > self._n_ended:
            later = (output for number, output in self._runs if number >= room.last_run)
            self._copies.after(next(later))
        self._n_begun += 1
        room.fill(leaves, self._n_begun)
        return room

    def arrays_of(self, rooms: Sequence[Room]) -> list:
        """The arrays of some rooms, for a program that is called now."""
        arrays = [room.arrays for room in rooms]
        place, last = max(enumerate(rooms), key=lambda pair: pair[1].number)
        if last.number > self._n_there:  # those of lower numbers are there before it
            if last.is_ready():
                self._n_there = last.number
            else:
                arrays[place] = last.arriving()
        return arrays

    def ran(self, rooms: Sequence[Room], outputs) -> None:
        """Programs were called that read these rooms, one for each chunk that uses them, and give
        these outputs."""
        given = jax.tree.leaves(outputs)
        if not given:
            return
        self._n_runs += 1
        self._runs.append((self._n_runs, given[-1]))
        for room in rooms:
            room.last_run = self._n_runs

    def note_end(self) -> None:
        """All programs that were called so far have run."""
        self._n_ended = self._n_runs
        self._runs.clear()

    def give_back(self, room: Room) -> None:
        """No program that is called from now on reads what is in the room."""
        self._free[room.key].append(room)

    def clear(self, used: Iterable[Room]) -> None:
        """Releases all memory, that of the rooms in use too, once nothing is copied there. No
        program may be running."""
        self.note_end()
        for room in (*used, *(room for free in self._free.values() for room in free)):
            room.block_until_ready()
            self._events.append(room.event)
        self._free.clear()

    def close(self) -> None:
        """After `clear`."""
        self._copies.close()


def _shape_of(views):
    """(the arrays, what tells apart arrays of one shape from those of others)."""
    if isinstance(views, np.ndarray):
        return (views,), (views.shape, views.dtype)
    leaves, structure = jax.tree.flatten(views)
    return leaves, (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
