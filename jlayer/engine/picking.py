"""Which experts the rows of a forward pass have chosen, and for how many rows each is multiplied.

A few rows are all multiplied by each chosen expert, those that did not choose it with weight 0. Of
many rows only those are picked that chose it, padded to one of a few lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jlayer.families.base import Stage
from jlayer.model.experts import picked_rows, stage_input
from jlayer.parts import Router
from jlayer.plan.tiles import Tile

# From so many rows on they are picked: below, a product of all rows takes hardly longer.
MANY_ROWS = 64
LEAST_PICKED = 16
MOST_LENGTHS = 4
# In the flow: int32 [R], the number of the adapter that each row is computed with; -1: none.
ADAPTERS = "adapters"


def picked_lengths(router: Router, n_rows: int) -> tuple[int, ...]:
    """The lengths that picked rows are padded to in a chunk of `n_rows`: powers of two around what
    an expert gets if all are equally liked, none longer than half of the rows."""
    if n_rows < MANY_ROWS:
        return ()
    usual = n_rows * router.n_chosen / router.n_experts
    length, found = LEAST_PICKED, []
    while length < usual:
        length *= 2
    while len(found) < MOST_LENGTHS and 2 * length <= n_rows:
        found.append(length)
        length *= 2
    return tuple(found)


def picked_length(lengths: Sequence[int], n_routed: int) -> int:
    """The length for so many rows; 0: all rows are multiplied."""
    return next((length for length in lengths if length >= n_routed), 0)


def routed(routing: np.ndarray, real: np.ndarray) -> np.ndarray:
    """routing float32 [R, E], and which rows are no padding -> for each expert the number of rows
    that chose it, padding included, or 0 where only padding did [E]."""
    is_chosen = routing != 0
    used = is_chosen[real].any(axis=0)
    return np.where(used, is_chosen.sum(axis=0), 0)


def in_order(counts: np.ndarray) -> list[int]:
    """How many rows chose each expert [E] -> the experts that some did, those with most rows first:
    so those of one call, whose rows are padded to the same length, have about as many."""
    ordered = np.argsort(-counts, kind="stable")
    return ordered[counts[ordered] > 0].tolist()


def likeliest(weights: np.ndarray) -> list[int]:
    """What each expert's output would be multiplied by, summed over rows [E] -> those that some row
    would choose, the one with the most weight first."""
    ordered = np.argsort(-np.abs(weights), kind="stable")
    return ordered[np.abs(weights[ordered]) > 0].tolist()


def input_reads(tile: Tile, picked: int) -> set[str]:
    """What the input of a stage is made of."""
    is_of_expert = picked or tile.stage.weighs_input
    more = {"routing", "expert"} if is_of_expert else set()
    return {tile.stage.source, *more, *chosen_by([tile.stage])}


def chosen_by(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What the products of some stages are made of, beside their inputs."""
    return (ADAPTERS,) if any(stage.chooses for stage in stages) else ()


def picked_input(tile: Tile, flow: Mapping, picked: int):
    """Inside a program: the input of a stage; of an expert, where rows are picked, of those."""
    x = stage_input(tile.stage, flow)
    if not picked or tile.stage.source == "x":  # that of a stage before is of picked rows already
        return x
    return x.at[picked_rows(flow, picked)].get(mode="fill", fill_value=0)


def picks(picked: int) -> str:
    """For a label."""
    return f" picked {picked}" if picked else ""
