"""How many guesses are worth verifying, and how long it pays to go on guessing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import numpy as np


def best_width(
    gains: np.ndarray,
    sizes: Mapping[int, float],
    *,
    fixed: int,
    drafting_s: float,
    ratio: float,
    sure: float = 1.0,
) -> int:
    """How many of the guesses should ride: as many as give the most tokens a second; 0 is possible.

    `gains`: probability that each guess is accepted, best first. `sizes`: seconds of a forward pass
    by its rows. `fixed`: rows that ride anyway. `drafting_s`: seconds that guessing took.
    `ratio`: accepted guesses for each expected one. `sure`: tokens that come without guesses.
    Guesses fill a size: within one, more of them cost nothing.
    """
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    best, width = -np.inf, 0
    for rows in sorted(sizes):
        if rows < fixed:
            continue
        count = min(rows - fixed, len(gains))
        rate = (sure + ratio * float(sums[count])) / (sizes[rows] + drafting_s)
        if rate > best:  # of equal rates the narrower one
            best, width = rate, count
    return width


def goes_on(gained: float, *, expected: float, step_s: float, sweep_s: float) -> bool:
    """Whether another step of drafting pays.

    `gained`: expected tokens that the last step added. `expected`: tokens of the forward pass so
    far. A step pays if it adds a larger share of tokens than of time.
    """
    return gained * sweep_s >= expected * step_s


class Pace:
    """Seconds of a forward pass by its rows: predicted at first, then as measured."""

    LATEST = 9  # passes of one size whose median counts: the first one may have compiled

    def __init__(self, predicted: Mapping[int, float]):
        self._predicted = dict(predicted)
        self._seen: dict[int, deque[float]] = {}

    def saw(self, rows: int, seconds: float) -> None:
        """Takes note of a pass; `rows`: one of the predicted sizes."""
        assert rows in self._predicted, f"no prediction for {rows} rows"
        self._seen.setdefault(rows, deque(maxlen=self.LATEST)).append(seconds)

    def seconds(self) -> dict[int, float]:
        """By rows. Sizes that were not seen are corrected by what was found at those that were."""
        found = {rows: median(latest) for rows, latest in self._seen.items()}
        ratio = median(s / self._predicted[rows] for rows, s in found.items()) if found else 1.0
        return {rows: found.get(rows, ratio * s) for rows, s in self._predicted.items()}


@dataclass
class Patience:
    """When a text is guessed for again, whose guesses do not pay: after FREE failures in a row in
    every second pass, then in every fourth, and so on, up to every LONGEST-th."""

    FREE: ClassVar[int] = 3
    LONGEST: ClassVar[int] = 64

    failures: int = 0
    rest: int = 0

    def ready(self) -> bool:
        """Whether it is time to guess; called once a pass."""
        self.rest = max(0, self.rest - 1)
        return self.rest == 0

    def note(self, *, paid: bool) -> None:
        """Takes note of guesses: whether one of them was right."""
        self.failures = 0 if paid else self.failures + 1
        times = max(0, self.failures - self.FREE)
        self.rest = min(1 << times, self.LONGEST) if times else 0
