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
from jlayer.model.cache import append
from jlayer.model.ops import gated, linear, rms_norm, rotate
from jlayer.model.products import product
from jlayer.spec import ModelConfig


@lru_cache(maxsize=64)
def block(kind: LayerKind) -> Callable:
    """The pure function of one decoder layer of this kind.

    (layer, hidden [B, T, D], cache, positions [B, T] int32, cfg) -> (hidden [B, T, D], cache with
    these T tokens). `layer`: weights by leaf, in the published layout; a projection is [out, in].
    Compiled once, it serves every layer of the kind.
    """

    def layer_of_this_kind(layer, hidden, cache, positions, cfg: ModelConfig):
        flow = {"hidden": hidden, "cache": cache, "positions": positions}
        for stage in kind.stages:
            if stage.input:
                flow |= call(stage.input, flow, layer, cfg=cfg)
            products = multiply(stage, flow.pop("x"), layer, cfg=cfg)
            flow |= call(stage.finish, flow, layer, products, cfg=cfg)
        return flow["hidden"], flow["cache"]

    return layer_of_this_kind


def multiply(stage: Stage, x, weights: Mapping, *, cfg: ModelConfig) -> dict:
    """x [B, T, in] times some rows of a stage's matrices -> products [B, T, rows] by name.

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
    """Joins the products of row ranges, each [B, T, rows], along the last axis."""
    if not isinstance(parts, (list, tuple)):
        return parts
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _linear(stage, x, weights, leaf):
    if stage.logits:
        return product(x, weights[leaf])
    return linear(x, weights[leaf], weights.get(bias_name(leaf)))


def _normed(products, norm, hidden, *, cfg):
    """hidden [B, T, D] -> its norm [B, T, D], the input of a stage."""
    return (rms_norm(hidden, norm, eps=cfg.rms_norm_eps),)


def _attend(products, cache, positions, *, cfg):
    """Projected q [B, T, N*H], k and v [B, T, K*H] -> ([B, T, N*H], the cache with k and v).

    q and k get the rotary embedding; k and v are written to the cache before attention reads it.
    """

    def heads(projected):
        return projected.reshape(*projected.shape[:2], -1, cfg.head_dim)

    q, k = (rotate(heads(products[name]), positions, cfg) for name in ("q_proj", "k_proj"))
    cache = append(cache, k, heads(products["v_proj"]), positions)
    return attention(q, cache, positions), cache


def _add_and_norm(products, norm, hidden, *, cfg):
    """Adds a branch's output [B, T, D] to hidden [B, T, D] -> (hidden, its norm)."""
    (output,) = products.values()
    hidden = hidden + output
    return hidden, rms_norm(hidden, norm, eps=cfg.rms_norm_eps)


def _add(products, hidden, *, cfg):
    """Adds a branch's output [B, T, D] to hidden [B, T, D]."""
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
