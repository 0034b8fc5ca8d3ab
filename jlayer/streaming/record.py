"""Records when each step of a sweep really began and ended, for a picture of it.

Reads end in reader threads; puts and runs are asynchronous, so of each device one thread waits for
the puts and another for the runs. None of this exists unless a recorder is attached.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import jax

from jlayer.plan.tiles import Tier, Tile
from jlayer.streaming.steps import Fetch, Free, Put, Read, Run

LANES = ("read", "put", "host", "run", "decide", "free")
DRAFT = "draft"  # a lane without tiles: guessing tokens, ahead of a sweep
KEPT_SWEEPS = 2


@dataclass(frozen=True)
class Span:
    """The work of a lane on a tile from `begin` to `end` (seconds of one clock); `tile` is None in
    the lane DRAFT, and in the lane "decide" the first of the experts whose choice was waited for.

    `row`: the number of the lane's worker, or of the device. `guessed`: the tile was put before its
    layer had decided which experts it uses.
    """

    lane: str
    tile: int | None
    begin: float
    end: float
    row: int = 0
    guessed: bool = False


@dataclass(frozen=True)
class Timeline:
    """The last sweeps of a run. `starts`: the begin of each. `end`: the end of the last."""

    tiles: tuple[Tile, ...]
    tiers: tuple[Tier, ...]
    spans: tuple[Span, ...]
    starts: tuple[float, ...]
    end: float

    def lane(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.lane == name]

    def busy(self, lane: str) -> float:
        """The share of the time from the first start to the end in which a lane was busy."""
        covered, last = 0.0, self.starts[0]
        for span in sorted(self.lane(lane), key=lambda span: span.begin):
            end = min(span.end, self.end)
            covered += max(0.0, end - max(span.begin, last))
            last = max(last, end)
        return covered / (self.end - self.starts[0])


@dataclass
class _Mark:
    """A step in progress, on one of the devices: when it was asked for, and the step (`after`) that
    it depends on."""

    tile: int
    asked: float
    after: _Mark | None = None
    ended: float = 0.0
    row: int | None = 0
    guessed: bool = False


@dataclass
class _Pending:
    """A tile between its read and its free: its latest marks, those of its put by device, and the
    pending waits for it by lane and device."""

    read: _Mark | None = None
    puts: dict[int, _Mark] = field(default_factory=dict)
    waits: dict[tuple[str, int], Future] = field(default_factory=dict)


class Recorder:
    """Records the steps of an executor inside the `with`; then call `timeline`."""

    def __init__(self, watch, tiles: Sequence[Tile], tiers: Sequence[Tier]):
        self._watch, self._tiles, self._tiers = watch, tuple(tiles), tuple(tiers)
        room = len(tiles) * (KEPT_SWEEPS + 1) * max(tile.n_devices for tile in tiles)
        self._marks = {lane: deque(maxlen=room) for lane in LANES}
        self._drafts = deque(maxlen=KEPT_SWEEPS + 1)
        self._starts = deque(maxlen=KEPT_SWEEPS)
        self._tile_states: dict[int, _Pending] = {}
        self._asked, self._last_run, self._end = 0.0, len(tiles), 0.0
        self._waiters: dict[tuple[str, int], ThreadPoolExecutor] = {}
        self._last_waits: dict[tuple[str, int], Future] = {}

    def __enter__(self):
        self._also = self._watch.also(self._on_step, self._on_taken, self._on_draft)
        self._also.__enter__()
        return self

    def __exit__(self, *_):
        self._also.__exit__(None, None, None)
        for waiter in self._waiters.values():
            waiter.shutdown()

    def _on_step(self, step, tile):
        self._asked = time.perf_counter()
        if isinstance(step, Run):
            if step.tile <= self._last_run:
                self._starts.append(self._asked)
            self._last_run = step.tile

    def _on_draft(self, begin, end):
        self._drafts.append(Span(DRAFT, None, begin, end))

    def _on_taken(self, step, result):
        if isinstance(step, Fetch):
            mark = _Mark(step.tile, self._asked, ended=time.perf_counter())
            self._marks["decide"].append(mark)
            return
        state = self._tile_states.setdefault(step.tile, _Pending())
        match step:
            case Read(tile):
                state.read = _Mark(tile, self._asked, row=None)
                result.add_done_callback(partial(self._note_read, state.read))
            case Put(tile):
                state.puts = {}
                for row, own in enumerate(_by_device(result)):
                    mark = _Mark(tile, self._asked, after=state.read, row=row, guessed=step.guessed)
                    state.puts[row] = mark
                    self._await("put", state, mark, own)
                state.read = None
            case Run(tile, "host"):
                mark = _Mark(tile, self._asked, after=state.read)
                result.add_done_callback(partial(self._note_host, mark))
                state.read = None
            case Run(tile, _, also):
                for row, own in enumerate(_by_device(result)):
                    for each in (tile, *also):
                        state = self._tile_states.setdefault(each, _Pending())
                        mark = _Mark(each, self._asked, after=state.puts.get(row), row=row)
                        self._await("run", state, mark, own)
            case Free(tile):
                # A waiter must not hold weights longer than the executor does.
                for wait in state.waits.values():
                    wait.result()
                self._end = time.perf_counter()
                self._marks["free"].append(_Mark(tile, self._asked, ended=self._end))
                del self._tile_states[step.tile]

    def _note_read(self, mark, future):
        """Called in the reader thread, or at once if the read had already ended."""
        mark.ended = time.perf_counter()
        worker = threading.current_thread().name.rpartition("_")[2]
        mark.row = int(worker) if worker.isdigit() else None
        self._marks["read"].append(mark)

    def _note_host(self, mark, future):
        """Called in the thread of the host's products."""
        mark.ended = self._end = time.perf_counter()
        self._marks["host"].append(mark)

    def _await(self, lane, state, mark, result):
        # A result that is ready (a put on a CPU always is) is noted here, unless an earlier one is
        # still waited for.
        who = lane, mark.row
        in_turn = who not in self._last_waits or self._last_waits[who].done()
        if in_turn and all(array.is_ready() for array in result):
            self._note_end(lane, mark, result)
            return
        if who not in self._waiters:
            prefix = f"jlayer-timeline-{lane}-{mark.row}"
            self._waiters[who] = ThreadPoolExecutor(1, thread_name_prefix=prefix)
        wait = self._waiters[who].submit(self._note_end, lane, mark, result)
        state.waits[who] = self._last_waits[who] = wait

    def _note_end(self, lane, mark, result):
        with suppress(jax.errors.JaxRuntimeError):  # the executor reports it
            jax.block_until_ready(result)
        mark.ended = time.perf_counter()
        self._marks[lane].append(mark)

    def timeline(self) -> Timeline | None:
        """The last sweeps, from the first run to the last free, or the last run where nothing is
        freed; None before the first sweep."""
        end = max((self._end, *(mark.ended for mark in self._marks["run"])))
        if not self._starts or end <= self._starts[0]:
            return None
        spans = [span for lane in LANES for span in _spans(lane, self._marks[lane])]
        spans += self._drafts
        inside = tuple(s for s in spans if s.end >= self._starts[0] and s.begin <= end)
        return Timeline(self._tiles, self._tiers, inside, tuple(self._starts), end)


def _by_device(result) -> list[list[jax.Array]]:
    """What each device has of some arrays, in the order of the devices."""
    leaves = jax.tree.leaves(result)
    # Of one device it may be a room, with its own ways to wait.
    if all(not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1 for leaf in leaves):
        return [leaves]
    found: dict[jax.Device, list[jax.Array]] = {}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            found.setdefault(shard.device, []).append(shard.data)
    return [found[device] for device in sorted(found, key=lambda device: device.id)]


def _spans(lane, marks):
    """The spans of a lane. A step begins once it is asked for, its dependency has ended, and its
    worker is free."""
    free_at = {0: 0.0, 1: 0.0} if lane == "read" else {0: 0.0}
    for mark in sorted(marks, key=lambda mark: mark.ended):
        row = min(free_at, key=free_at.get) if mark.row is None else mark.row
        needs = mark.after.ended if mark.after else 0.0
        begin = min(max(mark.asked, needs, free_at.get(row, 0.0)), mark.ended)
        free_at[row] = mark.ended
        yield Span(lane, mark.tile, begin, mark.ended, row, mark.guessed)
