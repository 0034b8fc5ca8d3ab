"""What a layer is gone back through with: the products of frozen matrices whose inputs alone have a
gradient, what an adapter adds to them, and the loss with its head in ranges of rows.

Gradients of inputs are summed in float32 over ranges of rows: of y = x W^T that of x is the sum of
dy[rows] W[rows].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jlayer.encodings.grouped import block_rows
from jlayer.families.base import Stage, bias_name
from jlayer.model.ops import final_logits
from jlayer.model.products import (
    Encoded,
    InputsFirst,
    ScaledRows,
    decoded_rows,
    exact_for,
    product,
)
from jlayer.model.stages import COMBINE
from jlayer.parts import Logits


@struct.dataclass
class LowRank:
    """What an adapter has for some rows of a matrix, float32: `scale` * B A is added to them."""

    a: jax.Array  # [rank, in]
    b: jax.Array  # [rows, rank]
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class Noise:
    """Dropout of an adapter's inputs: each is kept with probability 1 - `rate`."""

    key: jax.Array
    rate: float = struct.field(pytree_node=False)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_product(x, weight, dtype):
    """x float32 [R, in], rounded to `dtype`, times weight [out, in] of any encoding -> float32
    [R, out]. The weight has no gradient."""
    return product(x.astype(dtype), weight)


def _frozen_product(x, weight, dtype):
    return frozen_product(x, weight, dtype), (weight, x)


def _frozen_product_back(dtype, given, dy):
    weight, x = given
    return product_back(dy.astype(dtype), weight, x.shape[-1]), None


frozen_product.defvjp(_frozen_product, _frozen_product_back)


def product_back(dy, weight, width: int):
    """dy [R, out] times weight [out, in] of any encoding -> float32 [R, in]; `width` is in."""
    if isinstance(weight, InputsFirst):
        return _dot(dy, weight.matrix.astype(dy.dtype), 1)
    if isinstance(weight, ScaledRows):
        return _dot((dy * weight.scale[None]).astype(dy.dtype), weight.q.astype(dy.dtype), 0)
    if isinstance(weight, Encoded):
        return _decoded_back(dy, weight, width)
    return _dot(dy, weight.astype(dy.dtype), 0)


def _dot(left, right, right_axis):
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (right_axis,)), ((), ())),
        precision=exact_for(left.dtype),
        preferred_element_type=jnp.float32,
    )


def _decoded_back(dy, weight, width):
    """A block of rows is decoded at a time, as in a product."""
    n_rows = weight.n_rows
    height = block_rows(n_rows, width * dy.dtype.itemsize, weight.block_bytes)

    def of_rows(first, count):
        rows = jax.lax.dynamic_slice_in_dim(dy, first, count, axis=1)
        return _dot(rows, decoded_rows(weight, first, count, width).astype(dy.dtype), 0)

    n_whole, rest = divmod(n_rows, height)

    def add(total, first):
        return total + of_rows(first, height), None

    total = jnp.zeros((dy.shape[0], width), jnp.float32)
    firsts = jnp.arange(n_whole, dtype=jnp.int32) * height
    total = add(total, 0)[0] if n_whole == 1 else jax.lax.scan(add, total, firsts)[0]
    return total + of_rows(n_whole * height, rest) if rest else total


def multiply(stage: Stage, x, weights: Mapping, low_ranks: Mapping, noises: Mapping, dtype) -> dict:
    """x float32 [R, in] times some rows of a stage's matrices -> products [R, rows] in `dtype`, by
    name: as `stages.multiply` gives them, with gradients of x and of the low ranks alone.

    `low_ranks`: by matrix, of the same rows; `noises`: the same, where some inputs are dropped.
    """
    found = {}
    for group in stage.groups:
        if group.leaves[0] not in weights:
            continue
        parts = [
            _linear(x, leaf, weights, low_ranks.get(leaf), noises.get(leaf), dtype)
            for leaf in group.leaves
        ]
        found[group.product] = COMBINE[group.combine](*parts, how=group.how)
    return found


def _linear(x, leaf, weights, low_rank, noise, dtype):
    y = frozen_product(x, weights[leaf], dtype)
    if low_rank is not None:
        own = x.astype(dtype).astype(jnp.float32)  # as the matrix has it
        if noise is not None:
            kept = jax.random.bernoulli(noise.key, 1 - noise.rate, own.shape)
            own = jnp.where(kept, own / (1 - noise.rate), 0)
        y = y + low_rank.scale * _exact(_exact(own, low_rank.a), low_rank.b)
    bias = weights.get(bias_name(leaf))
    return (y if bias is None else y + bias.astype(jnp.float32)[None]).astype(dtype)


def _exact(x, matrix):
    """float32 [R, in] times [out, in] -> [R, out]."""
    return _dot(x, matrix, 1)


@struct.dataclass
class HeadSums:
    """What is known of some rows' losses from the rows of the head so far, all float32.

    With the logits l of all v so far: `top` their highest, `total` the sum of exp(l - top), `pull`
    the same sum with what the derivative of l by the head's input is, in the place of 1. `target`:
    the logit of the target, and `own` its derivative; zeros as long as it has not come.
    """

    top: jax.Array  # [R]
    total: jax.Array  # [R]
    pull: jax.Array  # [R, D]
    target: jax.Array  # [R]
    own: jax.Array  # [R, D]


def no_head_sums(n_rows: int, width: int) -> HeadSums:
    """Before the first rows of the head."""
    zeros, wide = jnp.zeros(n_rows, jnp.float32), jnp.zeros((n_rows, width), jnp.float32)
    lowest = jnp.full(n_rows, jnp.finfo(jnp.float32).min, jnp.float32)
    return HeadSums(top=lowest, total=zeros, pull=wide, target=zeros, own=wide)


def add_head_rows(sums: HeadSums, x, weight, bias, targets, first, *, how: Logits) -> HeadSums:
    """The sums with some rows of the head: x [R, D], weight [v, D], bias [v] or None; `first`: the
    token of the first row, targets int32 [R].

    One time over the head gives the loss and its gradient, as attention by a running softmax does
    (arXiv 1805.02867): all logits of a row are never there.
    """
    raw = product(x, weight)
    raw = raw if bias is None else raw + bias.astype(jnp.float32)[None]
    logits, back = jax.vjp(lambda raw: final_logits(raw, how), raw)
    place = targets - first
    n_rows = raw.shape[1]
    is_here = (place >= 0) & (place < n_rows)
    hit = (place[:, None] == jnp.arange(n_rows)[None]) & is_here[:, None]
    top = jnp.maximum(sums.top, logits.max(axis=1))
    before, now = jnp.exp(sums.top - top), jnp.exp(logits - top[:, None])

    def pulled(by):
        (found,) = back(by)
        return product_back(found.astype(x.dtype), weight, x.shape[1])

    return HeadSums(
        top=top,
        total=sums.total * before + now.sum(axis=1),
        pull=sums.pull * before[:, None] + pulled(now),
        target=sums.target + jnp.where(hit, logits, 0).sum(axis=1),
        own=sums.own + pulled(hit.astype(jnp.float32)),
    )


def losses_of(sums: HeadSums) -> jax.Array:
    """-log p of each target, float32 [R]."""
    return jnp.log(sums.total) + sums.top - sums.target


def loss_back(sums: HeadSums, weights) -> jax.Array:
    """The gradient of sum(weights * losses) by the head's input, float32 [R, D]; weights [R]."""
    return weights[:, None] * (sums.pull / sums.total[:, None] - sums.own)
