"""Guesses what the lanes of a forward pass will draw, so that one pass may give many tokens.

Each lane gets a tree of guesses below its last token: from a draft model, from what followed the
same words before, or from both. The noise that the lane will draw with is known, and used. A guess
is accepted if it equals the draw, so no token depends on what was guessed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from jlayer.drafting.lookup import ALONE, WITH_DRAFT, Index
from jlayer.drafting.tree import Tree
from jlayer.drafting.width import Patience
from jlayer.engine.batch import Part
from jlayer.engine.draft import DraftModel
from jlayer.engine.drawing import Drawn
from jlayer.engine.growing import Grower
from jlayer.engine.home import Home
from jlayer.engine.lane import Lane
from jlayer.engine.options import SamplingOptions
from jlayer.engine.report import Seconds
from jlayer.engine.riders import Rider
from jlayer.engine.seats import Seat
from jlayer.engine.widths import Widths, pass_rows, shares
from jlayer.pieces import DELTA_BLOCK
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import CHUNK_ROWS, chunks, power_of_two

OTHERS_TOKENS = 1 << 16  # of other answers that are kept
# Guesses of a tree, where nobody says how many: more than this adds little, and costs memory.
MOST_NODES = {"draft": 255, "lookup": 63}
# Without a draft model: a run that takes less time than this would not make up for compiling
# programs for more rows.
WORTH_S = 20.0


class Speculation:
    """The guesses for a model's forward passes, and what is learnt from how they turn out.

    `others`: answers that were given, to look up. `own_texts`: by lane what stands in its text.
    """

    def __init__(self, engine: Home, draft: DraftModel | None):
        self._engine = engine
        self.own_texts: WeakKeyDictionary = (
            WeakKeyDictionary()
        )  # lane -> (index, tokens in it, trust)
        self._patience: WeakKeyDictionary = WeakKeyDictionary()  # lane -> Patience
        self._seats: list[Seat] = []
        self.take_draft(draft)

    def take_draft(self, draft: DraftModel | None) -> None:
        """From now on this one guesses, and what was learnt of another is forgotten; no run may be
        alive."""
        self._draft = draft
        self._widths = Widths(self._engine.sweeper.programs)
        self.grower = Grower(self._engine.cfg.vocab_size, draft, self._widths)
        self.forget_answers()

    def forget_answers(self) -> None:
        """Drops the answers that were given: guesses are of a text's own words from now on."""
        trust = ALONE if self._draft is None else WITH_DRAFT
        self.others = Index(trust.others_order, OTHERS_TOKENS)

    def forget(self, rows: np.ndarray) -> None:
        """These pool rows have been taken for new tokens."""
        if self._draft is not None:
            self._draft.forget(rows)

    # Ahead of a run.

    def nodes_for(self, options: SamplingOptions, *, batch: int, sweeps: int) -> int:
        """The most guesses in a forward pass that a run of so many lanes asks room for."""
        drafts = self._draft is not None
        if options.speculate == "off" or options.searches or sweeps < 2:
            return 0
        most = options.draft_tokens
        if most is None:
            # Unasked for, and it would not make up for compiling its programs.
            unasked = options.speculate == "auto" and not drafts
            if unasked and sweeps * self._engine.plan.decode_seconds < WORTH_S:
                return 0
            most = MOST_NODES["draft" if drafts and options.speculate != "lookup" else "lookup"]
            most = min(most, CHUNK_ROWS[-1] // power_of_two(batch) - 1)
        return batch * max(0, most)

    def prepare(self, lanes: Sequence[Lane], plan: Plan) -> int:
        """Measures what the width of trees depends on, and compiles the draft model's programs.
        -> about how many guesses each of these lanes will have."""
        lanes = [lane for lane in lanes if _may_guess(lane)]
        if not lanes or not plan.load.nodes:
            return 0
        self._widths.prepare(plan)
        share = self._widths.usual(lanes, plan, drafts=self._draft is not None)
        drafting = [lane for lane in lanes if self._drafts(lane)]
        if drafting:
            most = plan.load.nodes // len(lanes)
            self.grower.prepare(drafting, plan, self._engine.caches.pool.n_rows, most)
        return share

    # Ahead of a forward pass.

    def guess(self, riders: Sequence[Rider], plan: Plan) -> None:
        """Gives riders their guesses, and takes pool rows for them. Raises StorageError."""
        self._seats = []
        if not plan.load.nodes:
            return
        wanted = [rider for rider in riders if rider.is_complete and self._is_worth(rider.lane)]
        if not wanted:
            return
        self._widths.prepare(plan)
        began, pool = time.perf_counter(), self._engine.caches.pool
        shared = self._shares(wanted, riders, plan)
        self._seats = [self._seat(rider, count) for rider, count in shared if count]
        if not self._seats:
            return
        try:
            with self._engine.watch.drafting():
                self.grower.grow(self._seats, plan, pool)
                self._settle(riders, plan, time.perf_counter() - began)
        finally:
            for seat in self._seats:
                seat.release(pool)

    def _is_worth(self, lane):
        if not _may_guess(lane):
            return False
        return lane.options.draft_tokens is not None or self._patience_of(lane).ready()

    def _patience_of(self, lane):
        return self._patience.setdefault(lane, Patience())

    def _shares(self, wanted, riders, plan) -> list[tuple[Rider, int]]:
        """Equal shares of the rows that are left."""
        free = min(self._engine.caches.pool.n_free_everywhere, plan.load.nodes)

        def fits(share):
            counts = {id(rider): share for rider in wanted}
            return share * len(wanted) <= free and (
                pass_rows(riders, counts, plan) <= plan.load.n_rows
            )

        share = max(filter(fits, shares(plan.load.nodes // len(wanted))))
        if self._engine.caches.pool.has_state:  # a tree is one block, whatever stands before it
            wanted = [rider for rider in wanted if rider.end - rider.first <= DELTA_BLOCK]
        return [(rider, _within_chunk(rider, share, plan.chunk)) for rider in wanted]

    def _seat(self, rider, most):
        lane, mode = rider.lane, rider.lane.options.speculate
        looks_up = mode in ("auto", "lookup")
        drafts = self._drafts(lane)
        return Seat(
            rider,
            Tree(most),
            self._index(lane, WITH_DRAFT if drafts else ALONE) if looks_up else None,
            self.others if looks_up else None,
            np.concatenate([lane.table.rows, rider.gained]),
            deepest=lane.deepest,
            drafts=drafts,
        )

    def _drafts(self, lane):
        """Whether the draft model guesses for it."""
        if self._draft is None or len(lane.history) >= self._draft.context_limit:
            return False
        if lane.n_embedded:  # it reads ids
            return False
        return lane.options.speculate in ("auto", "draft")

    def _index(self, lane, trust):
        """What stands in the lane's text, up to now."""
        index, length, before = self.own_texts.get(lane) or (None, 0, None)
        if trust is not before:  # a draft model's context may end before that of the model
            index, length = Index(trust.own_order), 0
        index.append(lane.history[max(length, lane.n_embedded) :])
        self.own_texts[lane] = (index, len(lane.history), trust)
        return index

    def _settle(self, riders, plan, drafting_s):
        """Chooses how many guesses ride, and gives them to the riders with their pool rows."""
        pool = self._engine.caches.pool
        count = self._widths.best(self._seats, riders, plan, drafting_s)
        riding = [(seat, seat.tree.best(min(count, seat.tree.most))) for seat in self._seats]
        for seat, guesses in riding:
            seat.keep(guesses, pool)
        for seat, guesses in riding:
            if guesses.tokens:
                new = pool.take(seat.n_missing(guesses))
                self.forget(new)
                seat.give(guesses, new)

    # After it.

    @property
    def sharpness(self) -> float | None:
        """See `Grower`."""
        return self.grower.sharpness

    def learn(self, drawn: Sequence[Drawn], parts: Sequence[Part], seconds: Seconds) -> None:
        """Takes note of a pass: what was drawn, and how long it took."""
        by_rider = {id(one.rider): one for one in drawn}
        for seat in self._seats:
            one, rides = by_rider.get(id(seat.rider)), seat.rider.guesses is not None
            if one is not None and one.choices:
                self._patience_of(seat.lane).note(paid=rides and bool(one.nodes))
                if rides:
                    self.grower.learn(seat, one)
        self._seats = []
        for one in drawn:
            if one.rider.lane.finish_reason is not None:
                self.others.append(one.rider.lane.token_ids)
                self.others.end_text()
        n_rows = sum(part.size.rows for part in parts)
        n_real = sum(len(part.real) for part in parts)
        self._widths.saw(n_rows, n_real, self._engine.plan, seconds.sweep)


def _may_guess(lane):
    """Whether guesses could help the lane: it goes on after its next token."""
    return lane.joint is None and lane.options.speculate != "off" and lane.deepest > 0


def _within_chunk(rider, share, chunk):
    """As many guesses as have room behind the rider's tokens in the last chunk of them: a tree is
    never split."""
    asked = rider.lane.options.draft_tokens
    share = share if asked is None else min(share, asked)
    n_tokens = rider.end - rider.first
    while share > 0:
        n_rows = n_tokens + share
        if n_rows <= chunk or n_rows - sum(chunks(n_rows, chunk)[:-1]) >= share:
            return share
        share //= 2
    return 0
