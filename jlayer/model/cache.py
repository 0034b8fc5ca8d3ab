"""The key/value entries of one layer, for all lanes: a pool of rows. Make, write.

Which row belongs to which lane and position is not stored here: each lane has a table of its rows,
which comes with every sweep. A row that no table lists is free, whatever it holds.

Numbers of 16 bits are kept as their bits: XLA's CPU scatter has no 16-bit floats, so it would cast
the whole pool to float32 and back to write one row (a pool of 4,096 rows: 2.3 ms against 0.02).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import struct

from jlayer.families.base import CacheSpec

KEPT_AS = {"bfloat16": "uint16", "float16": "uint16"}


@struct.dataclass
class LayerCache:
    """Keys (after rotary embedding) and values of one layer, by pool row; see `gathered`."""

    k: jax.Array  # [P, K, H]
    v: jax.Array  # [P, K, H]


@struct.dataclass
class View:
    """A chunk's rows in the pools of layers with a window, all int32: as in `Rows`, but for
    `first`: the position of the first entry in each lane's table."""

    write: jax.Array  # [R]
    table: jax.Array  # [B, S]
    length: jax.Array  # [B]
    first: jax.Array  # [B]


@struct.dataclass
class Rows:
    """What attention needs to know of a chunk's rows, all int32 but `seen`.

    The first B*T rows are a pane: B lanes with T rows each. A row of lane b sees the first
    `length[b]` entries of the lane's table, and the rows of its lane that `seen` marks: its
    ancestors in the chunk, and itself. `fresh`: where the ancestors came in earlier chunks of one
    tree, the pool rows of the tree so far, this chunk's own among them, and `fresh_positions` their
    positions: `seen` is over these then. `is_long`: whether a row's text is longer than the length
    at which its model's rotary embedding switches; None where none does. `windows`: the rows in the
    pools of layers with a window that have fewer rows, by window. `flash`: whether the device has
    flash attention for the compute dtype and the head size. It is no array: a program is compiled
    for it.
    """

    positions: jax.Array  # [R]
    write: jax.Array  # [R] the pool row that each is written to; beyond the pool: none
    table: jax.Array  # [B, S] pool rows; beyond the pool from `length` on
    length: jax.Array  # [B]
    seen: jax.Array  # [B, T, T], or [B, T, M] with `fresh`; bool
    fresh: jax.Array | None = None  # [B, M] pool rows; beyond the pool: none
    fresh_positions: jax.Array | None = None  # [B, M]
    is_long: jax.Array | None = None  # [R] bool
    windows: dict[int, View] = struct.field(default_factory=dict)
    flash: bool = struct.field(pytree_node=False, default=False)

    def view(self, window: int | None) -> Rows | View:
        """These rows in the pools of layers with this window."""
        return self.windows.get(window, self)


def cache_struct(spec: CacheSpec, *, n_rows: int, dtype: str) -> LayerCache:
    """The shapes of a layer's pool, for compiling; `n_rows` is P."""
    shapes, kept = spec.entry_shapes(n_rows=n_rows), KEPT_AS.get(dtype, dtype)
    return LayerCache(**{name: jax.ShapeDtypeStruct(shape, kept) for name, shape in shapes.items()})


def rows_struct(
    *,
    n_rows: int,
    lanes: int,
    tokens: int,
    capacity: int,
    fresh: int | None = None,
    windows: Mapping[int, int] = MappingProxyType({}),
    switches: bool = False,
) -> Rows:
    """The shapes of a chunk's `Rows`: R, B, T and S, and M where there are `fresh` rows. `windows`:
    the S of each window. `switches`: whether the rotary embedding does, for long texts."""

    def numbers(*shape):
        return jax.ShapeDtypeStruct(shape, "int32")

    return Rows(
        positions=numbers(n_rows),
        write=numbers(n_rows),
        table=numbers(lanes, capacity),
        length=numbers(lanes),
        windows={
            size: View(numbers(n_rows), numbers(lanes, own), numbers(lanes), numbers(lanes))
            for size, own in windows.items()
        },
        is_long=jax.ShapeDtypeStruct((n_rows,), "bool") if switches else None,
        seen=jax.ShapeDtypeStruct((lanes, tokens, fresh or tokens), "bool"),
        fresh=fresh and jax.ShapeDtypeStruct((lanes, fresh), "int32"),
        fresh_positions=fresh and jax.ShapeDtypeStruct((lanes, fresh), "int32"),
    )


def empty_cache(spec: CacheSpec, *, n_rows: int, dtype: str) -> LayerCache:
    """A layer's pool of zeros."""
    shapes = cache_struct(spec, n_rows=n_rows, dtype=dtype)
    return jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), shapes)


def write(cache: LayerCache, k, v, rows: Rows | View) -> LayerCache:
    """The pool with k, v [R, K, H] in the rows that `rows.write` says; padding is dropped."""

    def written(entry, new):
        if new.dtype != entry.dtype:
            new = jax.lax.bitcast_convert_type(new, entry.dtype)
        return entry.at[rows.write].set(new, mode="drop")

    return LayerCache(k=written(cache.k, k), v=written(cache.v, v))


def gathered(entry, table, dtype):
    """The keys or values of a pool [P, K, H] in the rows of `table` [B, S] -> [B, S, K, H]; zeros
    for rows beyond the pool."""
    found = entry.at[table].get(mode="fill", fill_value=0)
    return found if found.dtype == dtype else jax.lax.bitcast_convert_type(found, dtype)
