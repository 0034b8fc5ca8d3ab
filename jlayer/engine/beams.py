"""Beam search: which continuations of a prompt go on, and which have ended. As in transformers 5
(`_beam_search`), in plain numpy and float32; the model, its lanes and caches are not known here.

`early_stopping`: True ends the search once there are enough texts that have ended; False once the
best that goes on, divided by its length as it is, is no better than the worst of these; "never"
looks at the greatest length instead, where a length penalty above 0 would favour it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jlayer.engine.options import SamplingOptions
from jlayer.errors import UsageError

# Of what must not be taken: transformers adds it to a score, and begins with it.
NEVER = np.float32(-1e9)
ZERO = np.float32(0)
MOST_POWER = 126  # of 2, in float32


@dataclass(frozen=True)
class Beam:
    """A continuation. `score`: the sum of the log-probabilities of its `tokens`; of one that has
    ended, divided by the length penalty. `parents`: of each token the number of the beam that it
    continued. `state`: what the caller knows of it."""

    tokens: tuple[int, ...] = ()
    score: np.float32 = ZERO
    parents: tuple[int, ...] = ()
    has_ended: bool = False
    state: object = None


@dataclass(frozen=True)
class Search:
    """`running`: the beams that go on; `ended`: as many that have, or stand in for these, the best
    first. `can_improve`: whether one that goes on may be better than these."""

    running: tuple[Beam, ...]
    ended: tuple[Beam, ...]
    can_improve: bool = True
    is_over: bool = False

    @classmethod
    def of(cls, n_beams: int, state: object = None) -> Search:
        """The search before its first token: only the first beam counts, since all are alike."""
        first = Beam(state=state)
        running = (first, *[replace(first, score=NEVER)] * (n_beams - 1))
        return cls(running, (Beam(score=NEVER),) * n_beams)

    @property
    def is_full(self) -> bool:
        return all(beam.has_ended for beam in self.ended)

    def advanced(
        self,
        scores: np.ndarray,
        *,
        options: SamplingOptions,
        limit: int,
        grow: Callable[[Sequence[Beam]], Sequence[Beam]],
        noise: np.ndarray | None = None,
    ) -> Search:
        """The search after one token more. Raises UsageError where no text has a score above NEVER,
        at which it counts for none.

        `scores`: float32 [beams, V], log-probabilities of the next token after each running beam.
        `limit`: the most tokens. `grow`: gives new beams their state, and says which have ended.
        `noise`: Gumbel's [beams, V]; with it beams are drawn, without replacement, and not the
        best.
        """
        made, total = self._made(scores, len(options.eos_token_id), noise)
        self._check(total[0], len(made[0].tokens), options)
        made = grow(made)
        hits = np.array([beam.has_ended for beam in made])
        going = total + np.where(hits, NEVER, ZERO)
        running = tuple(
            replace(made[n], score=going[n], has_ended=False)
            for n in largest(going, len(self.running))
        )
        n_tokens = len(made[0].tokens)
        ended = self._ended(made, total, hits, options)
        found = replace(self, running=running, ended=ended)
        is_longest = options.early_stopping == "never" and options.length_penalty > 0
        best = running[0].score / _divisor(limit if is_longest else n_tokens, options)
        worst = min(beam.score for beam in ended)
        can_improve = self.can_improve and any(
            best > (worst if beam.has_ended else NEVER) for beam in ended
        )
        is_over = (
            not can_improve or (found.is_full and options.early_stopping is True) or hits.all()
        )
        return replace(found, can_improve=can_improve, is_over=bool(is_over))

    def _check(self, total, n_tokens, options):
        """`total`: the sum of the best, which only falls."""
        best = min(total, _divided(total, n_tokens, options))
        if not best > NEVER and not any(beam.has_ended for beam in self.ended):
            raise UsageError(
                f"num_beams: the best text's score is {best:.3g}, expected one above {NEVER:.3g}; "
                "set length_penalty, temperature, biases or what a function adds closer to neutral"
            )

    def _made(self, scores, n_ends, noise):
        """(the continuations that come into question, their sums float32), best first: so many that
        enough of them go on, whichever ends they have."""
        n_beams, n_vocab = scores.shape
        before = np.array([beam.score for beam in self.running], np.float32)
        total = (scores + before[:, None]).ravel()
        count = min(max(2, 1 + n_ends) * n_beams, total.size)
        places = largest(total if noise is None else total + noise.ravel(), count)
        if noise is not None:
            places = places[np.argsort(-total[places], kind="stable")]
        made = []
        for place in places.tolist():
            parent, token = divmod(place, n_vocab)
            one = self.running[parent]
            made.append(
                replace(
                    one,
                    tokens=(*one.tokens, token),
                    parents=(*one.parents, parent),
                    score=total[place],
                )
            )
        return made, total[places]

    def _ended(self, made, total, hits, options):
        """The best that have ended, of those before and those that ended now among the first."""
        n_beams = len(self.running)
        now = hits & (np.arange(len(made)) < n_beams)
        final = _divided(total, len(made[0].tokens), options)
        if self.is_full and options.early_stopping is True:
            final += NEVER
        if not self.can_improve:
            final += NEVER
        final += np.where(now, ZERO, NEVER)
        fresh = [
            replace(beam, score=score, has_ended=bool(ends))
            for beam, score, ends in zip(made, final, now, strict=True)
        ]
        merged = (*self.ended, *fresh)
        best = largest(np.array([beam.score for beam in merged], np.float32), n_beams)
        return tuple(merged[n] for n in best)


def _divided(total, n_tokens, options):
    with np.errstate(over="ignore"):
        return total / _divisor(n_tokens, options)


def _divisor(n_tokens, options):
    return np.float32(n_tokens**options.length_penalty)


def check_penalty(options: SamplingOptions, limit: int) -> None:
    """Raises UsageError where what a score is divided by is beyond float32 at some length up to
    `limit` tokens."""
    power = abs(options.length_penalty) * math.log2(max(limit, 1))
    if power > MOST_POWER:
        found = f"found {options.length_penalty}, whose scores of {limit} tokens are beyond float32"
        raise UsageError(f"length_penalty: {found}; set it closer to 0")


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest values, the largest first; of equal ones the first."""
    least = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > least)
    level = np.flatnonzero(values == least)[: count - len(above)]
    found = np.concatenate([above, level])
    return found[np.argsort(-values[found], kind="stable")]
