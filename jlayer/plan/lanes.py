"""How many lanes fit the budgets."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from jlayer.plan.limits import Limits, chunk_limits, row_limits
from jlayer.plan.machine import Machine
from jlayer.plan.making import TILE_BYTES, bare_plan, tiling_of
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier, Weights
from jlayer.plan.tiling import Tiling

MOST_LANES = 4096  # no more are looked for


def most_lanes(
    weights: Weights,
    machine: Machine,
    run: RunShape,
    tilings: dict[int | None, Tiling] | None = None,
    *,
    draft: Weights | None = None,
) -> int:
    """How many lanes like those of `run` the budgets hold, up to MOST_LANES.

    Looks at the tiles that need least memory only, and keeps none: the plan of that many lanes has
    larger ones where they fit. `tilings`: as for `make_plan`.
    """
    tilings = {} if tilings is None else tilings
    tiling = tiling_of(tilings, weights, machine, TILE_BYTES[-1])

    def fits(n_lanes):
        many = replace(run, batch=n_lanes, entries=None)
        return any(
            bare_plan(
                *(weights, machine, tiling, many, ()), Limits(most, rows, cache), draft=draft
            ).fits
            for rows in reversed(row_limits(many))
            for cache in (Tier.HOST, Tier.DEVICE)
            for most in reversed(chunk_limits(many))
        )

    above = 1
    while above <= MOST_LANES and fits(above):
        above *= 2
    numbers = range(above // 2, min(above, MOST_LANES + 1))
    return numbers[bisect_left(numbers, True, lo=1, key=lambda n: not fits(n)) - 1]
