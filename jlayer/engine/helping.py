"""Whether the host's cores go on helping: passes with them are held against passes without.

Cores and link are measured for a moment, when a model is opened. On a machine that others share
the cores may be slower later, and every pass then waits for them. What passes lose so is added up;
once it is as much as trying the other way costs, that is tried, and the faster way is kept. So no
run takes much more than twice what the better way would have taken from its start.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from jlayer.plan.plan import Plan

TRY_S = 10.0  # about what it takes to compile the programs of passes without the cores
BACK = 4  # times as much must be lost before that is tried again
ENOUGH, REMEMBERED = 3, 8  # passes


class Helping:
    """What passes took, by their rows, with the host's cores and without."""

    def __init__(self):
        self._tiling = None
        self._forget()

    def hosted(self, plan: Plan, n_rows: int) -> frozenset[int]:
        """The tiles that the cores multiply in a pass of so many rows."""
        found = plan.hosted(n_rows)
        rests = plan.tiling is self._tiling and n_rows in self._resting
        return frozenset() if found and rests else found

    def learn(self, plan: Plan, *, n_rows: int, seconds: float) -> None:
        """Takes note of a pass for which nothing was compiled."""
        if plan.always_hosted or not plan.machine.kind.has_link or not plan.hosted(n_rows):
            return
        if plan.tiling is not self._tiling:
            self._tiling = plan.tiling
            self._forget()
        rests = n_rows in self._resting
        took = self._took.setdefault((n_rows, rests), deque(maxlen=REMEMBERED))
        took.append(seconds)
        if rests:
            self._judge(n_rows)
            return
        before = self._took.get((n_rows, True))
        unaided = median(before) if before else plan.unaided_seconds(n_rows)
        lost = max(0.0, self._lost.get(n_rows, 0.0) + seconds - unaided)
        self._lost[n_rows] = lost
        if len(took) >= ENOUGH and lost > self._try_s.get(n_rows, TRY_S):
            self._resting.add(n_rows)

    def _judge(self, n_rows):
        """After some passes without the cores: they help again if passes were faster with them."""
        aided, unaided = self._took[n_rows, False], self._took[n_rows, True]
        if len(unaided) == ENOUGH and median(aided) < median(unaided):
            self._resting.discard(n_rows)
            self._lost[n_rows] = 0.0
            self._try_s[n_rows] = BACK * self._try_s.get(n_rows, TRY_S)

    def _forget(self):
        self._took: dict[tuple[int, bool], deque[float]] = {}
        self._lost: dict[int, float] = {}
        self._try_s: dict[int, float] = {}
        self._resting: set[int] = set()
