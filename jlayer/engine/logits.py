"""What a forward pass brings to the host: logits that tokens are drawn from are kept whole, those
of scored prompts are reduced at once, and so are final hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.engine.hidden import PassHidden
from jlayer.engine.riders import Rider
from jlayer.engine.scores import Scores


@dataclass(frozen=True)
class _Places:
    """The wanted rows of a rider: `scored` are those of its tokens, from place `first` on; those it
    draws from are at `drawn` among all riders'."""

    first: int
    scored: range
    drawn: slice

    @property
    def of_scored(self) -> slice:
        return slice(self.first, self.first + len(self.scored))


class PassLogits:
    """What `Sweeper.run` gives for some riders; `take` and `take_hidden` are called with it."""

    def __init__(self, riders: Sequence[Rider], vocab_size: int, *, width: int):
        """`width`: of hidden states."""
        self._places: dict[int, _Places] = {}
        targets, n_drawn, n_top = [], 0, 1
        for rider in riders:
            scored = rider.scored
            end = n_drawn + rider.n_drawn
            self._places[id(rider)] = _Places(len(targets), scored, slice(n_drawn, end))
            if scored:
                targets += rider.lane.scores.targets(scored)
                n_top = max(n_top, rider.lane.scores.n_top)
            targets += [-1] * rider.n_drawn
            n_drawn = end
        self._numbers = {id(rider): number for number, rider in enumerate(riders)}
        self._hidden = PassHidden([(rider.lane.pooled, rider.pooled) for rider in riders], width)
        self.take_hidden = self._hidden.take
        self._targets = np.array(targets, np.int64)
        self._drawn_at = np.cumsum(self._targets < 0) - 1
        self._drawn = np.empty((n_drawn, vocab_size), np.float32)
        self._scores = None
        if n_drawn < len(targets):
            self._scores = Scores(self._targets, n_likeliest=min(n_top, vocab_size))

    def take(self, output: np.ndarray, places: np.ndarray, row: int) -> None:
        """Takes logits [some wanted rows, some of the vocabulary]; see `sweep.Take`."""
        columns = slice(row, row + output.shape[1])
        if self._scores is None:
            self._drawn[places, columns] = output
            return
        self._scores.add(output, places, row)
        drawn = self._targets[places] < 0
        self._drawn[self._drawn_at[places[drawn]], columns] = output[drawn]

    def of(self, rider: Rider) -> np.ndarray:
        """Those that it draws from: float32 [its `n_drawn`, V]."""
        return self._drawn[self._places[id(rider)].drawn]

    def are_finite(self, rider: Rider) -> bool:
        """Whether those that score its prompt are, and its hidden states."""
        own = self._places[id(rider)]
        if not self._hidden.are_finite(self._numbers[id(rider)]):
            return False
        return not own.scored or bool(self._scores.finite[own.of_scored].all())

    def give(self, rider: Rider) -> None:
        """Gives a lane what the pass has found of its prompt."""
        own, scores = self._places[id(rider)], rider.lane.scores
        if own.scored and self.are_finite(rider):
            scores.add(own.scored, self._scores.choices(own.of_scored, scores.n_top))
        self._hidden.give(self._numbers[id(rider)])
