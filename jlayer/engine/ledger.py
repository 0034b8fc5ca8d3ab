"""The live runs and their shapes: the one place that knows all caches of a model.

A run enters before anything is allocated for it, and leaves when it is closed or dropped. Plans
count all live runs together, so the budget holds for all of them.
"""

from __future__ import annotations

import threading
from itertools import count

from jlayer.plan.shapes import Shapes


class Ledger:
    """The shapes of the live runs, by number. Any thread may use it."""

    def __init__(self):
        self._shapes: dict[int, Shapes] = {}
        self._numbers = count()
        # Reentrant: a run that is dropped leaves while the collector runs, which may be in here.
        self._lock = threading.RLock()

    def enter(self, shapes: Shapes) -> int:
        """Adds a run; returns its number."""
        with self._lock:
            number = next(self._numbers)
            self._shapes[number] = shapes
            return number

    def leave(self, number: int) -> None:
        """Removes a run; does nothing if it was removed before."""
        with self._lock:
            self._shapes.pop(number, None)

    @property
    def alive(self) -> tuple[Shapes, ...]:
        with self._lock:
            return tuple(self._shapes.copy().values())
