"""The live runs: the one place that knows who holds cache entries of a model.

A run enters before anything is allocated for it, and leaves when it is closed or dropped. Plans
count all live runs together, so the budget holds for all of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jlayer.engine.pool import Pool, Table
from jlayer.interrupts import check
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import RunShape

PATIENCE_S = 0.5  # signals are looked for at least so often by who waits for a turn


class Ticket:
    """A run that was admitted: its shape and plan, and the tables of its lanes."""

    def __init__(self, ledger: Ledger, shape: RunShape, plan: Plan, pool: Pool):
        self.shape, self.plan = shape, plan
        self.tables: list[Table] = []
        self._ledger, self._pool = ledger, pool
        self.has_ended: Callable[[], bool] = lambda: False

    def on_end(self, has_ended: Callable[[], bool]) -> None:
        """`has_ended`: tells whether nobody needs its entries any more."""
        self.has_ended = has_ended

    def table(self) -> Table:
        """An empty table for a lane of the run."""
        self.tables.append(Table(self._pool))
        return self.tables[-1]

    def take_over(self, table: Table, other: Ticket) -> Table:
        """Makes another run's table one of this run's. The other one leaves."""
        other.tables.remove(table)
        self.tables.append(table)
        other.close()
        return table

    def keep(self, table: Table, shape: RunShape) -> None:
        """The run has ended, and keeps no more than one table, of this shape."""
        for each in self.tables:
            if each is not table:
                each.close()
        self.tables, self.shape = [table], shape

    def close(self) -> None:
        """The run leaves, and its entries are free: at once, or when the forward pass that another
        thread is in has ended. Any thread may call this, and a garbage collection."""
        self._ledger.leave(self)


class Ledger:
    """The tickets of the live runs, and whose turn it is.

    `on_empty` is called when the last run has left.
    """

    def __init__(self, on_empty: Callable[[], None]):
        self._alive: dict[int, Ticket] = {}
        self._leaving: deque[Ticket] = deque()
        self._lock, self._depth = threading.RLock(), 0
        self._on_empty = on_empty

    def enter(self, ticket: Ticket) -> None:
        """Adds a run; only within a turn."""
        self._alive[id(ticket)] = ticket

    def leave(self, ticket: Ticket) -> None:
        """Removes a run; does nothing if it was removed before."""
        self._leaving.append(ticket)
        self._settle()

    @property
    def alive(self) -> tuple[RunShape, ...]:
        """The shapes of the live runs."""
        self._settle()
        return tuple(ticket.shape for ticket in list(self._alive.values()))

    @contextmanager
    def without(self, ticket: Ticket | None) -> Iterator[None]:
        """A run that is not counted inside: what comes in its place is planned there. Only within a
        turn."""
        aside = None if ticket is None else self._alive.pop(id(ticket), None)
        try:
            yield
        finally:
            if aside is not None:
                self._alive[id(aside)] = aside

    @property
    def tables(self) -> list[Table]:
        """The tables of all lanes of the live runs; only within a turn."""
        return [table for ticket in self._alive.values() for table in ticket.tables]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time is inside, as often as it likes."""
        self._settle()
        while not self._lock.acquire(timeout=PATIENCE_S):
            check()
        try:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
        finally:
            self._lock.release()
            self._settle()

    def _settle(self):
        """Removes the runs that have left, unless a turn is under way: its end does it.

        A garbage collection inside a turn may drop a run, so the lock alone is not enough: the
        same thread holds it.
        """
        while self._leaving and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return
                self._depth += 1
                try:
                    while self._leaving:
                        self.remove(self._leaving.popleft())
                finally:
                    self._depth -= 1
            finally:
                self._lock.release()

    def remove(self, ticket: Ticket) -> None:
        """Removes a run at once; only within a turn, and not while a forward pass is under way."""
        if self._alive.pop(id(ticket), None) is None:
            return
        for table in ticket.tables:
            table.close()
        if not self._alive:
            self._on_empty()
