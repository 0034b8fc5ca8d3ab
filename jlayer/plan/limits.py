"""By what a plan may be made: the rows of a chunk and of a forward pass, and where pools are."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.plan.shapes import CHUNK_ROWS, RunShape
from jlayer.plan.tiles import Tier


@dataclass(frozen=True)
class Limits:
    """What a plan is made by: the most rows of a chunk, and of a forward pass; where pools are."""

    chunk: int
    rows: int | None
    cache: Tier


def chunk_limits(*runs: RunShape) -> tuple[int, ...]:
    """Limits of the rows of a chunk, the largest first. None is smaller than a tree of these runs,
    since a tree is in one chunk."""
    least = max(run.least_chunk for run in runs)
    return tuple(rows for rows in reversed(CHUNK_ROWS) if rows >= least)


def row_limits(*runs: RunShape) -> list[int | None]:
    """Limits of the rows of a forward pass, the largest first; None: prompts in one pass."""
    most = max(run.batch * run.longest for run in runs if not run.all_logits or run is runs[0])
    limits, limit = [None], CHUNK_ROWS[-1]
    while limit < most:
        limits.insert(1, limit)
        limit *= 2
    return limits
