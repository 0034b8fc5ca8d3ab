"""A decoder layer as a fold of its stages: all arithmetic of a layer.

`block(kind)` runs the stages of a kind over whole matrices. For tiles the engine runs the same
functions over ranges of rows and joins the products: the arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax.numpy as jnp

from jlayer.families.base import Function, LayerKind, Stage, bias_name
from jlayer.model.attention import attention
from jlayer.model.cache import write
from jlayer.model.ops import gated, linear, rms_norm, rotate
from jlayer.model.products import product
from jlayer.spec import ModelConfig


@lru_cache(maxsize=64)
def block(kind: LayerKind) -> Callable:
    """The pure function of one decoder layer of this kind.

    (layer, hidden [R, D], cache, rows, cfg) -> (hidden [R, D], cache with these R tokens).
    `layer`: weights by leaf, in the published layout; a projection is [out, in].
    Compiled once, it serves every layer of the kind.
    """

    def layer_of_this_kind(layer, hidden, cache, rows, cfg: ModelConfig):
        flow = {"hidden": hidden, "cache": cache, "rows": rows}
        for stage in kind.stages:
            if stage.input:
                flow |= call(stage.input, flow, layer, cfg=cfg)
            products = multiply(stage, flow.pop("x"), layer, cfg=cfg)
            flow |= call(stage.finish, flow, layer, products, cfg=cfg)
        return flow["hidden"], flow["cache"]

    return layer_of_this_kind


def multiply(stage: Stage, x, weights: Mapping, *, cfg: ModelConfig) -> dict:
    """x [R, in] times some rows of a stage's matrices -> products [R, rows] by name.

    `weights`: by leaf, the same rows of each matrix of a group, and of its bias. A group whose
    leaves are missing is skipped.
    """
    products = {}
    for group in stage.groups:
        if group.leaves[0] not in weights:
            continue
        parts = [_linear(stage, x, weights, leaf) for leaf in group.leaves]
        products[group.product] = COMBINE[group.combine](*parts, cfg=cfg)
    return products


def hosted_products(stage: Stage, raw, heights: Mapping[str, int], *, dtype, cfg) -> dict:
    """raw float32 [R, sum of `heights`], what the host multiplied -> products [R, rows] by name, as
    `multiply` gives them. `heights`: matrix -> its columns of `raw`, one matrix after another."""
    parts, at = {}, 0
    for name, height in heights.items():
        parts[name] = raw[:, at : at + height].astype(dtype)
        at += height
    return {
        group.product: COMBINE[group.combine](*(parts[leaf] for leaf in group.leaves), cfg=cfg)
        for group in stage.groups
        if group.leaves[0] in parts
    }


def call(
    function: Function, flow: Mapping, weights: Mapping, products: Mapping | None = None, *, cfg
) -> dict:
    """The results of a stage's function, by name.

    A product may be a list: the parts of its row ranges, which are joined first.
    """
    joined = {name: join(parts) for name, parts in (products or {}).items()}
    whole = [weights[leaf] for leaf in function.whole]
    reads = [flow[name] for name in function.reads]
    results = FUNCTIONS[function.name](joined, *whole, *reads, cfg=cfg)
    return dict(zip(function.gives, results, strict=True))


def join(parts):
    """Joins the products of row ranges, each [R, rows], along the last axis."""
    if not isinstance(parts, (list, tuple)):
        return parts
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _linear(stage, x, weights, leaf):
    if stage.logits:
        return product(x, weights[leaf])
    return linear(x, weights[leaf], weights.get(bias_name(leaf)))


def _normed(products, norm, hidden, *, cfg):
    """hidden [R, D] -> its norm [R, D], the input of a stage."""
    return (rms_norm(hidden, norm, eps=cfg.rms_norm_eps),)


def _attend(products, cache, rows, *, cfg):
    """Projected q [R, N*H], k and v [R, K*H] -> ([R, N*H], the cache with k and v).

    q and k get the rotary embedding. Attention takes the rows' own k and v as they are here, and
    those of earlier rows from the cache.
    """

    def heads(name):
        return products[name].reshape(products[name].shape[0], -1, cfg.head_dim)

    q, k = (rotate(heads(name), rows.positions, cfg) for name in ("q_proj", "k_proj"))
    v = heads("v_proj")
    # Written first: so the cache's memory is reused, and no copy of it is made.
    cache = write(cache, k, v, rows)
    return attention(q, k, v, cache, rows, cfg), cache


def _add_and_norm(products, norm, hidden, *, cfg):
    """Adds a branch's output [R, D] to hidden [R, D] -> (hidden, its norm)."""
    (output,) = products.values()
    hidden = hidden + output
    return hidden, rms_norm(hidden, norm, eps=cfg.rms_norm_eps)


def _add(products, hidden, *, cfg):
    """Adds a branch's output [R, D] to hidden [R, D]."""
    (output,) = products.values()
    return (hidden + output,)


def _pass_on(products, *, cfg):
    """Passes the only product on as the input of the next stage."""
    (output,) = products.values()
    return (output,)


def _only(product, *, cfg):
    return product


def _gated(gate, up, *, cfg):
    return gated(gate, up, activation=cfg.hidden_act)


# The functions that the tables of `families` name.
FUNCTIONS = {
    "normed": _normed,
    "attend": _attend,
    "add_and_norm": _add_and_norm,
    "add": _add,
    "pass_on": _pass_on,
}
COMBINE = {None: _only, "gated": _gated}
