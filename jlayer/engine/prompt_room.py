"""How many rows of prompts ride beside next tokens: as many as hardly slow these down.

On a fast card hundreds of rows take no longer than the weights take to come; on a slow one they do.
So it is learnt from the passes themselves.
"""

from __future__ import annotations

from collections import deque

from jlayer.plan.plan import Plan

REMEMBERED = 16  # passes
# A pass may take so many times the shortest of the last ones before fewer rows ride, and must take
# less than so many times before more do. (70B int4 on an H100: 1,040 rows 1.8 times, 260 rows 1.2
# times the 0.95 s of a pass without prompts; so the larger one lets in four times as many people in
# 1.5 times the time.)
SLOW, QUICK = 2.5, 2.0
NOTICED_S = 0.1  # nobody minds that a pass takes less, and its time is mostly chance


class PromptRoom:
    """The rows of prompts in a forward pass that also carries next tokens."""

    def __init__(self):
        self._rows: int | None = None
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def rows(self, plan: Plan) -> int:
        """From half a chunk to what a pass has memory for; a chunk as long as nothing is known."""
        most = max(plan.chunk, plan.load.n_rows)
        return max(plan.chunk // 2, min(most, self._rows or plan.chunk))

    def learn(self, plan: Plan, *, n_prompt_rows: int, seconds: float) -> None:
        """Takes note of a pass with next tokens, for which nothing was compiled."""
        self._seconds.append(seconds)
        rows, shortest = self.rows(plan), min(self._seconds)
        if n_prompt_rows <= rows // 2:
            return
        if seconds < max(NOTICED_S, QUICK * shortest):
            self._rows = 2 * rows
        elif seconds > SLOW * shortest:
            self._rows = rows // 2
