"""Prompts that nothing is drawn after, in portions that take least time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jlayer.engine.engine import Engine
from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.shaping import shape_of
from jlayer.plan.making import run_seconds

MOST_ROWS = 1024  # prompts of a portion; with more of them it takes long to see which are alike


def portions(
    engine: Engine, rows: Sequence[Row], options: SamplingOptions
) -> Iterator[Sequence[Row]]:
    """Prompts that get no new tokens, in portions: each of as many as take least time together."""
    at = count = 0
    while at < len(rows):
        rest = rows[at : at + MOST_ROWS]
        if not 0 < count <= len(rest) or not _rate(engine, rest[:count], options):
            count = _best_count(engine, rest, options)
        yield rest[:count]
        at += count


def _best_count(engine, rows, options):
    """How many of the first prompts take least time for each of them. (One, if none fits: whoever
    runs it is told why it does not.)"""
    counts = {1 << n for n in range(len(rows).bit_length())}
    counts |= {3 * count // 2 for count in counts if 3 * count // 2 <= len(rows)} | {len(rows)}
    best, best_rate = 1, 0.0
    for count in sorted(counts):
        rate = _rate(engine, rows[:count], options)
        if rate and rate >= best_rate:
            best, best_rate = count, rate
    return best


def _rate(engine, rows, options):
    """Prompts a second of a run of these; 0 where the budgets do not hold it."""
    shape = shape_of(engine.cfg, rows, [0] * len(rows), options)
    plan = engine.plan_for(shape)
    return len(rows) / run_seconds(plan, shape) if plan.fits else 0.0
