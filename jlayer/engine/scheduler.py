"""Many lanes in every forward pass: who rides in the next one, and what each gets from it.

There is no thread of its own: whoever waits for a step and finds nobody driving makes the next
pass, for all lanes that are there. Lanes join and leave between passes. A pass that fails changes
nothing: its error goes to who drove it, and the others drive on. What a pass gives is there at
once, for all that wait: entries, tokens and figures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jlayer.engine.batch import VECTOR, Entry, arrange, count_rows
from jlayer.engine.deciding import is_one_of_several
from jlayer.engine.drawing import Drawn, decide_all, draw_all
from jlayer.engine.fork import check_process
from jlayer.engine.home import Home
from jlayer.engine.lane import Lane
from jlayer.engine.logits import PassLogits
from jlayer.engine.prompt_room import PromptRoom
from jlayer.engine.report import Clock, Seconds
from jlayer.engine.riders import choose_riders, shared_before
from jlayer.engine.speculation import Speculation
from jlayer.errors import UsageError
from jlayer.interrupts import check, deferred

PATIENCE_S = 0.5  # signals are looked for at least so often by who waits for another thread


class _NobodyLeft(Exception):
    """All lanes of a pass have left."""


class Scheduler:
    """The lanes of a model that are continued."""

    def __init__(self, engine: Home, speculation: Speculation):
        self._engine, self._speculation = engine, speculation
        self._lanes: list[Lane] = []
        self._changed = threading.Condition()
        self._driver: int | None = None  # the thread that drives
        self._room = PromptRoom()
        self.n_passes = 0

    @property
    def lanes(self) -> list[Lane]:
        """Those that ride, and those that wait to be admitted; within a turn."""
        return [lane for lane in self._lanes if not lane.has_left]

    def join(self, lanes: Sequence[Lane]) -> None:
        """Adds lanes, from the next forward pass on. Suspended ones are there already."""
        check_process()
        with self._changed:
            kept = [lane for lane in self._lanes if not lane.has_left]
            known = set(map(id, kept))  # one that goes on after it gave its room to others is there
            self._lanes = kept + [lane for lane in lanes if id(lane) not in known]
            self._changed.notify_all()

    def prepare(self) -> dict[str, float]:
        """Begins to read, compiles the programs for the next pass and those after it, and fills the
        device. Returns what was moved, see `Totals.since`."""
        with self._engine.turn() as executor:
            before = replace(self._engine.totals)
            executor.read_early()
            plan, lanes = self._engine.plan, self._alive()
            share = self._speculation.prepare(lanes, plan)
            first = [
                _stand_in(
                    *(rider.end - rider.first, rider.lane.capacity, rider.after),
                    n_scored=len(rider.scored),
                    n_drawn=int(rider.lane.draws),
                    n_hidden=len(rider.pooled),
                    vectors=rider.vectors,
                )
                for rider in self._choose(lanes, plan)
            ]
            drawing = [lane for lane in lanes if lane.draws]
            later = [_stand_in(1 + share, lane.capacity, n_nodes=share) for lane in drawing]
            sweeper, parts = self._engine.sweeper, self._arrange(first)
            sweeper.compile(executor, parts)
            sweeper.compile(executor, self._arrange(later))
            if share and self._engine.caches.pool.has_state:
                # Guesses that were right ride once more, before the next ones.
                again = [_stand_in(1 + 2 * share, lane.capacity, n_nodes=share) for lane in drawing]
                sweeper.compile(executor, self._arrange(again))
            sweeper.fill(executor, parts)
            return self._engine.totals.since(before)

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
                        self._driver = None
                        self._changed.notify_all()
                if not has_ridden:
                    return

    def wait_until(
        self, is_done: Callable[[], bool], *, or_free: bool = False, timeout: float | None = None
    ) -> bool:
        """Waits while other threads drive. With `or_free` also until none does: then it is up to
        the caller to drive, and the result is True. Raises TimeoutError, and UsageError as
        `check_caller` does."""
        ends = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not is_done():
                self.check_caller()
                if or_free and self._driver is None:
                    self._driver = threading.get_ident()
                    return True
                if ends is not None and time.monotonic() >= ends:
                    raise TimeoutError
                left = PATIENCE_S if ends is None else min(PATIENCE_S, ends - time.monotonic())
                self._changed.wait(max(0.0, left))
                check()
            return False

    def check_caller(self) -> None:
        """Raises UsageError in a forked process, and inside a pass that this thread drives, such as
        in a function of a run: it would wait for itself, or change what the pass has planned."""
        check_process()
        if self._driver == threading.get_ident():
            raise UsageError(
                "a function that is called within a forward pass asks the same model for another "
                "one; open the model a second time for it"
            )

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
            lanes = [lane for lane in self._alive() if lane.is_hungry]
            for lane in lanes:
                lane.switch()
            riders = self._choose(lanes, engine.plan)
            if not riders:
                return False
            clock, before, speculation = Clock(), replace(engine.totals), self._speculation
            n_compiled = sum(engine.compiles.values())
            can_end_early = not is_one_of_several()  # else the others would wait for the rest

            def somebody_is_there():
                if can_end_early and all(rider.lane.has_left for rider in riders):
                    raise _NobodyLeft

            try:
                waited_for, shared = _waited_for(self._alive()), shared_before(riders)
                engine.caches.make_room([*waited_for, *shared])
                for rider in riders:
                    speculation.forget(rider.take_rows(engine.caches.pool, engine.plan.chunk))
                speculation.guess(riders, engine.plan)
                drafting_s = clock.lap()
                parts = self._arrange([rider.entry for rider in riders])
                logits = PassLogits(riders, engine.cfg.vocab_size, width=engine.cfg.hidden_size)
                how = {"take_hidden": logits.take_hidden, "check": somebody_is_there}
                engine.sweeper.run(executor, parts, logits.take, **how)
                sweep_s = clock.lap()
                drawn, commits = self._draw(executor, riders, logits, parts)
                engine.note_peaks()
                seconds = Seconds(drafting_s, sweep_s, clock.lap())
            except BaseException as error:
                for rider in riders:
                    rider.release(engine.caches.pool)
                if isinstance(error, _NobodyLeft):
                    return True
                raise
            moved = engine.totals.since(before)
            self._commit(riders, logits, drawn, commits, seconds, moved)
            speculation.learn(drawn, parts, seconds)
            for rider in riders:
                if rider.lane.keeper is not None:
                    rider.lane.keeper.after_pass(rider.lane)
            n_prompt_rows = sum(r.end - r.first for r in riders if r.end - r.first > 1)
            if n_compiled < sum(engine.compiles.values()):
                return True  # it took longer than the next one of its kind
            engine.helping.learn(engine.plan, n_rows=count_rows(parts), seconds=seconds.sweep)
            if n_prompt_rows < sum(r.n_rows for r in riders):
                self._room.learn(engine.plan, n_prompt_rows=n_prompt_rows, seconds=seconds.sweep)
            return True

    def _choose(self, lanes, plan):
        pool = self._engine.caches.pool
        return choose_riders(lanes, self._lanes, plan, pool, self._room.rows(plan))

    def _commit(self, riders, logits, drawn, commits, seconds, moved):
        """Gives the lanes their entries and tokens, between two looks of those that wait."""
        pool = self._engine.caches.pool
        with self._changed:
            for rider in riders:
                rider.lane.table.commit(rider.gained)
                logits.give(rider)
                rider.lane.last_pass = self.n_passes
            for one in drawn:
                self._accept(one, pool)
            for commit in commits:
                commit(pool)
            self.n_passes += 1
            n_rows = sum(rider.n_rows for rider in riders)
            for account in {id(r.lane.account): r.lane.account for r in riders}.values():
                account.count(seconds, moved, lanes=len(riders), rows=n_rows)

    def _accept(self, drawn, pool):
        """Gives a lane the tokens that it drew, and the entries of those that were guessed."""
        rider, lane = drawn.rider, drawn.rider.lane
        n_accepted = 0
        if lane.is_alive:  # it may have left meanwhile
            n_added = lane.add(drawn.choices) if drawn.choices else 0
            if drawn.error is not None and lane.is_alive:
                lane.fail(drawn.error)
            elif not lane.draws:
                lane.end()
            n_accepted = max(0, n_added - 1)  # the entry of the last one is still to come
            lane.account.guess(rider.n_drafted, len(rider.guessed), n_accepted)
        # A state has none of the guesses: those that were right ride once more, as the lane's own.
        accepted = [] if pool.has_state else drawn.nodes[:n_accepted]
        lane.table.append(rider.guessed[accepted])
        pool.release(np.delete(rider.guessed, accepted))

    def _arrange(self, entries):
        plan, pool = self._engine.plan, self._engine.caches.pool
        return arrange(
            entries,
            pool=pool.n_rows,
            most=plan.chunk,
            n_rows=plan.load.n_rows,
            windows=pool.windows,
            switches=self._engine.cfg.switches_at is not None,
            slots=pool.n_slots * pool.has_state,
        )

    def _draw(self, executor, riders, logits, parts):
        """Draws tokens for every lane whose tokens are all in; a lane that cannot draw, or whose
        prompt cannot be scored, fails alone. Changes nothing."""
        drawn, commits = _drawn(riders, logits)
        failed = [one for one in drawn if not one.is_finite]
        error = self._engine.sweeper.find_nonfinite(executor, parts) if failed else None
        drawn = [one if one.is_finite else replace(one, error=error) for one in drawn]
        return drawn, commits


def _drawn(riders, logits):
    drawn = [Drawn(r, [], [], is_finite=False) for r in riders if not logits.are_finite(r)]
    done = [rider for rider in riders if rider.is_complete and logits.are_finite(rider)]
    drawn += [Drawn(rider, [], []) for rider in done if not rider.n_drawn]
    pairs = [(rider, logits.of(rider)) for rider in done if rider.n_drawn]
    decided, commits = decide_all([pair for pair in pairs if pair[0].lane.joint is not None])
    drawn += decided + draw_all([pair for pair in pairs if pair[0].lane.joint is None])
    return drawn, commits


def _waited_for(lanes):
    """Of lanes that other sequences of one prompt will begin like: the rows of this prompt, which
    the memory of these sequences is planned by."""
    for lane in lanes:
        if not len(lane.table):
            siblings = [one for one in lanes if one.is_sibling(lane) and len(one.table)]
            yield from (one.table.rows[: one.n_prompt - 1] for one in siblings)


def _has_news(lanes):
    return any(lane.unread or lane.error for lane in lanes) or not any(
        lane.is_alive for lane in lanes
    )


def _stand_in(
    n_tokens, capacity, after=0, n_nodes=0, *, n_scored=0, n_drawn=1, n_hidden=0, vectors=None
):
    """An entry of the shape of a lane's next one, of whose tokens the last ones are guesses."""
    none, n_embedded = np.zeros(0, np.int32), 0 if vectors is None else len(vectors)
    tokens = [VECTOR] * n_embedded + [0] * (n_tokens - n_embedded)
    parents = range(-1, n_tokens - 1) if n_nodes else None
    new = np.zeros(n_tokens, np.int32)
    wanted = n_scored + n_drawn + n_nodes
    how = {"hidden": n_hidden, "vectors": vectors}
    return Entry(tokens, none, new, capacity, wanted, parents, after, **how)
