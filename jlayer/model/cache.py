"""The key/value cache of one layer: make, append.

No length is stored: a query at position p sees entries 0..p. To cut the cache back, go on from an
earlier position; later entries are overwritten before any query sees them.
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
    """The shapes of a layer's cache, for compiling; `capacity` is S."""
    shapes = spec.entry_shapes(cfg, batch=batch, capacity=capacity)
    return LayerCache(
        **{name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    )


def empty_cache(
    spec: CacheSpec, cfg: ModelConfig, *, batch: int, capacity: int, dtype: str
) -> LayerCache:
    """A layer's cache before the first token."""
    shapes = cache_struct(spec, cfg, batch=batch, capacity=capacity, dtype=dtype)
    return jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), shapes)


def append(cache: LayerCache, k, v, positions) -> LayerCache:
    """The cache with k, v [B, T, K, H] written at positions [B, T]; a position of S or more
    (padding) is dropped.

    Uses a scatter: `dynamic_update_slice` past the end would silently shift the write back onto
    earlier entries.
    """
    rows = jnp.arange(k.shape[0])[:, None]

    def write(entry, new):
        return entry.at[rows, positions].set(new, mode="drop", unique_indices=False)

    return LayerCache(k=write(cache.k, k), v=write(cache.v, v))
