"""Several experts in one program: each call costs time, and a token of a model with small experts
makes thousands of calls otherwise.

Such an expert is one tile. A program takes the same number of them always, so that one is compiled:
a call for fewer names no expert in the other places, and has any weights there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jlayer.engine.calls import Call, struct_of
from jlayer.engine.picking import picks
from jlayer.engine.size import Size
from jlayer.families.base import LayerKind
from jlayer.model.experts import picked_rows, spread, stage_input
from jlayer.model.stages import call, multiply
from jlayer.plan.experts import at_once
from jlayer.plan.tiles import Tile

if TYPE_CHECKING:
    from jlayer.engine.programs import Programs


def call_of(programs: Programs, tile: Tile, size: Size, picked: int) -> Call:
    """The call (weights and numbers of `at_once(tile)` experts, what the layer's experts look at)
    -> their sum, for a chunk of this size. The number of no expert is the number of all experts.
    `picked`: of an expert so many rows are multiplied, among them those that chose it; 0: all."""
    kind, n = tile.kind, at_once(tile)
    reads = ("inputs", "routing", "mixed")

    def function(given, consumed):
        flow = {name: given[name] for name in reads}
        # A column of zeros for no expert.
        flow["routing"] = jnp.pad(flow["routing"], ((0, 0), (0, 1)))
        for put, number in zip(given["weights"], given["experts"], strict=True):
            # One after another: so no more than one has decoded matrices at a time.
            flow["inputs"], flow["mixed"] = jax.lax.optimization_barrier(
                (flow["inputs"], flow["mixed"])
            )
            weights = programs.weights(tile, put)
            flow["mixed"] = _mixed(kind, flow | {"expert": number}, weights, size.rows, picked)
        return {"mixed": flow["mixed"]}

    given = programs.flow(tile, size, reads)
    given["weights"] = [struct_of(tile)] * n
    given["experts"] = [jax.ShapeDtypeStruct((), "int32")] * n
    label = f"{n} experts {size.rows}{picks(picked)}"
    program = programs.get(label, tile.signature, function, (given, {}))
    return Call(program, reads)


def _mixed(kind: LayerKind, flow: Mapping, weights: Mapping, n_rows: int, picked: int):
    """The sum in the flow, with what one expert gives."""
    rows = picked_rows(flow, picked) if picked else None
    flow = dict(flow)
    for stage in kind.expert_stages:
        x = stage_input(stage, flow)
        if picked and stage.source == "inputs":  # others are of picked rows already
            x = x.at[rows].get(mode="fill", fill_value=0)
        products = multiply(stage, x, weights)
        if picked and "mixed" in stage.finish.reads:
            products = {name: spread(part, rows, n_rows) for name, part in products.items()}
        flow |= call(stage.finish, flow, {}, products)
    return flow["mixed"]
