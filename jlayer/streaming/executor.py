"""Carries out the schedule: where a token's path and a weight's path cross.

Knows tiles, slots and steps, and nothing of models or tokens. What a tile's weights are used for
comes from outside, as a function from (tile, arrays) to an output that can be waited for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import jax
import numpy as np

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.errors import JlayerError, StorageError
from jlayer.interrupts import check, deferred
from jlayer.plan.machine import PLATFORMS, platform_of
from jlayer.plan.tiles import Tier, Tile
from jlayer.spec import ALIGNMENT
from jlayer.streaming.direct import Reader, aligned_span, is_moved
from jlayer.streaming.place import VIEW_ALIGNMENT, place
from jlayer.streaming.schedule import Free, Put, Read, Run, sweeps
from jlayer.streaming.slots import HostMemory, raw_view, slot_bytes_for, split_room, view

PATIENCE_S = 1.0  # a tile that takes longer than this to read is worth a word
READERS = 2  # requests in flight: one alone leaves the disk idle between two of them


@dataclass
class Watch:
    """Who is told: `on_step` (step, tile) of every step before it is taken, `on_taken` (step, made)
    after it, with what it set going (a Read's Future, a Put's arrays, a Run's output, nothing for a
    Free), and `on_stall` (tile, seconds) while a read does not end. Outside the sweeps: `on_phase`
    (words) when a phase of opening begins, `on_compile` (label) before a program is compiled, and
    (None) after it."""

    on_step: Callable | None = None
    on_taken: Callable | None = None
    on_stall: Callable | None = None
    on_phase: Callable | None = None
    on_compile: Callable | None = None

    def phase(self, words: str):
        """A phase of opening begins: a safe point for signals."""
        check()
        if self.on_phase:
            self.on_phase(words)

    @contextmanager
    def compiling(self, label: str):
        """A program is compiled meanwhile."""
        if self.on_compile:
            self.on_compile(label)
        try:
            yield
        finally:
            if self.on_compile:
                self.on_compile(None)

    @contextmanager
    def also(self, on_step: Callable):
        """Tells `on_step` too, after whoever is told already, for as long as it is entered."""
        before = self.on_step

        def both(step, tile):
            before(step, tile)
            on_step(step, tile)

        self.on_step = both if before else on_step
        try:
            yield
        finally:
            self.on_step = before


@dataclass
class Totals:
    """What was moved so far; bytes in bytes, times in seconds.

    `bounced_bytes` were copied again in host memory to fix their alignment; `stall_s` is what the
    executor waited for weights; `most_live_*` are of passing weights on the device at one time.
    """

    read_bytes: int = 0
    put_bytes: int = 0
    bounced_bytes: int = 0
    sweeps: int = 0
    stall_s: float = 0.0
    most_live_tiles: int = 0
    most_live_bytes: int = 0

    def since(self, before: Totals) -> dict[str, float]:
        """What was added since `before`, of everything that adds up."""
        return {name: getattr(self, name) - getattr(before, name) for name in ADDED}


ADDED = ("read_bytes", "put_bytes", "bounced_bytes", "stall_s")


class Executor:
    """Streams a model's tiles onto `device`, sweep after sweep; `tiers` says what is kept where.

    `ring`: host slots; `ahead`: tiles on the device at a time beside those that stay there. What is
    read for the first time is checked against `checks`, in the reader's thread.
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
    ):
        self.tiles = tiles
        self.device = device
        self._has_link = PLATFORMS[platform_of(device.platform)].has_link
        self.totals, self._watch = totals, watch
        self._checks, self._checked = checks, set()
        checks.restart()
        self._tiers, self._ring, self._ahead = tiers, ring, ahead
        self._placed = [place(store, tile) for tile in tiles]
        self._sizes = [
            tile.joined.n_bytes if tile.joined else slot_bytes_for(segments)
            for tile, (segments, _) in zip(tiles, self._placed, strict=True)
        ]
        self._memory = HostMemory(ring, max(self._sizes), pin=self._has_link)
        files = {segment.file for segments, _ in self._placed for segment in segments}
        self._reader = Reader(files, store.identities)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="jlayer-reader")
        self._reads: dict[int, Future] = {}  # tile -> the read that is under way for it
        self._in_host: dict[int, object] = {}  # tile -> its arrays in a room of its own
        self._on_device: dict[int, object] = {}  # tile -> its arrays on the device
        self._passing: set[int] = set()  # those of them that do not stay
        self._outputs: dict[int, object] = {}  # passing tile -> the output of its run
        self._last_output = None
        self._lists = None  # what comes next; None: nothing is under way
        self._refusal: JlayerError | None = None

    def retier(self, tiers: tuple[Tier, ...]) -> None:
        """Keeps the same tiles in other places from the next sweep on. What stays in host memory in
        both is not read again."""
        self._abandon()
        for tile, tier in enumerate(tiers):
            if tier is not Tier.HOST:
                self._in_host.pop(tile, None)
                self._memory.drop_room(tile)
        self._tiers = tiers

    def refuse(self, error: JlayerError) -> None:
        """Makes a sweep that is under way in another thread end with this error at its next
        step."""
        self._refusal = error

    @property
    def host_bytes(self) -> int:
        """Host memory held for weights now."""
        return self._memory.n_bytes

    @property
    def reads_directly(self) -> bool:
        return self._reader.reads_directly

    def fill(self):
        """Starts reading ahead: what comes before the first sweep. Does nothing when already under
        way."""
        if self._lists is None:
            self._reader.resume()
            self._lists = sweeps(
                self._tiers, ring=self._ring, ahead=self._ahead, in_place=tuple(self._in_host)
            )
            with self._safely() as signals:
                self._interpret(next(self._lists), None, signals)

    def sweep(self, run: Callable[[Tile, object], object]):
        """One pass over all tiles in order. An error or an interrupt leaves nothing passing on the
        device and no read under way."""
        self.fill()
        with self._safely() as signals:
            self._interpret(next(self._lists), run, signals)
            self._reader.check_unchanged()
        self.totals.sweeps += 1

    def slot(self, number: int) -> np.ndarray:
        """Host memory of a slot, counted around the ring; only while nothing is under way."""
        assert self._lists is None
        return self._memory.slot(number % self._ring)

    def settle(self):
        """Waits for the reads that are under way: then the disk is idle until the next sweep."""
        wait(self._reads.values())

    @contextmanager
    def _safely(self):
        """Signals wait for the end of a step, the cyclic collector for the end of the sweep;
        whatever goes wrong, nothing is left under way."""
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
                raise StorageError(f"{name}: the device failed ({_first_line(error)})") from error

    def _tell(self, step, made):
        if self._watch.on_taken:
            self._watch.on_taken(step, made)

    def _take(self, step, run, signals):
        """Returns what the step set going, for whoever watches."""
        match step:
            case Read(tile, slot):
                self._reads[tile] = self._pool.submit(self._read, tile, slot)
                return self._reads[tile]
            case Put(tile, _):
                self._on_device[tile] = self._put(tile, signals)
                self._note_passing(tile)
                return self._on_device[tile]
            case Run(tile):
                self._last_output = run(self.tiles[tile], self._on_device[tile])
                if self._tiers[tile] is not Tier.DEVICE:
                    self._outputs[tile] = self._last_output
                return self._last_output
            case Free(tile, _, None):
                jax.block_until_ready(self._on_device[tile])
            case Free(tile, _, after):
                # The output's readiness, not the transfer's: on the CPU the slot is the weight.
                jax.block_until_ready(self._outputs.pop(after))
                del self._on_device[tile]
                self._passing.remove(tile)

    def _read(self, tile, slot):
        """In a reader's thread: fills a slot or the tile's own room, and returns what is to be put:
        views of its parts by leaf, or all of it as one array."""
        (segments, places), layout = self._placed[tile], self.tiles[tile].joined
        try:
            memory = (
                self._memory.room(tile, self._sizes[tile])
                if slot is None
                else self._memory.slot(slot)
            )
            pieces = split_room(memory, segments, layout and layout.offsets)
            shifts = [
                self._reader.read(segment, piece, _unit(layout))
                for segment, piece in zip(segments, pieces, strict=True)
            ]
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
        """Vectors are not looked at: they were when the model was opened."""
        for placed in places:
            part = placed.part
            if len(part.shape) > 1:
                raw = raw_view(pieces[placed.segment], shifts[placed.segment], placed)
                self._checks.add(part.tensor, raw, n_rows=part.shape[0], first_row=part.first_row)

    def _put(self, tile, signals):
        views = self._await_read(tile, signals) if tile in self._reads else self._in_host[tile]
        if self._tiers[tile] is Tier.HOST:
            self._in_host[tile] = views
        elif self._tiers[tile] is Tier.DEVICE and not self._has_link:
            views = {leaf: array.copy() for leaf, array in views.items()}  # the slot moves on
        self.totals.put_bytes += self.tiles[tile].n_bytes
        return jax.device_put(views, self.device)

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
        for read in self._reads.values():
            read.cancel() or read.exception()
        # What was dispatched may still use a slot; it must be over before a slot is written again.
        # If it failed, that is what is being reported already.
        with suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready((self._last_output, list(self._on_device.values())))
        self._reads.clear()
        self._on_device.clear()
        self._passing.clear()
        self._outputs.clear()
        self._last_output = None
        self._lists = None

    def close(self):
        """Stops the readers' threads and closes the files. The executor cannot be used
        afterwards."""
        if self._pool is None:
            return
        self._abandon()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._in_host.clear()
        self._memory.close()
        self._pool = None


def _unit(layout):
    """What a segment's place in a slot is to be a multiple of."""
    return ALIGNMENT if layout else VIEW_ALIGNMENT


def _first_line(error):
    return str(error).strip().splitlines()[0]
