"""Sequences whose next tokens are decided together, once the logits of all of them are there: the
beams of a search, and rows that functions of the user's look at.

They ride as any others do, in as many forward passes as it takes. None of them has guesses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jlayer.engine.pool import Pool

# What a decision does once the pass has succeeded: to lanes, and to their rows in the pool.
Commit = Callable[[Pool], None]


class Waiting(Protocol):
    """What a lane that waits for others is known by here."""

    joint: Joint | None
    error: Exception | None

    @property
    def is_alive(self) -> bool: ...


class Joint(ABC):
    """Lanes that wait for each other. Subclasses say what is decided."""

    def __init__(self, lanes: Sequence[Waiting]):
        self.lanes = tuple(lanes)
        self._arrived: dict[int, np.ndarray] = {}  # lane's number -> logits [V]
        for lane in self.lanes:
            lane.joint = self

    def sleeps(self, lane: Waiting) -> bool:
        """Whether a lane need not ride: it becomes another's continuation first."""
        return False

    def fail(self, error: Exception) -> None:
        """Ends all of the lanes with an error."""
        for lane in self.lanes:
            lane.error = lane.error or error

    def decide(self, arrived: Mapping[Waiting, np.ndarray]) -> Commit:
        """Takes logits [V] of some of the lanes, from one forward pass. Changes nothing by itself:
        what it returns does. Raises what the decision raises."""
        known = dict(self._arrived)
        known |= {self.lanes.index(lane): logits for lane, logits in arrived.items()}
        missing = [
            number
            for number, lane in enumerate(self.lanes)
            if lane.is_alive and not self.sleeps(lane) and number not in known
        ]
        decided = None if missing else self.decided(known)

        def commit(pool):
            # Of a pass's logits only those that wait are kept.
            self._arrived = {n: logits.copy() for n, logits in known.items()} if missing else {}
            if decided is not None:
                decided(pool)

        return commit

    @abstractmethod
    def decided(self, logits: Mapping[int, np.ndarray]) -> Commit:
        """What follows from the logits [V] of all lanes that are awake, by number."""
