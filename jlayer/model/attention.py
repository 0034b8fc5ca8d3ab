"""Grouped-query attention over a layer's cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlayer.model.cache import LayerCache
from jlayer.model.products import exact_for
from jlayer.spec import query_pieces


def attention(q, cache: LayerCache, positions):
    """q [B, T, N, H] at positions [B, T] -> [B, T, N*H]; each query sees the cache up to its own
    position.

    Scores and softmax are float32. Query head n reads key/value head n // G.
    """
    b, t, n, h = q.shape
    pieces = query_pieces(batch=b, tokens=t, n_heads=n, capacity=cache.k.shape[1])
    if pieces == 1:
        return _attend(q, cache, positions)
    split = (b, pieces, t // pieces)
    mixed = jax.lax.map(
        lambda piece: _attend(piece[0], cache, piece[1]),
        (q.reshape(*split, n, h).swapaxes(0, 1), positions.reshape(split).swapaxes(0, 1)),
    )
    return mixed.swapaxes(0, 1).reshape(b, t, n * h)


def _attend(q, cache, positions):
    b, t, n, h = q.shape
    s, k = cache.k.shape[1:3]
    grouped = q.reshape(b, t, k, n // k, h)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped,
        cache.k,
        precision=exact_for(q.dtype),
        preferred_element_type=jnp.float32,
    ) * (h**-0.5)
    seen = jnp.arange(s, dtype=jnp.int32)[None, None] <= positions[:, :, None]  # [B, T, S]
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights,
        cache.v,
        precision=exact_for(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return mixed.astype(q.dtype).reshape(b, t, n * h)
