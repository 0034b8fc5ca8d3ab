"""Many lanes in every forward pass: who rides in the next one, and what each gets from it.

There is no thread of its own: whoever waits for a step and finds nobody driving makes the next
pass, for all lanes that are there. Lanes join and leave between passes. A pass that fails changes
nothing: its error goes to who drove it, and the others drive on. What a pass gives is there at
once, for all that wait: entries, tokens and figures.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from jlayer.engine.batch import Entry, Wanted, arrange
from jlayer.engine.fork import check_process
from jlayer.engine.home import Home
from jlayer.engine.lane import Lane
from jlayer.engine.report import Clock
from jlayer.engine.sample import Choice
from jlayer.errors import JlayerError
from jlayer.interrupts import check, deferred
from jlayer.plan.memory import DRAWERS
from jlayer.plan.shapes import pack

# Lanes that begin alike share the entries of so many tokens or more.
LEAST_SHARED = 16
PATIENCE_S = 0.5  # signals are looked for at least so often by who waits for another thread


@dataclass
class Rider:
    """A lane in a forward pass: the tokens `first` to `end` of its history are its rows. The
    entries before are its own and, from the end of its table on, those of `source`, whose rows run
    `after` so many others."""

    lane: Lane
    first: int
    end: int
    source: Rider | None = None
    after: int = 0
    own: np.ndarray | None = None  # the pool rows of its rows
    shared: np.ndarray | None = None  # those that it lists of its source's

    @property
    def is_complete(self) -> bool:
        return self.end == len(self.lane.history)

    @property
    def gained(self) -> np.ndarray:
        """The pool rows that its table gains."""
        return np.concatenate([self.shared, self.own])


class _NobodyLeft(Exception):
    """All lanes of a pass have left."""


class Scheduler:
    """The lanes of a model that are continued."""

    def __init__(self, engine: Home):
        self._engine = engine
        self._lanes: list[Lane] = []
        self._changed = threading.Condition()
        self._is_driven = False
        self.n_passes = 0

    def join(self, lanes: Sequence[Lane]) -> None:
        """Adds lanes, from the next forward pass on."""
        check_process()
        with self._changed:
            self._lanes = [lane for lane in self._lanes if not lane.has_left] + list(lanes)
            self._changed.notify_all()

    def prepare(self) -> None:
        """Compiles the programs for the next pass and those after it, and begins to read."""
        with self._engine.turn() as executor:
            first = [
                _stand_in(rider.end - rider.first, rider.lane.capacity, rider.after)
                for rider in self._choose(self._alive())
            ]
            later = [_stand_in(1, lane.capacity) for lane in self._alive()]
            parts = self._arrange(first) + self._arrange(later)
            shapes = [(part.size, part.n_wanted) for part in parts]
            self._engine.sweeper.compile(executor, shapes)
            executor.fill()

    def advance(self, lanes: Sequence[Lane], *, once: bool = False) -> None:
        """Waits until one of the lanes has a step that was not read or an error, or all have ended;
        drives forward passes where no other thread does. Returns too where no lane could ride, and
        with `once` after the next pass, whomever it carries. Raises what a pass raises."""
        n_before = self.n_passes
        self.drive_until(lambda: _has_news(lanes) or (once and self.n_passes > n_before))

    def drive_until(self, is_done: Callable[[], bool]) -> None:
        """Drives forward passes, or waits for those of another thread, until this is so, or until
        no lane can ride. Raises what a pass raises."""
        check_process()
        with deferred():  # a signal between two lines here would leave it driven, by nobody
            while self.wait_until(is_done, or_free=True):
                try:
                    has_ridden = self._pass()
                finally:
                    with self._changed:
                        self._is_driven = False
                        self._changed.notify_all()
                if not has_ridden:
                    return

    def wait_until(
        self, is_done: Callable[[], bool], *, or_free: bool = False, timeout: float | None = None
    ) -> bool:
        """Waits while other threads drive. With `or_free` also until none does: then it is up to
        the caller to drive, and the result is True. Raises TimeoutError."""
        ends = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not is_done():
                if or_free and not self._is_driven:
                    self._is_driven = True
                    return True
                if ends is not None and time.monotonic() >= ends:
                    raise TimeoutError
                left = PATIENCE_S if ends is None else min(PATIENCE_S, ends - time.monotonic())
                self._changed.wait(max(0.0, left))
                check()
            return False

    def notify(self) -> None:
        """Wakes those that wait, to look again."""
        with self._changed:
            self._changed.notify_all()

    def _alive(self):
        return [lane for lane in self._lanes if lane.is_alive and lane.table is not None]

    def _pass(self) -> bool:
        """One forward pass; False where no lane can ride."""
        engine = self._engine
        with engine.turn() as executor:
            riders = self._choose([lane for lane in self._alive() if lane.is_hungry])
            if not riders:
                return False
            clock, before = Clock(), replace(engine.totals)
            parts = self._board(riders)
            logits = np.empty(
                (sum(rider.is_complete for rider in riders), engine.cfg.vocab_size), np.float32
            )

            def take(output, places, row):
                logits[places, row : row + output.shape[1]] = output

            def somebody_is_there():
                if all(rider.lane.has_left for rider in riders):
                    raise _NobodyLeft

            try:
                engine.sweeper.run(executor, parts, take, check=somebody_is_there)
                drawn = self._draw(executor, riders, logits, parts)
            except BaseException as error:
                for rider in riders:
                    engine.caches.pool.release(rider.gained)
                if isinstance(error, _NobodyLeft):
                    return True
                raise
            engine.note_peaks()
            self._commit(riders, drawn, clock.lap(), engine.totals.since(before))
            return True

    def _commit(self, riders, drawn, seconds, moved):
        """Gives the lanes their entries and tokens, between two looks of those that wait."""
        with self._changed:
            for rider in riders:
                rider.lane.table.append(rider.gained)
                rider.lane.last_pass = self.n_passes
            for lane, choice in drawn:
                if not lane.is_alive:  # it has left meanwhile
                    continue
                if isinstance(choice, JlayerError):
                    lane.fail(choice)
                else:
                    lane.add(choice)
            self.n_passes += 1
            n_rows = sum(rider.end - rider.first for rider in riders)
            for account in {id(r.lane.account): r.lane.account for r in riders}.values():
                account.count(seconds, moved, lanes=len(riders), rows=n_rows)

    def _choose(self, lanes) -> list[Rider]:
        """Who rides in the next pass, and with how many tokens.

        Next tokens come first, of lanes that have waited longest. Beside them prompts fill the rest
        of a chunk, or half of one if that is more.
        """
        plan, riders = self._engine.plan, []
        lanes = sorted(lanes, key=lambda lane: lane.last_pass)
        lengths: dict[int, list[int]] = {0: []}  # by what must be written before

        def fits(n_tokens, after=0):
            more = lengths | {after: [*lengths.get(after, ()), n_tokens]}
            panes = [pane for some in more.values() for pane in pack(some, plan.chunk, shared=0)]
            return not riders or sum(pane.n_rows for pane in panes) <= plan.load.n_rows

        for lane in [lane for lane in lanes if lane.n_pending == 1]:
            if not fits(1):
                break
            lengths[0].append(1)
            riders.append(Rider(lane, len(lane.history) - 1, len(lane.history)))
        room = max(plan.chunk - len(riders), plan.chunk // 2) if riders else plan.load.n_rows
        for lane in [lane for lane in lanes if lane.n_pending > 1]:
            rider = self._with_source(lane, riders)
            if rider is None:
                continue
            n_tokens = min(rider.end - rider.first, room)
            while n_tokens > 1 and not fits(n_tokens, rider.after):
                n_tokens //= 2
            if n_tokens < 1 or not fits(n_tokens, rider.after):
                break
            rider.end = rider.first + n_tokens
            lengths.setdefault(rider.after, []).append(n_tokens)
            riders.append(rider)
            room -= n_tokens
        return riders

    def _with_source(self, lane, riders) -> Rider | None:
        """The rider of a lane whose prompt is not done. A lane without entries takes those of
        another that begins alike, be they there or on their way in this pass. None: it waits for
        one that is still on its way through what they share.

        Sequences of one prompt share among themselves first: their memory is planned so."""
        end = len(lane.history)
        best = Rider(lane, len(lane.table), end)
        if len(lane.table):
            return best
        known = {id(rider.lane): rider for rider in riders}
        others = [
            known.get(id(other)) or Rider(other, len(other.table), len(other.table))
            for other in self._lanes
            if other is not lane and other.table is not None and not other.table.is_closed
        ]
        others = [rider for rider in others if rider.end]
        n_promised = 0
        for rider in [r for r in others if r.lane.is_sibling(lane)] or others:
            other = rider.lane
            n_alike = _n_alike(lane.history, other.history, min(end - 1, len(other.history)))
            n_shared = min(n_alike, rider.end)
            if other.is_alive and other.is_hungry and other.n_pending > 1:
                n_promised = max(n_promised, n_alike)
            if n_shared >= max(LEAST_SHARED, best.first + 1):
                # Its first entries may be of this pass too: what it lists of its own source.
                after = rider.after + (n_shared > rider.first)
                best = Rider(lane, n_shared, end, source=rider, after=after)
        return best if best.first >= n_promised else None

    def _board(self, riders):
        """Takes pool rows for the riders, and arranges them in chunks."""
        pool, entries = self._engine.caches.pool, []
        for rider in riders:
            lane = rider.lane
            rider.shared = np.zeros(0, np.int32)
            if rider.source is not None:
                source = rider.source
                there = source.lane.table.rows
                if source.own is not None:
                    there = np.concatenate([there, source.gained])
                rider.shared = there[: rider.first].copy()
                pool.share(rider.shared)
            rider.own = pool.take(rider.end - rider.first)
            entries.append(
                Entry(
                    lane.history[rider.first : rider.end],
                    np.concatenate([lane.table.rows, rider.shared]),
                    rider.own,
                    lane.capacity,
                    Wanted.LAST if rider.is_complete else Wanted.NONE,
                    after=rider.after,
                )
            )
        return self._arrange(entries)

    def _arrange(self, entries):
        plan, pool = self._engine.plan, self._engine.caches.pool.n_rows
        return arrange(entries, pool=pool, most=plan.chunk, n_rows=plan.load.n_rows)

    def _draw(self, executor, riders, logits, parts):
        """Draws a token for every lane whose tokens are all in -> (lane, its token or error) for
        each: a lane that cannot draw fails alone. Changes nothing."""
        complete = [rider.lane for rider in riders if rider.is_complete]
        finite = [bool(np.isfinite(row).all()) for row in logits]
        pairs, failed = [], []
        for lane, row, is_finite in zip(complete, logits, finite, strict=True):
            if is_finite:
                pairs.append((lane, row))
            else:
                failed.append(lane)
        error = self._engine.sweeper.find_nonfinite(executor, parts) if failed else None
        return [
            *zip([lane for lane, _ in pairs], choose_all(pairs), strict=True),
            *((lane, error) for lane in failed),
        ]


def choose_all(pairs: Sequence[tuple[Lane, np.ndarray]]) -> list[Choice | JlayerError]:
    """The next token of each lane from its logits [V], or the error that tells why it has none.

    Several are drawn at a time: numpy lets go of the interpreter for most of it.
    """

    def choose(pair):
        lane, logits = pair
        try:
            return lane.choose(logits)
        except JlayerError as error:
            return error

    if len(pairs) < 2:
        return [choose(pair) for pair in pairs]
    n_threads = min(DRAWERS, len(os.sched_getaffinity(0)), len(pairs))
    with ThreadPoolExecutor(n_threads, thread_name_prefix="jlayer-draw") as drawers:
        return list(drawers.map(choose, pairs))


def _has_news(lanes):
    return any(lane.unread or lane.error for lane in lanes) or not any(
        lane.is_alive for lane in lanes
    )


def _stand_in(n_tokens, capacity, after=0):
    """An entry of the shape of a lane's next one."""
    none = np.zeros(0, np.int32)
    return Entry([0] * n_tokens, none, np.zeros(n_tokens, np.int32), capacity, after=after)


def _n_alike(one, other, most):
    """How many of the first `most` tokens are equal; 0 where it is fewer than LEAST_SHARED."""
    if most < LEAST_SHARED or one[:LEAST_SHARED] != other[:LEAST_SHARED]:
        return 0
    low, high = LEAST_SHARED, most
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
