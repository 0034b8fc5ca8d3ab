"""Experts: which of them a token goes through, and the sum of what they give.

A few rows are all multiplied by each expert that is at work, and count with weight 0 where they did
not choose it: so shapes do not depend on what was chosen. Of many rows those are picked that did.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jlayer.families.base import Stage
from jlayer.families.experts import (
    CORRECTION,
    LOGIT_BIAS,
    OF_INPUT,
    OF_WEIGHTS,
    ROUTER,
    SHARED_GATE,
)
from jlayer.model.ops import linear, normed
from jlayer.model.products import product
from jlayer.parts import Router


def route(products, whole, inputs, *, how: Router):
    """inputs [R, D] -> (routing float32 [R, E], zeros float32 [R, D] for the sum of outputs)."""
    x = inputs
    if how.norm is not None:
        x = normed(x, how.norm) * whole[OF_INPUT][None] * jnp.asarray(how.input_scale, x.dtype)
    if how.is_exact:
        x = x.astype(jnp.float32)
    logits = linear(x, whole[ROUTER], whole.get(LOGIT_BIAS)).astype(jnp.float32)
    routing = weights_of(logits, whole.get(CORRECTION), how)
    if OF_WEIGHTS in whole:
        routing = routing * whole[OF_WEIGHTS].astype(jnp.float32)[None]
    return routing, jnp.zeros(inputs.shape, jnp.float32)


def weights_of(logits, bias, how: Router):
    """A router's logits float32 [R, E] -> the weight of each expert [R, E]; 0: not chosen."""
    if how.scores == "sparsemixer":
        return _sparsemixer(logits, how.jitter)
    scores = SCORES[how.scores](logits)
    preferred = logits if how.by_logits else scores
    preferred = preferred if bias is None else preferred + bias.reshape(1, -1)
    if how.n_groups > 1:
        preferred = _within_groups(preferred, how)
    _, chosen = jax.lax.top_k(preferred, how.n_chosen)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if how.renormalizes:
        total = weights.sum(axis=-1, keepdims=True) + how.above_sum
        weights = weights / jnp.maximum(total, how.least_sum)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(scores).at[rows, chosen].set(weights * how.scale)


def _within_groups(scores, how):
    """The scores of experts in groups that are chosen; others are lower than any."""
    rows = scores.shape[0]
    groups = scores.reshape(rows, how.n_groups, -1)
    if how.group_score == "best_two":
        best = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
    else:
        best = groups.max(axis=-1)
    _, chosen = jax.lax.top_k(best, how.n_chosen_groups)
    is_chosen = jnp.zeros(best.shape, bool).at[jnp.arange(rows)[:, None], chosen].set(True)
    return jnp.where(is_chosen[:, :, None], groups, -jnp.inf).reshape(rows, -1)


def _sparsemixer(logits, jitter):
    """The weights of Phi-3.5-MoE (SparseMixer, arXiv 2409.12136): two experts, one after another.

    The weight of each is its share in a softmax over those that are nearly as good as it is; it is
    the best of all, then of all others.
    """
    rows = jnp.arange(logits.shape[0])
    found, left = jnp.zeros_like(logits), logits
    for _ in range(2):
        chosen = left.argmax(axis=-1)
        best = left.max(axis=-1, keepdims=True)
        is_far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        weights = jax.nn.softmax(jnp.where(is_far, -jnp.inf, left), axis=-1)
        found = found.at[rows, chosen].set(weights[rows, chosen])
        left = left.at[rows, chosen].set(-jnp.inf)
    return found


def mix_shared(products, whole, mixed, inputs, *, how):
    """Adds the output of the shared expert, times the sigmoid of its gate if it has one."""
    (output,) = products.values()
    output = output.astype(jnp.float32)
    if SHARED_GATE in whole:
        gate = product(inputs, whole[SHARED_GATE]).astype(inputs.dtype)
        output = output * jax.nn.sigmoid(gate.astype(jnp.float32))
    return (mixed + output,)


def mix_expert(products, whole, mixed, routing, expert, *, how: Router):
    """Adds the output of an expert, by number, as the routing of each row weighs it; as it is where
    the weights multiplied the inputs."""
    (output,) = products.values()
    weight = _column(routing, expert)
    factor = 1 if how.weighs_inputs else weight
    # What overflowed in rows that did not choose it is not theirs.
    return (mixed + jnp.where(weight != 0, output.astype(jnp.float32) * factor, 0),)


def stage_input(stage: Stage, flow: Mapping):
    """The input of a stage [R, in]; None where nothing made one. Of a stage that weighs it, times
    the weight of the expert at work, rounded first to the dtype of both."""
    x = flow.get(stage.source)
    if not stage.weighs_input:
        return x
    return x * _column(flow["routing"], flow["expert"]).astype(x.dtype)


def picked_rows(flow, length: int):
    """The rows that chose the expert at work, in order, int32 [length]; then numbers beyond all
    rows. There may be no more of them than `length`."""
    column = _column(flow["routing"], flow["expert"])[:, 0]
    (rows,) = jnp.nonzero(column != 0, size=length, fill_value=column.shape[0])
    return rows


def _column(routing, expert):
    """The weights of an expert, by number, float32 [R, 1]."""
    return jax.lax.dynamic_slice_in_dim(routing, expert, 1, axis=1)


def spread(products, rows, n_rows: int):
    """products [length, D] of these rows -> [n_rows, D], with zeros for the others."""
    whole = jnp.zeros((n_rows, products.shape[1]), products.dtype)
    return whole.at[rows].set(products, mode="drop")


def _softmax(logits):
    return jax.nn.softmax(logits, axis=-1)


SCORES = {"softmax": _softmax, "sigmoid": jax.nn.sigmoid}
