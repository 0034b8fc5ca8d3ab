"""Several experts in one program: each call costs time, and a token of a model with small experts
makes thousands of calls otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jlayer.families.base import LayerKind, Stage
from jlayer.model.experts import picked_rows, spread, stage_input
from jlayer.model.stages import call, multiply


def mix_together(
    kind: LayerKind,
    flow: Mapping,
    experts: Sequence[tuple],
    *,
    n_rows: int,
    picked: int,
    stacked: bool,
    gather: Callable[[dict, Stage], dict],
) -> jax.Array:
    """The sum in the flow, float32 [R, D], with what some experts give.

    `experts`: (weights by leaf, number) of each, the weights by a function without arguments, since
    one expert at a time is decoded. The number of all experts is that of none: it adds nothing.
    `picked`: of an expert so many rows are multiplied, among them those that chose it; 0: all.
    `stacked`: their weights are copied to one array and multiplied at a time. `gather`: (the
    products of a stage, the stage) -> those of all rows, where other devices have some.
    """
    # A column of zeros for no expert.
    flow = {**flow, "routing": jnp.pad(flow["routing"], ((0, 0), (0, 1)))}
    if stacked:
        return mix_stacked(kind, flow, experts, n_rows, picked, gather)
    for weights_of, number in experts:
        # One after another, so that no more than one has decoded matrices at a time.
        inputs, mixed = jax.lax.optimization_barrier((flow["inputs"], flow["mixed"]))
        flow |= {"inputs": inputs, "mixed": mixed, "expert": number}
        flow["mixed"] = _mixed(kind, flow, weights_of(), n_rows, picked, gather)
    return flow["mixed"]


def mix_stacked(kind, flow, experts, n_rows, picked, gather):
    """The same by one product of all: a GPU takes longer to be told of eight small kernels than to
    copy the weights for one."""
    weights = jax.tree.map(lambda *each: jnp.stack(each), *(made() for made, _ in experts))
    numbers = jnp.stack([number for _, number in experts])
    alone = flow | {"mixed": jnp.zeros_like(flow["mixed"])}

    def given(weights, number):
        return _mixed(kind, alone | {"expert": number}, weights, n_rows, picked, gather)

    mixed = flow["mixed"]
    for output in jax.vmap(given)(weights, numbers):  # in the same order as one after another
        mixed = mixed + output
    return mixed


def _mixed(kind, flow, weights, n_rows, picked, gather):
    """The sum in the flow, with what one expert gives."""
    rows, flow = picked_rows(flow, picked) if picked else None, dict(flow)
    for stage in kind.expert_stages:
        x = stage_input(stage, flow)
        if picked and stage.source == "inputs":  # others are of picked rows already
            x = x.at[rows].get(mode="fill", fill_value=0)
        products = gather(multiply(stage, x, weights), stage)
        if picked and "mixed" in stage.finish.reads:
            products = {name: spread(part, rows, n_rows) for name, part in products.items()}
        flow |= call(stage.finish, flow, {}, products)
    return flow["mixed"]
