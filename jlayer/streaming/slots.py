"""Host memory for weights: a ring of slots that are reused, and a room of its own for each tile
that stays. This is the one unsafe class.

A view of a slot that was given to JAX may be the live weight itself: on the CPU an aligned array is
aliased, not copied; on an accelerator the transfer reads it in the background. So wait for the run
that used a slot before writing to it again. The schedule does that; nothing here checks it.
"""

from __future__ import annotations

import mmap
from collections.abc import Hashable, Sequence
from itertools import accumulate

import jax
import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from jlayer.checkpoint.store import Segment
from jlayer.plan.tiles import Tile
from jlayer.spec import ALIGNMENT
from jlayer.streaming.direct import aligned_span
from jlayer.streaming.driver import Driver
from jlayer.streaming.place import Placement

_HUGE_PAGE = 2 << 20


def slot_bytes_for(segments: tuple[Segment, ...]) -> int:
    """Bytes of the slot for these segments, each with the disk blocks around it."""
    return sum(aligned_span(segment)[1] for segment in segments)


class HostMemory:
    """Slots of `slot_bytes`, one number for each, and rooms. Each is allocated, touched and pinned
    when it is first asked for, by the thread that will read into it: others read meanwhile, and
    what is never used costs nothing.

    `pin` registers all memory with the CUDA driver, so that transfers run in the background, at
    the full speed of the link and without a copy.
    """

    def __init__(self, slot_bytes: Sequence[int], *, pin: bool):
        self._driver = Driver() if pin else None
        self._slot_bytes = tuple(-(-n_bytes // ALIGNMENT) * ALIGNMENT for n_bytes in slot_bytes)
        self._slots: dict[int, np.ndarray] = {}
        self._rooms: dict[Hashable, np.ndarray] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all slots and rooms that were made."""
        made = [*self._slots.values(), *self._rooms.values()]
        return sum(each.nbytes for each in made)

    def slot(self, number: int) -> np.ndarray:
        """A slot of the ring. One thread at a time may ask for the same one, or room."""
        if number not in self._slots:
            self._slots[number] = self._allocate(self._slot_bytes[number])
        return self._slots[number]

    def room(self, key: Hashable, n_bytes: int) -> np.ndarray:
        """The memory of what stays in host memory, a tile by its number, allocated on the first
        call."""
        if key not in self._rooms:
            self._rooms[key] = self._allocate(-(-n_bytes // ALIGNMENT) * ALIGNMENT)
        return self._rooms[key]

    def drop_room(self, key: Hashable) -> None:
        """Releases a room, if it is there."""
        room = self._rooms.pop(key, None)
        if room is not None and self._driver:
            self._driver.unregister(room)

    def _allocate(self, n_bytes):
        memory = mmap.mmap(-1, max(n_bytes, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if n_bytes >= _HUGE_PAGE:
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(memory, np.uint8)
        # Touch every page now: the first write to a fresh page is ten times slower.
        whole[:: mmap.PAGESIZE] = 0
        if self._driver:
            self._driver.register(whole)
        return whole

    def fetch(self, array: jax.Array, into: np.ndarray) -> None:
        """Copies an array of the device to pinned memory of the same bytes."""
        self._driver.fetch(array, into)

    def close(self):
        """Unpins all memory. It is released with its last view."""
        if self._driver:
            self._driver.close()


def split_room(
    memory: np.ndarray, segments: tuple[Segment, ...], offsets: tuple[int, ...] | None = None
) -> list[np.ndarray]:
    """Splits a slot or room into memory for each segment: at `offsets`, or one after another."""
    lengths = [aligned_span(segment)[1] for segment in segments]
    offsets = offsets or list(accumulate(lengths, initial=0))[:-1]
    return [memory[at : at + n] for at, n in zip(offsets, lengths, strict=True)]


def raw_view(piece: np.ndarray, shift: int, place: Placement) -> np.ndarray:
    """The bytes of a part, as a view of the piece that its segment was read into.

    `shift`: the offset in the piece at which the segment begins.
    """
    begin = shift + place.offset
    return piece[begin : begin + place.part.n_bytes]


def view(piece: np.ndarray, shift: int, place: Placement) -> np.ndarray:
    """The array of a part, as a view like `raw_view`."""
    raw = raw_view(piece, shift, place)
    return raw.view(np.dtype(place.part.dtype)).reshape(place.part.shape)


def apart(tile: Tile, views) -> dict[str, np.ndarray]:
    """The arrays of a tile by leaf, from what was read of it: these, or one array if the tile is
    joined."""
    if not tile.joined:
        return views
    raw = views.view(np.uint8)
    return {
        part.leaf: raw[at : at + part.n_bytes].view(np.dtype(part.dtype)).reshape(part.shape)
        for part, at in zip(tile.parts, tile.joined.offsets, strict=True)
    }
