"""The key/value cache of one layer: make, append. What a position holds counts only up to the
query's own position.

Nothing records a length: a query at position p sees entries 0..p, so cutting the cache back is
going on from an earlier position, and what was there is overwritten before it is seen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jlayer.families.base import CacheSpec
from jlayer.spec import ModelConfig


@struct.dataclass
class LayerCache:
    """Keys (after rotary embedding) and values of one layer, indexed by position."""

    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, H]


def cache_struct(
    spec: CacheSpec, cfg: ModelConfig, *, batch: int, capacity: int, dtype: str
) -> LayerCache:
    """The shapes of a layer's cache, to compile from; `capacity` is S."""
    shapes = spec.entry_shapes(cfg, batch=batch, capacity=capacity)
    return LayerCache(**{name: jax.ShapeDtypeStruct(own, dtype) for name, own in shapes.items()})


def empty_cache(
    spec: CacheSpec, cfg: ModelConfig, *, batch: int, capacity: int, dtype: str
) -> LayerCache:
    """A layer's cache before the first token."""
    struct = cache_struct(spec, cfg, batch=batch, capacity=capacity, dtype=dtype)
    return jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), struct)


def append(cache: LayerCache, k, v, positions) -> LayerCache:
    """The cache with k, v [B, T, K, H] written at positions [B, T]; a position of S or more
    (padding) is dropped.

    A scatter, since `dynamic_update_slice` past the end would move the write back onto earlier
    entries without a word.
    """
    rows = jnp.arange(k.shape[0])[:, None]

    def write(entry, new):
        return entry.at[rows, positions].set(new, mode="drop", unique_indices=False)

    return LayerCache(k=write(cache.k, k), v=write(cache.v, v))
