"""Benchmarks guessing tokens on this machine: a step of the draft model, and forward passes that
verify trees, by their rows.

What a tree gains depends on the two models and the text. Here it is assumed, and named so.
"""

from __future__ import annotations

import time

import numpy as np

from jlayer.api import Model
from jlayer.engine.batch import Growth, arrange_growth
from jlayer.engine.growing import room_for_tree, step_nodes
from jlayer.interrupts import check
from jlayer.measure.bench import enough, repeat, timed
from jlayer.measure.machine import median, summary
from jlayer.plan.shapes import CHUNK_ROWS, RunShape, capacity_for

STEP_ROWS = (2, 8, 16, 32, 64)
CONTEXT = 512  # entries before a tree
DEPTH = 16  # below the last of them; the trees here are not as deep
# Rows of a pass -> tokens that one gives. From 128 on as SpecExec published for drafts of 1B
# (arXiv 2406.02532); the narrower ones fall off as in our own simulations.
ASSUMED_TOKENS = {1: 1.0, 8: 3.5, 16: 4.3, 32: 5.1, 64: 6.0, 128: 6.7, 256: 7.7, 512: 8.0}


class DraftBench:
    """The benchmark of the draft model of an opened model. Nothing else may run meanwhile.

    Creating it admits a run with as many guesses as fit. Raises DoesNotFitError. Close it after
    use.
    """

    def __init__(self, model: Model):
        self._engine = engine = model.engine
        self._draft = engine.draft
        self.context = min(CONTEXT, engine.context_limit, self._draft.context_limit)
        shape = RunShape(context=self.context, sweeps=len(ASSUMED_TOKENS), nodes=CHUNK_ROWS[-1] - 1)
        self._forward = engine.start(shape)
        self.plan = self._forward.plan
        self._forward.pretend(max(1, self.context - DEPTH))
        most = 1 + self.plan.shapes.nodes
        self.rows = tuple(rows for rows in ASSUMED_TOKENS if rows <= most)

    def close(self) -> None:
        self._forward.close()

    def measure(self) -> dict:
        """All figures, in bytes and seconds."""
        steps, passes = self._steps(), self._passes()
        one = median(passes[1])
        rows = []
        for n_rows, seconds in passes.items():
            drafting_s, took = drafting_seconds(n_rows, steps), median(seconds)
            tokens = ASSUMED_TOKENS[n_rows]
            rows.append(
                {
                    "rows": n_rows,
                    "seconds": summary(seconds),
                    "to_one_row": took / one,
                    "drafting_s": drafting_s,
                    "assumed_tokens": tokens,
                    "assumed_tokens_per_s": tokens / (took + drafting_s),
                }
            )
        return {
            "folder": self._draft.folder,
            "dtype": self._draft.dtype,
            "bytes": self._draft.n_bytes,
            "planned_bytes": self.plan.device.draft_bytes,
            "context": self.context,
            "steps": [{"rows": n, "seconds": summary(seconds)} for n, seconds in steps.items()],
            "passes": rows,
            "assumed_best_rows": max(rows, key=lambda row: row["assumed_tokens_per_s"])["rows"],
        }

    def _steps(self):
        """Rows -> seconds of steps of the draft model, each with so many nodes of a tree."""
        found, engine = {}, self._engine
        for n_rows in STEP_ROWS:
            with engine.turn():
                pool = engine.caches.pool
                if n_rows > pool.n_free_everywhere:
                    break
                new = pool.take(n_rows)
                try:
                    part = self._level(new, pool.n_rows)
                    self._draft.guess([part])
                    found[n_rows] = repeat(
                        lambda part=part: timed(lambda: self._draft.guess([part]))
                    )
                finally:
                    pool.release(new)
        return found

    def _level(self, new, pool):
        """The children of a text's last token, as many as there are rows."""
        committed, count = self._forward.rows, len(new)
        growth = Growth(
            [1] * count,
            [len(committed)] * count,
            new,
            committed,
            new,
            np.full(count, len(committed), np.int32),
            np.eye(count, dtype=bool),
        )
        return arrange_growth(
            [growth],
            tokens=count,
            fresh=room_for_tree(STEP_ROWS[-1]),
            capacity=capacity_for(self.context),
            pool=pool,
        )

    def _passes(self):
        """Rows -> seconds of forward passes of a tree with so many."""
        for n_rows in self.rows:  # compiles, and fills the tiers
            self._verify(n_rows)
        seconds = {n_rows: [] for n_rows in self.rows}
        began, rounds = time.perf_counter(), 0
        while not enough(rounds, time.perf_counter() - began):
            for n_rows in self.rows:
                seconds[n_rows].append(timed(lambda n=n_rows: self._verify(n)))
            rounds += 1
        return seconds

    def _verify(self, n_rows):
        check()
        vocab = self._engine.cfg.vocab_size
        tokens = [(7 * i) % vocab for i in range(n_rows)]
        self._forward.verify(tokens, [(i - 1) // 2 for i in range(n_rows)])


def drafting_seconds(n_rows: int, steps: dict[int, list[float]]) -> float:
    """About the seconds of drafting a tree for a pass of so many rows: a step for the last token,
    and as many as expand each guess once."""
    if n_rows == 1:
        return 0.0
    nodes = step_nodes(n_rows - 1, 1)
    of_one, of_many = (median(steps[min(count, max(steps))]) for count in (min(steps), nodes))
    return of_one + -(-(n_rows - 1) // nodes) * of_many
