"""The beams of a prompt as lanes: their logits become the scores of a search, and what it keeps
becomes the lanes' texts and cache entries.

A beam that goes on from another lists the same rows of the pool: nothing is copied. Where a model
has a state, which cannot be listed twice, such a beam's tokens ride once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jlayer.engine.beams import Search, check_penalty
from jlayer.engine.functions import Functions
from jlayer.engine.joint import Commit, Joint
from jlayer.engine.lane import Constraint, Lane
from jlayer.engine.pool import Pool
from jlayer.engine.sample import (
    Choice,
    NoiseKey,
    check_choosable,
    chosen,
    log_softmax,
    noise,
    warped,
)
from jlayer.engine.stops import StopStrings


@dataclass(frozen=True)
class _State:
    """What is known of a beam besides its tokens: these as choices, and where it stands within stop
    strings and a constraint."""

    choices: tuple[Choice, ...]
    stops: StopStrings | None
    constraint: Constraint | None


class Beams(Joint):
    """The search of a prompt. `stops`: tells of stop strings, in the text or all of it.
    `functions`: the user's, which see the beams of one prompt at a time; `number`: the prompt's.
    `told`: of each token the (logits, scores) [beams, V], where they are wanted. Raises UsageError
    where the length penalty is beyond float32."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        stops: StopStrings | None = None,
        *,
        functions: Functions | None = None,
        number: int = 0,
    ):
        super().__init__(lanes)
        self._functions, self._number = functions or Functions(), number
        self.told: list[tuple[np.ndarray, np.ndarray]] = []
        first = self.lanes[0]
        self.options, self.row, self.limit = first.options, first.row, first.limit
        check_penalty(self.options, self.limit)
        self.search = Search.of(len(lanes), _State((), stops, first.constraint))
        self._is_new = True

    def sleeps(self, lane: Lane) -> bool:
        """All but the first one until there is a first token: until then all are alike."""
        return self._is_new and lane is not self.lanes[0]

    def decided(self, logits: Mapping[int, np.ndarray]) -> Commit:
        running = self.search.running
        rows = [logits[0 if self._is_new else number] for number in range(len(running))]
        scores, told = self._scores(rows), self.told
        if self.options.keeps_scores or self.options.keeps_logits:
            told = [*told, (np.stack(rows), scores)]
        search = self.search.advanced(
            scores,
            options=self.options,
            limit=self.limit,
            grow=partial(self._grow, rows, told),
            noise=None if self.options.is_greedy else self._noise(scores),
        )
        return partial(self._commit, search, told)

    def _scores(self, rows):
        """float32 [beams, V]: log-probabilities after the options that act on them."""
        options, n_before = self.options, self.row.width
        n_before += len(self.search.running[0].tokens)
        found = [
            self.lanes[0].scores_of(log_softmax(logits), beam.tokens, beam.state.constraint)
            for logits, beam in zip(rows, self.search.running, strict=True)
        ]
        if self._functions.processors or self._functions.allowed:
            ids = self._ids(self.search.running)
            every = range(len(found))
            found = self._functions.scores(ids, np.stack(found), [self._number] * len(found), every)
        check_choosable(np.maximum.reduce(found), position=n_before)
        if not options.is_greedy:
            least = max(2, len(options.eos_token_id) + 1)
            found = [warped(scores, options=options, least=least) for scores in found]
        if options.renormalize_logits:
            found = [log_softmax(scores) for scores in found]
        return np.stack(found)

    def _noise(self, scores):
        """Each beam's own, of what can be drawn."""
        length = self.row.width + len(self.search.running[0].tokens)
        found = np.zeros(scores.shape)
        for number, row in enumerate(scores):
            ids = np.flatnonzero(row > -np.inf)
            if len(ids):
                key = NoiseKey(self.options.seed, number, length - self.row.padding.n_tokens)
                found[number, ids] = noise(ids, key)
        return found

    def _ids(self, beams):
        """int64 [beams, T]: the prompt as it was given, and their tokens."""
        return np.array([[*self.row.given, *beam.tokens] for beam in beams], np.int64)

    def _grow(self, rows, told, made):
        made = [self._grown(beam, rows[beam.parents[-1]]) for beam in made]
        if not self._functions.criteria:
            return made
        scores = [scores for _, scores in told] if self.options.keeps_scores else None
        ended = self._functions.ended(self._ids(made), scores)
        return [
            replace(beam, has_ended=beam.has_ended or bool(one))
            for beam, one in zip(made, ended, strict=True)
        ]

    def _grown(self, beam, logits):
        """A new beam with its state, and whether it has ended."""
        token, before = beam.tokens[-1], beam.state
        has_ended = token in self.lanes[0].ends or len(beam.tokens) >= self.limit
        stops, constraint = copy(before.stops), before.constraint
        if stops is not None:
            has_ended |= stops.end_in(token)
        if constraint is not None and not has_ended and beam.score > -np.inf:
            constraint = constraint.copy()
            constraint.accept([token])
            has_ended = constraint.is_over
        choices = (*before.choices, chosen(token, logits, options=self.options))
        return replace(beam, has_ended=has_ended, state=_State(choices, stops, constraint))

    def _commit(self, search, told, pool):
        self.search, self.told = search, told
        if search.is_over:
            self._end()
            return
        parents = [0 if self._is_new else beam.parents[-1] for beam in search.running]
        fork(self.lanes, parents, pool)
        for lane, beam in zip(self.lanes, search.running, strict=True):
            lane.history[lane.n_prompt :] = beam.tokens
        self._is_new = False

    def _end(self):
        """The best texts become those of the first lanes."""
        n_shown = self.options.num_return_sequences
        for lane, beam in zip(self.lanes[:n_shown], self.search.ended, strict=False):
            lane.become(beam.state.choices if beam.has_ended else ())
        for lane in self.lanes[n_shown:]:
            lane.finish_reason = "length"


def fork(lanes: Sequence[Lane], parents: Sequence[int], pool: Pool) -> None:
    """Gives each lane the entries of its parent, the lane of that number. The first to go on from a
    parent takes its table; others list the same rows."""
    tables, longs = [lane.table for lane in lanes], [lane.is_long for lane in lanes]
    given = {number: number for number in range(len(lanes)) if parents[number] == number}
    for number, parent in enumerate(parents):
        if parent not in given.values():
            given[number] = parent
    unused = [table for number, table in enumerate(tables) if number not in given.values()]
    for number, (lane, parent) in enumerate(zip(lanes, parents, strict=True)):
        lane.is_long = longs[parent]
        if number in given:
            lane.table = tables[parent]
            continue
        lane.table = unused.pop()
        if pool.has_state:
            lane.table.cut(0)
        else:
            lane.table.become(tables[parent])
