"""Executes the schedule: here the path of a token and the path of a weight cross.

Handles tiles, slots and steps, not models or tokens. The caller passes a function that uses a
tile's weights: (tile, arrays) -> an output that can be waited for. Another one has the host's cores
multiply a tile where it lies, in the background.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Protocol

import jax
import numpy as np

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.errors import JlayerError, StorageError
from jlayer.interrupts import deferred
from jlayer.plan.machine import PLATFORMS, platform_of
from jlayer.plan.tiles import Tier, Tile
from jlayer.spec import ALIGNMENT
from jlayer.streaming.cached import PageCache
from jlayer.streaming.direct import Reader, aligned_span, is_moved, n_readers
from jlayer.streaming.place import VIEW_ALIGNMENT, place
from jlayer.streaming.putting import putter
from jlayer.streaming.schedule import Free, Put, PutCache, Read, Run, Take, sweeps
from jlayer.streaming.slots import HostMemory, apart, raw_view, slot_bytes_for, split_room, view
from jlayer.streaming.watch import Totals, Watch

PATIENCE_S = 1.0  # `on_stall` is called if the executor waits longer than this for a read


class CachesOnHost(Protocol):
    """Caches in host memory, by layer."""

    def put(self, layer: int) -> int:
        """Begins to put a layer's cache on the device; returns its bytes."""

    def take(self, layer: int) -> None:
        """Begins to bring back what was written to it, and drops it from the device."""


class Waitable(Protocol):
    """What the host's cores are at."""

    def wait(self) -> None:
        """Returns once the tile is multiplied, and its memory is not read any more."""

    def leave(self) -> None:
        """The same for a pass that is given up: it need not be multiplied."""


