"""How long a forward pass takes by its rows, before any was seen: the arithmetic of one tile is
timed, and the plan knows the bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import jax
import jax.numpy as jnp

from jlayer.engine.programs import Programs
from jlayer.interrupts import check
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import CHUNK_ROWS
from jlayer.plan.tiles import Tile

ENOUGH_S = 0.1  # of timing one size


def predicted_seconds(plan: Plan, programs: Programs, *, most_rows: int) -> dict[int, float]:
    """Seconds of a forward pass of one chunk, by its rows, up to `most_rows`: those of the bytes,
    or of the products, whichever are more; of experts as many are used as so many tokens are
    expected to choose. On a CPU the plan's seconds hold the products of the host's own kernels,
    where they are used."""
    tile = max(plan.tiles, key=_n_weights)
    certain = sum(_n_weights(each) for each in plan.tiles if each.expert is None)
    of_experts = sum(map(_n_weights, plan.tiles)) - certain
    sizes = [rows for rows in CHUNK_ROWS if rows <= most_rows]
    arithmetic = tile_seconds(programs, tile, sizes)
    found = {}
    for rows, seconds in arithmetic.items():
        is_xlas = plan.machine.kind.has_link or not plan.hosted(rows)
        used = certain + of_experts * plan.moved(rows).share_of(plan.tiling)
        share = used / _n_weights(tile)
        found[rows] = max(plan.narrow_seconds(rows), share * seconds * is_xlas)
    return found


def filled_share(plan: Plan, n_real: int, n_rows: int) -> float:
    """The seconds of a forward pass of `n_rows` rows, `n_real` of which are no padding, divided by
    those of a pass without padding: padding chooses no experts, and multiplies as long as others
    do."""
    if not plan.experts.on_device or n_real >= n_rows:
        return 1.0
    return plan.narrow_seconds(n_real) / plan.narrow_seconds(n_rows)


def tile_seconds(programs: Programs, tile: Tile, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of a tile's products, by the rows of a chunk. The weights are zeros."""
    arrays = programs.zeros(tile)
    found = {}
    for rows in sizes:
        check()
        program = programs.products(tile, rows)
        inputs = {
            width: jnp.zeros((rows, int(width)), programs.dtype, device=programs.device)
            for width in programs.widths(tile)
        }
        given, seconds = {"weights": arrays, "inputs": inputs}, []
        began = time.perf_counter()
        while len(seconds) < 3 or time.perf_counter() - began < ENOUGH_S:
            at = time.perf_counter()
            jax.block_until_ready(program(given))
            seconds.append(time.perf_counter() - at)
        found[rows] = median(seconds)
    return found


def _n_weights(tile):
    """Of those that are multiplied by rows."""
    return sum(part.n_weights for part in tile.parts if part.matrix not in tile.uncut)
