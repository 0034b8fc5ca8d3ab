"""A run that was put down, as the run that takes it up sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jlayer.engine.engine import Engine
from jlayer.engine.lane import Lane
from jlayer.engine.ledger import Ticket
from jlayer.engine.pool import Table
from jlayer.plan.shapes import RunShape


class Past(Protocol):
    """What lanes had before."""

    def take_up(self, lanes: Sequence[Lane]) -> None:
        """Gives new lanes, which are not admitted yet, their tokens and options."""

    def board(
        self, engine: Engine, shape: RunShape, lanes: Sequence[Lane]
    ) -> tuple[Ticket, list[Table]]:
        """Admits a run of such lanes: (its ticket, a table for each, with the entries that there
        are). Raises what `Engine.admit` raises, CheckpointError or StorageError."""
