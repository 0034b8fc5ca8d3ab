"""How many guesses are worth verifying, and how long it pays to go on guessing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

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
