"""A decoder layer as a fold of its stages: all arithmetic of a layer.

`block(kind)` runs the stages of a kind over whole matrices. For tiles the engine runs the same
functions over ranges of rows and joins the products: the arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp

from jlayer.families.base import (
    Function,
    Join,
    JoinBoth,
    LayerKind,
    NormAt,
    Stage,
    bias_name,
    lengths_name,
    low_rank_names,
)
from jlayer.families.decoder import SINKS
from jlayer.model.attention import attention
from jlayer.model.cache import write
from jlayer.model.delta import gated_delta
from jlayer.model.experts import mix_expert, mix_shared, route, stage_input
from jlayer.model.low_rank import low_rank_product, row_factors
from jlayer.model.mla import attend_latent, query_latent
from jlayer.model.ops import (
    ACTIVATION,
    clamped,
    exact_linear,
    final_logits,
    gated,
    grown,
    linear,
    normed,
    rotate,
    scaled,
)
from jlayer.parts import Attention, Clamped, Mlp, Scale


@lru_cache(maxsize=64)
def block(kind: LayerKind) -> Callable:
    """The pure function of one decoder layer of this kind.

    (layer, hidden [R, D], cache, rows) -> (hidden [R, D], cache with these R tokens).
    `layer`: weights by leaf, in the published layout; a projection is [out, in], and [E, out, in]
    of all experts. `adapters`: see `multiply`.
    Compiled once, it serves every layer of the kind.
    """

    def layer_of_this_kind(layer, hidden, cache, rows, adapters=None):
        flow = {"hidden": hidden, "cache": cache, "rows": rows}
        for stage, expert in kind.passes():
            weights = layer
            if expert is not None:
                flow["expert"] = jnp.int32(expert)
                names = (*stage.leaves, *map(bias_name, stage.leaves))
                weights = layer | {name: layer[name][expert] for name in names if name in layer}
            if stage.input and not expert:
                flow |= call(stage.input, flow, layer)
            products = multiply(stage, stage_input(stage, flow), weights, adapters)
            flow.pop("x", None)
            flow |= call(stage.finish, flow, layer, products)
        return flow["hidden"], flow["cache"]

    return layer_of_this_kind


def multiply(stage: Stage, x, weights: Mapping, adapters=None) -> dict:
    """x [R, in] times some rows of a stage's matrices -> products [R, rows] by name.

    `weights`: by leaf, the same rows of each matrix of a group, and of what stands beside it. A
    group whose leaves are missing is skipped. `adapters`: int32 [R], the number of the adapter that
    each row is computed with, where that is asked for (`Stage.chooses`).
    """
    products = {}
    for group in stage.groups:
        if group.leaves[0] not in weights:
            continue
        parts = [_linear(stage, group, x, weights, leaf, adapters) for leaf in group.leaves]
        products[group.product] = COMBINE[group.combine](*parts, how=group.how)
    return products


def hosted_products(stage: Stage, raw, heights: Mapping[str, int], *, dtype) -> dict:
    """raw float32 [R, sum of `heights`], what the host multiplied -> products [R, rows] by name, as
    `multiply` gives them. `heights`: matrix -> its columns of `raw`, one matrix after another."""
    parts, at = {}, 0
    for name, height in heights.items():
        parts[name] = raw[:, at : at + height].astype(dtype)
        at += height
    return {
        group.product: COMBINE[group.combine](
            *(parts[leaf] for leaf in group.leaves), how=group.how
        )
        for group in stage.groups
        if group.leaves[0] in parts
    }


def call(
    function: Function, flow: Mapping, weights: Mapping, products: Mapping | None = None
) -> dict:
    """The results of a stage's function, by name.

    A product may be a list: the parts of its row ranges, which are joined first.
    """
    joined = {name: join(parts) for name, parts in (products or {}).items()}
    whole = {leaf: weights[leaf] for leaf in function.whole}
    reads = [flow[name] for name in function.reads]
    results = FUNCTIONS[function.name](joined, whole, *reads, how=function.how)
    return dict(zip(function.gives, results, strict=True))


def join(parts):
    """Joins the products of row ranges, each [R, rows], along the last axis."""
    if not isinstance(parts, (list, tuple)):
        return parts
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _linear(stage, group, x, weights, leaf, adapters):
    more, factor = None, None
    if added := dict(group.added).get(leaf):
        a, b = (weights[name] for name in low_rank_names(leaf))
        more = low_rank_product(x, a, b, added, adapters)
        if added.has_lengths:
            factor = row_factors(weights[leaf], a, b, weights[lengths_name(leaf)], added)
    given = x, weights[leaf], weights.get(bias_name(leaf)), more, factor
    return final_logits(exact_linear(*given), stage.logits) if stage.logits else linear(*given)


def _norm(x, whole, how: NormAt | None):
    if how is None:
        return x
    return normed(x, how.norm, whole.get(how.weight), whole.get(how.bias))


def _normed(products, whole, hidden, *, how):
    """hidden [R, D] -> its norm [R, D], the input of a stage; itself where there is no norm."""
    return (_norm(hidden, whole, how),)


def _attend(products, whole, cache, rows, *, how: Attention):
    """Projected q [R, N*H], k and v [R, K*H] -> ([R, N*H], the cache with k and v).

    q and k get the rotary embedding. Attention takes the rows' own k and v as they are here, and
    those of earlier rows from the cache. Where heads have gates, q is [R, N*2H].
    """
    gate = None
    if how.has_gate:
        products, gate = _gate_apart(products, how)
    q, k, v = _queries_keys_values(products, whole, how)
    norms = how.head_norms
    if norms and not norms.after_rope:
        q, k = _head_norm(q, norms.q, whole, norms), _head_norm(k, norms.k, whole, norms)
    if how.rope:
        q, k = (rotate(each, rows.positions, how.rope, rows.is_long) for each in (q, k))
    if norms and norms.after_rope:
        q, k = _head_norm(q, norms.q, whole, norms), _head_norm(k, norms.k, whole, norms)
    if how.grows:
        q = grown(q, rows.positions, how.grows)
    if how.value_norm:
        v = normed(v, how.value_norm)
    # Written first: so the cache's memory is reused, and no copy of it is made.
    cache = write(cache, k, v, rows.view(how.window))
    mixed = attention(q, k, v, cache, rows, how, whole.get(SINKS))
    if gate is not None:
        mixed = mixed * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(mixed.dtype)
    return mixed, cache


def _gate_apart(products, how):
    """(the products with queries alone, gates [R, N*H]) of queries with a gate after each."""
    rows = products["q_proj"].shape[0]
    heads = products["q_proj"].reshape(rows, how.n_heads, -1)
    q, gate = (half.reshape(rows, -1) for half in jnp.split(heads, 2, axis=-1))
    return {**products, "q_proj": q}, gate


def _queries_keys_values(products, whole, how):
    """q [R, N, H], k and v [R, K, H], from one matrix or several."""
    n, kv, h = how.n_heads, how.n_kv_heads, how.head_dim
    if "qkv_proj" in products:
        parts = jnp.split(products["qkv_proj"], [n * h, (n + kv) * h], axis=-1)
    else:
        names = ("q_proj", "k_proj", "k_proj" if how.keys_are_values else "v_proj")
        parts = [products[name] for name in names]
    norms = how.head_norms
    if norms and norms.over == "flat":
        leaves = (norms.q, norms.k)
        parts[:2] = [
            normed(part, norms.norm, whole[name])
            for part, (name,) in zip(parts, leaves, strict=False)
        ]
    if how.clip:
        parts = [jnp.clip(part, -how.clip, how.clip) for part in parts]
    return [part.reshape(part.shape[0], -1, h) for part in parts]


def _head_norm(x, names, whole, norms):
    """x [R, heads, H] normed head by head."""
    if norms.over == "flat":
        return x  # before it was split
    if not norms.norm.has_weight:
        return normed(x, norms.norm)
    weights = [whole[name] for name in names]
    return normed(x, norms.norm, weights[0] if len(weights) == 1 else jnp.stack(weights))


def _join(products, whole, hidden, *, how: Join):
    """Adds a branch's output [R, D] to hidden [R, D]."""
    (output,) = products.values()
    output = _norm(output, whole, how.after)
    hidden = hidden + scaled(output, Scale(how.scale))
    return (hidden * whole[how.scalar].astype(hidden.dtype)[None] if how.scalar else hidden,)


