"""Who begins next: people before batches, people in turn, and no client more than its share.

Plain data, without threads: the desk holds its lock around every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from jlayer.errors import JlayerError

MOST_RETRY_S = 120.0  # clients of OpenAI's kind do not wait for longer: they give up at once


class QueueFull(JlayerError):
    """No more can wait. `retry_after_s`: when there is likely room."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = max(1.0, min(MOST_RETRY_S, retry_after_s))


class Waiting(Protocol):
    """What waits: whom it is for, and whether it is part of a batch."""

    client: str
    is_batch: bool


@dataclass(frozen=True)
class Limits:
    """`people`, `batch`: the most that wait; `client`: the most that one client has waiting."""

    people: int = 256
    batch: int = 4096
    client: int = 64


class Queue:
    """What waits to begin, in order of arrival."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._waiting: dict[int, Waiting] = {}  # in order
        self._numbers = count()
        self._first = -1

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, *, is_batch: bool) -> int:
        return sum(one.is_batch == is_batch for one in self._waiting.values())

    def check(self, one: Waiting, retry_after_s: float) -> None:
        """Raises QueueFull where another one like it may not wait."""
        most = self._limits.batch if one.is_batch else self._limits.people
        n_waiting = self.count(is_batch=one.is_batch)
        if n_waiting >= most:
            raise QueueFull(
                f"queue: {n_waiting} requests wait already, at most {most} may; try again later",
                retry_after_s,
            )
        n_own = sum(each.client == one.client for each in self._waiting.values())
        if not one.is_batch and n_own >= self._limits.client:
            raise QueueFull(
                f"queue: {n_own} requests of this client wait already, at most "
                f"{self._limits.client} may; try again later",
                retry_after_s,
            )

    def add(self, one: Waiting) -> None:
        self._waiting[next(self._numbers)] = one

    def add_first(self, one: Waiting) -> None:
        """Puts back what had begun."""
        self._waiting = {self._first: one, **self._waiting}
        self._first -= 1

    def remove(self, one: Waiting) -> bool:
        """Whether it was there."""
        for number, each in self._waiting.items():
            if each is one:
                del self._waiting[number]
                return True
        return False

    def order(self, running: Mapping[str, int]) -> list[Waiting]:
        """All that wait, in the order in which they would begin: people first; of these the client
        with the fewest that run or begin before, and of equal ones who came first. `running`: how
        many of each client run."""
        begun, people, batch = Counter(running), [], []
        for number, one in enumerate(self._waiting.values()):
            if one.is_batch:
                batch.append(one)
            else:
                people.append((begun[one.client], number, one))
                begun[one.client] += 1
        return [one for _, _, one in sorted(people, key=lambda each: each[:2])] + batch

    def place(self, one: Waiting, running: Mapping[str, int]) -> int | None:
        """Its place in that order, from 1; None where it does not wait."""
        order = self.order(running)
        return next((n for n, each in enumerate(order, 1) if each is one), None)