class Executor:
    """Streams a model's tiles to `device`, sweep after sweep.

    `tiers`: where each tile is kept. `ring`: number of host slots. `ahead`: tiles on the device at
    a time besides those that stay there. `attending`: see `schedule.sweeps`. A tile that is read
    for the first time is checked against `checks`, in a reader thread. `page_cache`: how it is
    used; what is read in every sweep is never left there.
    """

    def __init__(
        self,
        store: Store,
        tiles: tuple[Tile, ...],
        tiers: tuple[Tier, ...],
        *,
        ring: int,
        ahead: int,
        device: jax.Device,
        totals: Totals,
        watch: Watch,
        checks: Checks,
        attending: tuple[int, ...] = (),
        page_cache: PageCache = PageCache.TAKE,
    ):
        self.tiles = tiles
        self.device = device
        self._has_link = PLATFORMS[platform_of(device.platform)].has_link
        self._put_on_device = putter(device, has_link=self._has_link)
        self.totals, self._watch = totals, watch
        self._checks, self._checked = checks, set()
        checks.restart()
        self._tiers, self._ring, self._ahead = tiers, ring, ahead
        self._attending, self._caches = attending, None
        self._placed = [place(store, tile) for tile in tiles]
        self._sizes = [
            tile.joined.n_bytes if tile.joined else slot_bytes_for(segments)
            for tile, (segments, _) in zip(tiles, self._placed, strict=True)
        ]
        self._memory = HostMemory(ring, max(self._sizes), pin=self._has_link)
        files = {segment.file for segments, _ in self._placed for segment in segments}
        self._reader = Reader(files, store.identities, page_cache=page_cache)
        self._pool = ThreadPoolExecutor(n_readers(), thread_name_prefix="jlayer-reader")
        self._reads: dict[int, Future] = {}  # tile -> its unfinished read
        self._cached_bytes: dict[int, int] = {}  # tile -> those of its read
        self._early: dict[int, Future] = {}  # the same, of reads that began before `fill`
        self._to_read_early: Iterator[int] = iter(())
        self._early_lock = threading.Lock()
        self._in_host: dict[int, object] = {}  # tile of the host tier -> its arrays in its room
        self._apart: dict[int, dict] = {}  # the same, as arrays by leaf, of tiles multiplied there
        self._on_device: dict[int, object] = {}  # tile -> its arrays on the device
        self._passing: set[int] = set()  # the tiles on the device that do not stay
        self._outputs: dict[int, object] = {}  # passing tile -> the output of its run
        self._hosted: frozenset[int] = frozenset()  # the tiles that the host's cores multiply
        self._multiplying: list[Waitable] = []  # of this sweep
        self._last_output = None
        self._lists = None  # the next lists of steps; None: no read or put is in progress
        self._refusal: JlayerError | None = None

    def retier(self, tiers: tuple[Tier, ...], attending: tuple[int, ...] = ()) -> None:
        """Changes the tiers of the tiles, and where caches are, from the next sweep on.

        A tile of the host tier that stays there is not read again.
        """
        self._abandon()
        for tile, tier in enumerate(tiers):
            if tier is not Tier.HOST:
                self._in_host.pop(tile, None)
                self._apart.pop(tile, None)
                self._memory.drop_room(tile)
        self._tiers, self._attending = tiers, attending

    def refuse(self, error: JlayerError) -> None:
        """Makes a sweep in another thread fail with this error at its next step."""
        self._refusal = error

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held for weights now."""
        return self._memory.n_bytes

    @property
    def reads_directly(self) -> bool:
        return self._reader.reads_directly

    def read_early(self) -> None:
        """Starts reading what will stay in host memory, until `fill`: nothing is put on the device
        yet, so programs can be compiled meanwhile."""
        if self._lists is not None or self._early:
            return
        self._reader.resume()
        self._to_read_early = iter(
            [
                tile
                for tile, tier in enumerate(self._tiers)
                if tier is Tier.HOST and tile not in self._in_host
            ]
        )
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

    def _end_early(self):
        """Starts no more early reads; returns those that were not asked for yet."""
        with self._early_lock:
            self._to_read_early = iter(())
            return list(self._early.values())

    def fill(self, hosted: frozenset[int] = frozenset()):
        """Starts the reads and puts that come before the first sweep, unless already started.
        `hosted`: see `sweep`."""
        if hosted != self._hosted:
            if self._lists is not None:
                self._abandon()
            self._hosted = hosted
        if self._lists is None:
            self._reader.resume()
            self._end_early()
            self._lists = sweeps(
                self._tiers,
                ring=self._ring,
                ahead=self._ahead,
                in_place=tuple(self._in_host),
                attending=self._attending,
                hosted=self._hosted,
            )
            with self._safely() as signals:
                self._interpret(next(self._lists), None, signals)

    def sweep(
        self,
        run: Callable[[Tile, object], object],
        caches: CachesOnHost | None = None,
        *,
        multiply: Callable[[Tile, dict, bool], Waitable] | None = None,
        hosted: frozenset[int] = frozenset(),
    ):
        """One sweep: a forward pass over all tiles in order; `run` uses each. `caches`: those that
        are in host memory, for the steps that move them; without it they stay there. `hosted`: the
        tiles that `multiply` (tile, arrays by leaf, whether they stay there) uses instead, as they
        lie in host memory.

        After an error or an interrupt no read is in progress and no tile is on the device.
        """
        self.fill(hosted)
        self._caches, self._multiply = caches, multiply
        self._multiplying.clear()
        with self._safely() as signals:
            self._interpret(next(self._lists), run, signals)
            self._reader.check_unchanged()
        self.totals.sweeps += 1

    def slot(self, number: int) -> np.ndarray:
        """The memory of a host slot, by number modulo the ring; only before `fill`."""
        assert self._lists is None
        return self._memory.slot(number % self._ring)

    def settle(self):
        """Waits for the reads in progress: the disk is then idle until the next sweep."""
        wait(self._reads.values())

    @contextmanager
    def _safely(self):
        """Defers signals to the end of a step and cyclic garbage collection to the end of the
        sweep; after an error, abandons all work in progress."""
        collects = gc.isenabled()
        gc.disable()
        try:
            with deferred() as signals:
                try:
                    yield signals
                except BaseException:
                    self._abandon()
                    raise
        finally:
            if collects:
                gc.enable()

    def _interpret(self, steps, run, signals):
        for step in steps:
            signals.check()
            self._check_refusal()
            if self._watch.on_step:
                self._watch.on_step(step, self.tiles[step.tile])
            try:
                self._tell(step, self._take(step, run, signals))
            except jax.errors.JaxRuntimeError as error:
                name = self.tiles[step.tile].name
                raise StorageError(f"{name}: the device failed ({first_line(error)})") from error

    def _tell(self, step, result):
        if self._watch.on_taken:
            self._watch.on_taken(step, result)

    def _take(self, step, run, signals):
        """Executes a step; returns its result for `Watch.on_taken`."""
        match step:
            case Read(tile, slot):
                self._reads[tile] = self._pool.submit(self._read, tile, slot)
                return self._reads[tile]
            case Put(tile, _):
                self._on_device[tile] = self._put(tile, signals)
                self._note_passing(tile)
                return self._on_device[tile]
            case Run(tile, "host"):
                self._outputs[tile] = self._run_on_host(tile, signals)
                return self._outputs[tile]
            case Run(tile):
                self._last_output = run(self.tiles[tile], self._on_device[tile])
                if self._tiers[tile] is not Tier.DEVICE:
                    self._outputs[tile] = self._last_output
                return self._last_output
            case PutCache(tile):
                if self._caches is not None:
                    self.totals.put_bytes += self._caches.put(self.tiles[tile].layer)
            case Take(tile):
                if self._caches is not None:
                    self._caches.take(self.tiles[tile].layer)
            case Free(tile, _, None):
                jax.block_until_ready(self._on_device[tile])
            case Free(tile, _, after):
                # Wait for the output, not the transfer: on the CPU the slot itself is the weight.
                output = self._outputs.pop(after)
                if tile in self._hosted:
                    output.wait()
                    return
                jax.block_until_ready(output)
                del self._on_device[tile]
                self._passing.remove(tile)

    def _read(self, tile, slot):
        """In a reader thread: `read_tile`, unless that began early."""
        early = self._early.pop(tile, None)
        return self.read_tile(tile, slot) if early is None else early.result()

    def read_tile(self, tile, slot):
        """In a reader thread: fills a slot or, if None, the tile's own room.

        Returns what to put: views of the parts by leaf, or one array of bytes for a joined tile.
        """
        (segments, places), layout = self._placed[tile], self.tiles[tile].joined
        try:
            memory = (
                self._memory.room(tile, self._sizes[tile])
                if slot is None
                else self._memory.slot(slot)
            )
            pieces = split_room(memory, segments, layout and layout.offsets)
            with self._reader.turn(fills=self._tiers[tile] is not Tier.DISK) as turn:
                shifts = [
                    self._reader.read(segment, piece, _unit(layout), turn)
                    for segment, piece in zip(segments, pieces, strict=True)
                ]
            self._cached_bytes[tile] = turn.cached_bytes
            if tile not in self._checked:
                self._check(pieces, shifts, places)
                self._checked.add(tile)
        except JlayerError as error:
            raise type(error)(f"{self.tiles[tile].name}: {error}") from None
        if layout:
            return memory[: layout.n_bytes]
        return {
            placed.part.leaf: view(pieces[placed.segment], shifts[placed.segment], placed)
            for placed in places
        }

    def _check(self, pieces, shifts, places):
        """Adds the rows of matrices to the checks; vectors were checked when the model was
        opened."""
        for placed in places:
            part = placed.part
            if len(part.shape) > 1:
                raw = raw_view(pieces[placed.segment], shifts[placed.segment], placed)
                self._checks.add(part.tensor, raw, n_rows=part.shape[0], first_row=part.first_row)

    def _on_host(self, tile, signals):
        """What is there of a tile in host memory, once it has been read."""
        views = self._await_read(tile, signals) if tile in self._reads else self._in_host[tile]
        if self._tiers[tile] is Tier.HOST:
            self._in_host[tile] = views
        return views

    def _run_on_host(self, tile, signals):
        views = self._on_host(tile, signals)
        self.totals.host_product_bytes += self.tiles[tile].n_bytes
        is_kept = self._tiers[tile] is Tier.HOST
        if not is_kept:
            found = apart(self.tiles[tile], views)
        elif tile not in self._apart:
            found = self._apart[tile] = apart(self.tiles[tile], views)
        else:
            found = self._apart[tile]
        result = self._multiply(self.tiles[tile], found, is_kept)
        self._multiplying.append(result)
        return result

    def _put(self, tile, signals):
        views = self._on_host(tile, signals)
        if self._tiers[tile] is Tier.DEVICE and not self._has_link:
            # Without a link the arrays would be views of the slot, which is written again.
            views = {leaf: array.copy() for leaf, array in views.items()}
        self.totals.put_bytes += self.tiles[tile].n_bytes
        return self._put_on_device(views)

    def _await_read(self, tile, signals):
        read = self._reads[tile]
        if not read.done():
            began = time.perf_counter()
            while not wait([read], timeout=PATIENCE_S).done:
                signals.check()
                self._check_refusal()
                if self._watch.on_stall:
                    self._watch.on_stall(self.tiles[tile], time.perf_counter() - began)
            self.totals.stall_s += time.perf_counter() - began
        del self._reads[tile]
        views = read.result()
        (segments, _), unit = self._placed[tile], _unit(self.tiles[tile].joined)
        self.totals.read_bytes += sum(aligned_span(each)[1] for each in segments)
        self.totals.cached_bytes += self._cached_bytes.pop(tile)
        self.totals.bounced_bytes += sum(each.n_bytes for each in segments if is_moved(each, unit))
        return views

    def _note_passing(self, tile):
        if self._tiers[tile] is Tier.DEVICE:
            return
        self._passing.add(tile)
        totals = self.totals
        totals.most_live_tiles = max(totals.most_live_tiles, len(self._passing))
        n_bytes = sum(self.tiles[each].n_bytes for each in self._passing)
        totals.most_live_bytes = max(totals.most_live_bytes, n_bytes)

    def _check_refusal(self):
        if self._refusal is not None:
            raise self._refusal

    def _abandon(self):
        self._reader.stop()
        for read in [*self._reads.values(), *self._end_early()]:
            read.cancel() or read.exception()
        self._early.clear()
        # Dispatched runs may still use a slot: wait before a slot is written again. Their failure
        # is already being reported.
        for result in self._multiplying:
            result.leave()
        self._multiplying.clear()
        with suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready((self._last_output, list(self._on_device.values())))
        self._reads.clear()
        self._on_device.clear()
        self._passing.clear()
        self._outputs.clear()
        self._last_output = None
        self._lists = None

    def close(self):
        """Stops the reader threads and closes the files. The executor cannot be used afterwards."""
        if self._pool is None:
            return
        self._abandon()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._in_host.clear()
        self._apart.clear()
        self._memory.close()
        self._pool = None


def _unit(layout):
    """The alignment of a segment in a slot."""
    return ALIGNMENT if layout else VIEW_ALIGNMENT


def first_line(error: Exception) -> str:
    """What an error of the device says, without its details."""
    return str(error).strip().splitlines()[0]