def _join_and_norm(products, whole, hidden, *, how: Join):
    """Adds a branch's output [R, D] to hidden [R, D] -> (hidden, the next stage's input)."""
    (joined,) = _join(products, whole, hidden, how=how)
    return joined, _norm(hidden if how.is_parallel else joined, whole, how.following)


def _join_mixed(products, whole, hidden, mixed, *, how: Join):
    """Adds the sum of the experts' outputs [R, D] to hidden [R, D]."""
    return _join({"mixed": mixed.astype(hidden.dtype)}, whole, hidden, how=how)


def _join_both(products, whole, hidden, mixed, *, how: JoinBoth):
    """Adds an MLP's output [R, D] and the sum of the experts' beside it to hidden [R, D]."""
    (output,) = products.values()
    output = _norm(output, whole, how.after_shared)
    mixed = _norm(mixed.astype(hidden.dtype), whole, how.after_experts)
    return _join({"both": output + mixed}, whole, hidden, how=how.join)


def _pass_on(products, whole, *, how):
    """Passes the only product on as the input of the next stage."""
    (output,) = products.values()
    return (output,)


def _activate(products, whole, *, how: Mlp):
    """The inner activation of an MLP whose gate is not a matrix of its own, or that has none."""
    (inner,) = products.values()
    if how.form == "plain":
        return (ACTIVATION[how.activation](inner),)
    if how.form == "interleaved":
        return (clamped(inner[:, 0::2], inner[:, 1::2], how.clamped),)
    return (gated(*jnp.split(inner, 2, axis=-1), activation=how.activation),)


def _only(product, *, how):
    return product


def _gated(gate, up, *, how):
    return gated(gate, up, activation=how)


def _clamped(gate, up, *, how: Clamped):
    return clamped(gate, up, how)


# The functions that the tables of `families` name.
FUNCTIONS = {
    "normed": _normed,
    "attend": _attend,
    "query_latent": query_latent,
    "attend_latent": attend_latent,
    "gated_delta": gated_delta,
    "join": _join,
    "join_and_norm": _join_and_norm,
    "join_mixed": _join_mixed,
    "join_both": _join_both,
    "route": route,
    "mix_shared": mix_shared,
    "mix_expert": mix_expert,
    "pass_on": _pass_on,
    "activate": _activate,
}
COMBINE = {None: _only, "gated": _gated, "clamped": _clamped}
