"""Where the paths cross: interprets the schedule. Knows slots, tiles and steps; nothing of models,
tokens or tiers.

What a tile's weights are used for comes from outside, as a function from (tile, arrays) to an
output that can be waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax

from jlayer.errors import JlayerError
from jlayer.run.interrupts import Deferred
from jlayer.weights.direct import Reader
from jlayer.weights.schedule import Free, Put, Read, Run, next_phase, prologue, sweep
from jlayer.weights.slots import HostSlots, slot_bytes_for
from jlayer.weights.store import Store, Tile

PATIENCE_S = 1.0  # a tile that takes longer than this to read is worth a word


@dataclass
class Totals:
    """What an executor did so far; `most_live_*` are of weights on the device at one time."""

    read_bytes: int = 0
    put_bytes: int = 0
    sweeps: int = 0
    stall_s: float = 0.0
    most_live_tiles: int = 0
    most_live_bytes: int = 0


class Executor:
    """Streams `tiles` of `store` through `n_slots` host slots onto `device`, sweep after sweep."""

    def __init__(self, store: Store, tiles: tuple[Tile, ...], *, n_slots: int, device: jax.Device):
        self.tiles = tiles
        self.device = device
        self._totals = Totals()
        self.on_step: Callable | None = None  # told of every step before it is taken
        self.on_stall: Callable | None = None  # told (tile, seconds) while a read does not end
        self._placed = [store.place(tile) for tile in tiles]
        self._n_slots = n_slots
        self._slots = HostSlots(
            n_slots, max(slot_bytes_for(segments) for segments, _ in self._placed)
        )
        self._reader = Reader(
            {segment.file for segments, _ in self._placed for segment in segments}
        )
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jlayer-reader")
        self._reads: dict[int, Future] = {}  # slot -> what it is being filled with
        self._live: dict[int, dict[str, jax.Array]] = {}  # slot -> its tile's arrays on the device
        self._output = None
        self._phase: int | None = None  # None: nothing is under way

    @property
    def host_slot_bytes(self) -> int:
        return self._n_slots * self._slots.slot_bytes

    def totals(self) -> Totals:
        """What was read, put and waited for since the start."""
        return replace(self._totals, read_bytes=self._reader.read_bytes)

    @property
    def reads_directly(self) -> bool:
        return self._reader.reads_directly

    def fill(self):
        """Starts reading ahead: what comes before the first sweep. Does nothing when already under
        way."""
        if self._phase is None:
            self._reader.resume()
            self._phase = 0
            with self._safely() as signals:
                self._interpret(prologue(len(self.tiles), self._n_slots), None, signals)

    def sweep(self, run: Callable[[Tile, dict[str, jax.Array]], object]):
        """One pass over all tiles in order. An error or an interrupt leaves nothing on the device
        and no read under way."""
        self.fill()
        with self._safely() as signals:
            self._interpret(sweep(len(self.tiles), self._n_slots, self._phase), run, signals)
        self._phase = next_phase(len(self.tiles), self._n_slots, self._phase)
        self._totals.sweeps += 1

    @contextmanager
    def _safely(self):
        """Signals wait for the end of a step; whatever goes wrong, nothing is left under way."""
        with Deferred() as signals:
            try:
                yield signals
            except BaseException:
                self._abandon()
                raise

    def _interpret(self, steps, run, signals):
        for step in steps:
            signals.check()
            if self.on_step:
                self.on_step(step, self.tiles[step.tile])
            match step:
                case Read(tile, slot):
                    self._reads[slot] = self._pool.submit(self._read, tile, slot)
                case Put(_, slot):
                    self._live[slot] = self._put(self._await_read(tile, slot, signals))
                    self._note_live()
                case Run(tile, slot):
                    self._output = run(self.tiles[tile], self._live[slot])
                case Free(_, slot):
                    # The output's readiness, not the transfer's: on the CPU the slot is the weight.
                    jax.block_until_ready(self._output)
                    del self._live[slot]

    def _read(self, tile, slot):
        """In the reader's thread: fills a slot, returns views of its parts by leaf."""
        segments, places = self._placed[tile]
        rooms = self._slots.room(slot, segments)
        try:
            shifts = [
                self._reader.read(segment, room)
                for segment, room in zip(segments, rooms, strict=True)
            ]
        except JlayerError as error:
            raise type(error)(f"{self.tiles[tile].name}: {error}") from None
        return {
            place.part.leaf: self._slots.view(rooms[place.segment], shifts[place.segment], place)
            for place in places
        }

    def _await_read(self, tile, slot, signals):
        read = self._reads[slot]
        if not read.done():
            began = time.perf_counter()
            while not wait([read], timeout=PATIENCE_S).done:
                signals.check()
                if self.on_stall:
                    self.on_stall(self.tiles[tile], time.perf_counter() - began)
            self._totals.stall_s += time.perf_counter() - began
        del self._reads[slot]
        return read.result()

    def _put(self, views):
        self._totals.put_bytes += sum(view.nbytes for view in views.values())
        return {leaf: jax.device_put(view, self.device) for leaf, view in views.items()}

    def _note_live(self):
        totals = self._totals
        totals.most_live_tiles = max(totals.most_live_tiles, len(self._live))
        n_bytes = sum(array.nbytes for arrays in self._live.values() for array in arrays.values())
        totals.most_live_bytes = max(totals.most_live_bytes, n_bytes)

    def _abandon(self):
        self._reader.stop()
        for read in self._reads.values():
            read.cancel() or read.exception()
        # What was dispatched may still use a slot; it must be over before a slot is written again.
        jax.block_until_ready((self._output, list(self._live.values())))
        self._reads.clear()
        self._live.clear()
        self._output = None
        self._phase = None

    def close(self):
        """Stops the reader's thread and closes the files. The executor cannot be used
        afterwards."""
        if self._pool is None:
            return
        self._abandon()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._pool = None
