"""Tiles on their way from disk to host memory, and those that stay there.

Reads go on in background threads. A tile goes to a slot of the ring, which others take after it; to
a room of its own, in which it stays; or to a room in which tiles take turns, and stays until the
next one is read there. A tile that is read for the first time is checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import MappingProxyType

import numpy as np

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.errors import JlayerError
from jlayer.plan.tiles import Tile
from jlayer.spec import ALIGNMENT
from jlayer.streaming.cached import PageCache
from jlayer.streaming.direct import Reader, aligned_span, is_moved, n_readers
from jlayer.streaming.place import VIEW_ALIGNMENT, place
from jlayer.streaming.slots import HostMemory, apart, raw_view, slot_bytes_for, split_room, view
from jlayer.streaming.steps import Slot
from jlayer.streaming.watch import Totals, Watch

PATIENCE_S = 1.0  # `on_stall` is called if a read is waited for longer than this


class Incoming:
    """The host's side of a stream of tiles: `ring` slots and the rooms, the reads into them, and
    what they hold. `expert_ring` slots more are for experts.

    `pin`: the memory is registered with the driver. `page_cache`: how it is used; what is read in
    every sweep is never left there. `repeats`, `again`: as of the executor.
    """

    def __init__(
        self,
        store: Store,
        tiles: tuple[Tile, ...],
        *,
        ring: int,
        expert_ring: int,
        pin: bool,
        checks: Checks,
        totals: Totals,
        watch: Watch,
        page_cache: PageCache,
        repeats: Mapping[int, int] = MappingProxyType({}),
        again: Mapping[int, int] = MappingProxyType({}),
    ):
        self.tiles, self._repeats = tiles, repeats
        self._again, self._kept_for = again, frozenset(again.values())
        self._passed: dict[int, object] = {}  # tile whose slot is kept -> its arrays there
        self._kept, self._read_once = frozenset(), frozenset()
        self._totals, self._watch = totals, watch
        self._checks, self._checked = checks, set()
        checks.restart()
        self._placed = [place(store, tile) for tile in tiles]
        self._sizes = [
            tile.room_bytes if tile.joined else slot_bytes_for(segments)
            for tile, (segments, _) in zip(tiles, self._placed, strict=True)
        ]
        self._ring = ring
        slots = [*self._slots(False, ring), *self._slots(True, expert_ring)]
        self._memory = HostMemory(slots, pin=pin)
        files = {segment.file for segments, _ in self._placed for segment in segments}
        self._reader = Reader(files, store.identities, page_cache=page_cache)
        self._pool = ThreadPoolExecutor(n_readers(), thread_name_prefix="jlayer-reader")
        self._reads: dict[int, Future] = {}  # tile -> its unfinished read
        self._cached_bytes: dict[int, int] = {}  # tile -> those of its read
        self._early: dict[int, Future] = {}  # the same, of reads that began early
        self._to_read_early: Iterator[int] = iter(())
        self._early_lock = threading.Lock()
        self._there: dict[int, object] = {}  # tile that stays -> its arrays in its room
        self._apart: dict[int, dict] = {}  # the same, as arrays by leaf, of those multiplied there
        self._slot_of: dict[int, Slot] = {}  # tile -> where it was read to
        self._tile_in: dict[Slot, int] = {}  # room that tiles take turns in -> which is there

    def _slots(self, of_experts, ring):
        """The bytes of each slot of a ring."""
        pairs = zip(self.tiles, self._sizes, strict=True)
        sizes = [size for tile, size in pairs if (tile.expert is not None) == of_experts]
        return [max(sizes)] * ring if sizes else []

    @property
    def n_bytes(self) -> int:
        """Bytes of host memory held for weights now."""
        return self._memory.n_bytes

    @property
    def reads_directly(self) -> bool:
        return self._reader.reads_directly

    @property
    def there(self) -> tuple[int, ...]:
        """The tiles that stay in host memory, as far as they were read."""
        return tuple(self._there)

    def slot(self, number: int) -> np.ndarray:
        """The memory of a slot, by number modulo the ring; only while nothing is read."""
        return self._memory.slot(number % self._ring)

    def read_early(self) -> None:
        """Starts reading what stays, until `end_early`: programs can be compiled meanwhile."""
        if self._early:
            return
        self._reader.resume()
        self._to_read_early = iter(sorted(self._kept - self._there.keys()))
        for _ in range(n_readers()):
            self._read_next()

    def _read_next(self, before: Future | None = None):
        """Starts the next early read, unless the one before it failed or there is none."""
        if before is not None and (before.cancelled() or before.exception()):
            return
        with self._early_lock:
            tile = next(self._to_read_early, None)
            if tile is None:
                return
            read = self._early[tile] = self._pool.submit(self.read_tile, tile, None)
        read.add_done_callback(self._read_next)

    def end_early(self) -> list[Future]:
        """Starts no more early reads; returns those that were not asked for yet."""
        with self._early_lock:
            self._to_read_early = iter(())
            return list(self._early.values())

    def begin(self) -> None:
        """Before the first read of a stream."""
        self._reader.resume()
        self.end_early()

    def read(self, tile: int, slot: Slot) -> Future:
        """Starts reading a tile."""
        self._slot_of[tile] = slot
        if isinstance(slot, tuple):
            self._there.pop(self._tile_in.get(slot), None)
            self._tile_in[slot] = tile
        self._reads[tile] = self._pool.submit(self._read, tile, slot)
        return self._reads[tile]

    def _read(self, tile, slot):
        """In a reader thread: `read_tile`, unless that began early."""
        early = self._early.pop(tile, None)
        return self.read_tile(tile, slot) if early is None else early.result()

    def read_tile(self, tile: int, slot: Slot):
        """In a reader thread: fills a slot or, if None, the tile's own room.

        Returns what to put: views of the parts by leaf, or one array for a joined tile.
        """
        (segments, places), whole = self._placed[tile], self.tiles[tile]
        layout = whole.joined
        try:
            memory = self._memory_for(tile, slot)
            pieces = split_room(memory, segments, layout and layout.all_offsets(whole.n_devices))
            fills = not isinstance(slot, int) or tile in self._read_once
            with self._reader.turn(fills=fills) as turn:
                shifts = [
                    self._reader.read(segment, piece, _unit(layout), turn)
                    for segment, piece in zip(segments, pieces, strict=True)
                ]
            self._cached_bytes[tile] = turn.cached_bytes
            # Each row is checked once: what comes again is not.
            if tile not in self._checked and tile not in self._repeats:
                self._check(pieces, shifts, places)
                self._checked.add(tile)
        except JlayerError as error:
            raise type(error)(f"{self.tiles[tile].name}: {error}") from None
        if layout:
            return memory[: whole.room_bytes].view(layout.dtype)
        return {
            placed.part.leaf: view(pieces[placed.segment], shifts[placed.segment], placed)
            for placed in places
        }

    def _memory_for(self, tile, slot):
        if slot is None:
            return self._memory.room(tile, self._sizes[tile])
        if isinstance(slot, int):
            return self._memory.slot(slot)
        # Tiles of equal shape take turns in it; how they lie on disk makes it some blocks more.
        slack = 2 * ALIGNMENT * len(self.tiles[tile].parts)
        return self._memory.room(slot, self.tiles[tile].room_bytes + slack)

    def _check(self, pieces, shifts, places):
        """Adds the rows of matrices to the checks, and a scale that is for all rows, which counts
        the first time; vectors were checked when the model was opened."""
        for placed in places:
            part = placed.part
            if len(part.shape) > 1 or part.is_for_all_rows:
                raw = raw_view(pieces[placed.segment], shifts[placed.segment], placed)
                self._checks.add(part.tensor, raw, n_rows=part.shape[0], first_row=part.first_row)

    def wait_for(self, tile: int, check: Callable[[], None]):
        """What is there of a tile, once it has been read. `check` is called while it is waited
        for."""
        if tile in self._again:
            return self._passed[self._again[tile]]
        if tile not in self._reads:
            return self._there[self._repeats.get(tile, tile)]
        views = self._await_read(tile, check)
        if tile in self._kept_for:
            self._passed[tile] = views
        if not isinstance(self._slot_of[tile], int):
            self._there[tile] = views
        return views

    def _await_read(self, tile, check):
        read = self._reads[tile]
        if not read.done():
            began = time.perf_counter()
            while not wait([read], timeout=PATIENCE_S).done:
                check()
                if self._watch.on_stall:
                    self._watch.on_stall(self.tiles[tile], time.perf_counter() - began)
            self._totals.stall_s += time.perf_counter() - began
        del self._reads[tile]
        views, totals = read.result(), self._totals
        (segments, _), unit = self._placed[tile], _unit(self.tiles[tile].joined)
        totals.read_bytes += sum(aligned_span(each.stored)[1] for each in segments)
        totals.cached_bytes += self._cached_bytes.pop(tile)
        totals.bounced_bytes += sum(each.n_bytes for each in segments if is_moved(each, unit))
        return views

    def by_leaf(self, tile: int, check: Callable[[], None]) -> dict[str, np.ndarray]:
        """The arrays of a tile by leaf, as they lie in host memory."""
        views = self.wait_for(tile, check)
        if not self.stays(tile):
            return apart(self.tiles[tile], views)
        if tile not in self._apart:
            self._apart[tile] = apart(self.tiles[tile], views)
        return self._apart[tile]

    def stays(self, tile: int) -> bool:
        """Whether a tile that was read is in a room of its own."""
        return tile in self._kept

    def keep(self, kept: Iterable[int], *, read_once: Iterable[int]) -> None:
        """Changes which tiles stay here; the rooms of others are released. `read_once`: those that
        stay on the device."""
        kept = frozenset(kept)
        for tile in self._kept - kept:
            self._there.pop(tile, None)
            self._apart.pop(tile, None)
            self._memory.drop_room(tile)
        self._kept, self._read_once = kept, frozenset(read_once)

    def drop_rooms(self, rooms: Iterable[Slot]) -> None:
        """Releases rooms in which tiles take turns."""
        for room in rooms:
            self._there.pop(self._tile_in.pop(room, None), None)
            self._memory.drop_room(room)

    def settle(self) -> None:
        """Waits for the reads in progress: the disk is then idle until the next ones."""
        wait(self._reads.values())

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def stop(self) -> None:
        """Gives up all reads."""
        self._reader.stop()
        for read in [*self._reads.values(), *self.end_early()]:
            read.cancel() or read.exception()
        self._early.clear()
        self._reads.clear()

    def close(self) -> None:
        """Stops the threads, closes the files and releases the memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._there.clear()
        self._apart.clear()
        self._tile_in.clear()
        self._memory.close()


def _unit(layout):
    """The alignment of a segment in a slot."""
    return ALIGNMENT if layout else VIEW_ALIGNMENT
