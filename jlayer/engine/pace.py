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
from jlayer.model.products import product
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
    arrays = _zeros(programs, tile)
    found = {}
    for rows in sizes:
        check()
        program = _products(programs, tile, rows)
        inputs = {
            width: jnp.zeros((rows, int(width)), programs.dtype, device=programs.devices.everywhere)
            for width in _widths(tile)
        }
        given, seconds = {"weights": arrays, "inputs": inputs}, []
        began = time.perf_counter()
        while len(seconds) < 3 or time.perf_counter() - began < ENOUGH_S:
            at = time.perf_counter()
            jax.block_until_ready(program(given))
            seconds.append(time.perf_counter() - at)
        found[rows] = median(seconds)
    return found


def _products(programs, tile, n_rows):
    """The program ({weights of a tile, inputs [R, in] by width}) -> the product of each of its
    matrices with the rows that a device has of it."""
    widths = {part.matrix: part.width for part in tile.parts}

    def function(given):
        weights, inputs = programs.weights(tile, given["weights"]), given["inputs"]
        return [product(inputs[str(widths[name])], weights[name]) for name in tile.heights]

    inputs = {
        width: jax.ShapeDtypeStruct((n_rows, int(width)), programs.dtype) for width in _widths(tile)
    }
    given = {"weights": programs.devices.struct_of(tile), "inputs": inputs}
    return programs.get(f"timed {n_rows}", tile.signature, function, (given,))


def _widths(tile):
    """The widths of a tile's matrices, each once, as keys of a dict."""
    return sorted({str(p.width) for p in tile.parts if p.matrix in tile.heights})


def _zeros(programs, tile):
    """A tile of zeros on the devices."""
    devices = programs.devices
    return jax.tree.map(
        lambda one: jnp.zeros(one.shape, one.dtype, device=one.sharding or devices.everywhere),
        devices.struct_of(tile),
    )


def _n_weights(tile):
    """Of those that are multiplied by rows."""
    return sum(part.n_weights for part in tile.parts if part.matrix not in tile.uncut)
