"""Final hidden states of prompts: what the head's norm makes of what the last layer gives, pooled
as forward passes bring them to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlayer.engine.ids import Row

POOLINGS = ("mean", "last")


class Pooled:
    """Those of one prompt. `next`: the first of its tokens that is still wanted."""

    def __init__(self, n_tokens: int, *, how: str):
        self.next = 0 if how == "mean" else n_tokens - 1
        self._n_tokens, self._n_pooled = n_tokens, n_tokens - self.next
        self._sum: np.ndarray | float = 0.0

    @classmethod
    def of(cls, row: Row) -> Pooled | None:
        """None where they are not wanted."""
        return None if row.pooling is None else cls(len(row.ids), how=row.pooling)

    @property
    def is_done(self) -> bool:
        return self.next >= self._n_tokens

    def rows(self, first: int, end: int) -> range:
        """Which of these tokens must ride for their hidden states: the last ones of them."""
        return range(min(max(first, self.next), end), end)

    def add(self, rows: range, total: np.ndarray) -> None:
        """Takes the sum of the hidden states of `rows`, float64 [D]."""
        assert rows.start == self.next, "a token was left out"
        self._sum, self.next = self._sum + total, rows.stop

    @property
    def value(self) -> np.ndarray:
        """float32 [D], once it is done."""
        assert self.is_done, "some of its tokens have not ridden"
        return (self._sum / self._n_pooled).astype(np.float32)


class PassHidden:
    """What a forward pass gives for prompts, as (the pooled one, its rows) for each that rides: the
    sum of each, for all hidden states of a pass would take memory that is not planned for."""

    def __init__(self, asked: Sequence[tuple[Pooled | None, range]], width: int):
        self._asked = asked
        self._owners = np.repeat(np.arange(len(asked)), [len(rows) for _, rows in asked])
        self._sums = np.zeros((len(asked) if len(self._owners) else 0, width))

    def take(self, output: np.ndarray, places: np.ndarray) -> None:
        """Takes final hidden states [some, D]; see `sweep.TakeHidden`."""
        owners = self._owners[places]
        for owner in np.unique(owners):
            self._sums[owner] += output[owners == owner].sum(0, dtype=np.float64)

    def are_finite(self, number: int) -> bool:
        """Whether those of the rider of this number are."""
        return not len(self._asked[number][1]) or bool(np.isfinite(self._sums[number]).all())

    def give(self, number: int) -> None:
        """Gives a prompt what the pass has found of it."""
        pooled, rows = self._asked[number]
        if rows and self.are_finite(number):
            pooled.add(rows, self._sums[number])
