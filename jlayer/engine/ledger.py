"""Which runs are alive, and what each holds: the one place that knows all caches of a model.

A run is entered before anything of it is allocated, and leaves when it is closed or dropped. Plans
are made for all runs that are alive together, so a promise to one holds for all.
"""

from __future__ import annotations

import threading
from itertools import count

from jlayer.plan.shapes import Shapes


class Ledger:
    """The shapes of the runs that are alive, by number. May be used from any thread."""

    def __init__(self):
        self._shapes: dict[int, Shapes] = {}
        self._numbers = count()
        # Reentrant: a run that is dropped leaves while the collector runs, which may be in here.
        self._lock = threading.RLock()

    def enter(self, shapes: Shapes) -> int:
        """Notes a run; returns its number."""
        with self._lock:
            number = next(self._numbers)
            self._shapes[number] = shapes
            return number

    def leave(self, number: int) -> None:
        """Forgets a run; does nothing where it has left already."""
        with self._lock:
            self._shapes.pop(number, None)

    @property
    def alive(self) -> tuple[Shapes, ...]:
        with self._lock:
            return tuple(self._shapes.copy().values())
