"""The cache of one layer, for all lanes: a pool of rows, or of slots. Make, read, write.

A row holds the key and value of a token. Which row belongs to which lane and position is not stored
here: each lane has a table of its rows, which comes with every sweep. A row that no table lists is
free, whatever it holds. A slot holds the state of a lane after some token. A state cannot be cut
back, so a sweep reads it from one slot and may write to another.

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
class LatentCache:
    """What latent attention keeps of each token, by pool row: see `spec.Latent`."""

    latent: jax.Array  # [P, 1, L] the normed latent, and the part of the key that is turned


@struct.dataclass
class View:
    """A chunk's rows in the pools of layers with a window, all int32: as in `Rows`, but for
    `first`: the position of the first entry in each lane's table."""

    write: jax.Array  # [R]
    table: jax.Array  # [B, S]
    length: jax.Array  # [B]
    first: jax.Array  # [B]


@struct.dataclass
class StateCache:
    """What a gated DeltaNet keeps of the tokens before, by slot; see `read_state`."""

    conv: jax.Array  # [slots, C, W-1] the last inputs of the convolution, oldest first
    state: jax.Array  # [slots, N, H, E] float32


@struct.dataclass
class Rows:
    """What a mixer needs to know of a chunk's rows, all int32 but where it says so.

    The first B*T rows are a pane: B lanes with T rows each. A row of lane b sees the first
    `length[b]` entries of the lane's table, and the rows of its lane that `seen` marks: its
    ancestors in the chunk, and itself. `fresh`: where the ancestors came in earlier chunks of one
    tree, the pool rows of the tree so far, this chunk's own among them, and `fresh_positions` their
    positions: `seen` is over these then. `is_long`: whether a row's text is longer than the length
    at which its model's rotary embedding switches; None where none does. `windows`: the rows in the
    pools of layers with a window that have fewer rows, by window. `flash`: whether the device has
    flash attention for the compute dtype and the head size. It is no array: a program is compiled
    for it.

    The next are there for a model with states. `kept`: the rows that are certain: of each lane none
    or a chain from its first row on. The others are guesses or padding: they see the kept ones, but
    do not enter the state. `is_chain`: whether `seen` is the lower triangle for all lanes; long
    panes take less arithmetic then. It is no array either.
    """

    positions: jax.Array  # [R]
    write: jax.Array  # [R] the pool row that each is written to; beyond the pool: none
    table: jax.Array  # [B, S] pool rows; beyond the pool from `length` on
    length: jax.Array  # [B]
    seen: jax.Array  # bool [B, T, T], or [B, T, M] with `fresh`
    fresh: jax.Array | None = None  # [B, M] pool rows; beyond the pool: none
    fresh_positions: jax.Array | None = None  # [B, M]
    is_long: jax.Array | None = None  # bool [R]
    windows: dict[int, View] = struct.field(default_factory=dict)
    source: jax.Array | None = None  # [B] the slot of each lane's state; beyond the pool: zeros
    target: jax.Array | None = None  # [B] the slot it is written to; beyond the pool: none
    kept: jax.Array | None = None  # bool [B, T]
    flash: bool = struct.field(pytree_node=False, default=False)
    is_chain: bool = struct.field(pytree_node=False, default=False)

    def view(self, window: int | None) -> Rows | View:
        """These rows in the pools of layers with this window."""
        return self.windows.get(window, self)

    def written(self, spec: CacheSpec) -> jax.Array:
        """The rows or slots of a layer's pool that are written."""
        return self.target if spec.kind == "state" else self.view(spec.window).write


Cache = LayerCache | LatentCache | StateCache
# The names of a cache's arrays -> its class.
CACHES = {
    ("k", "v"): LayerCache,
    ("latent",): LatentCache,
    ("conv", "state"): StateCache,
}


def cache_struct(spec: CacheSpec, *, n_rows: int, dtype: str) -> Cache:
    """The shapes of a layer's pool, for compiling; `n_rows`: its rows or slots."""
    shapes, kept = spec.entry_shapes(n_rows=n_rows), KEPT_AS.get(dtype, dtype)
    return CACHES[tuple(array.name for array in spec.arrays)](
        **{
            array.name: jax.ShapeDtypeStruct(shapes[array.name], array.dtype or kept)
            for array in spec.arrays
        }
    )


def rows_struct(
    *,
    n_rows: int,
    lanes: int,
    tokens: int,
    capacity: int,
    fresh: int | None = None,
    windows: Mapping[int, int] = MappingProxyType({}),
    switches: bool = False,
    has_state: bool = False,
    is_chain: bool = False,
) -> Rows:
    """The shapes of a chunk's `Rows`: R, B, T and S, and M where there are `fresh` rows. `windows`:
    the S of each window. `switches`: whether the rotary embedding does, for long texts.
    `has_state`: with what a model with states needs; `is_chain`: see `Rows`."""

    def numbers(*shape):
        return jax.ShapeDtypeStruct(shape, "int32")

    slots = numbers(lanes) if has_state else None
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
        source=slots,
        target=slots,
        kept=jax.ShapeDtypeStruct((lanes, tokens), "bool") if has_state else None,
        is_chain=is_chain,
    )


def empty_cache(spec: CacheSpec, *, n_rows: int, dtype: str) -> Cache:
    """A layer's pool of zeros."""
    shapes = cache_struct(spec, n_rows=n_rows, dtype=dtype)
    return jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), shapes)


def write(cache: LayerCache, k, v, rows: Rows | View) -> LayerCache:
    """The pool with k, v [R, K, H] in the rows that `rows.write` says; padding is dropped."""
    k, v = (_written(old, new, rows.write) for old, new in ((cache.k, k), (cache.v, v)))
    return LayerCache(k=k, v=v)


def write_latent(cache: LatentCache, entries, rows: Rows | View) -> LatentCache:
    """The pool with entries [R, 1, L] in the rows that `rows.write` says; padding is dropped."""
    return LatentCache(_written(cache.latent, entries, rows.write))


def read_state(cache: StateCache, source, dtype):
    """The states in the slots `source` [B] -> (conv [B, C, W-1] in `dtype`, state [B, N, H, E]);
    zeros for slots beyond the pool."""
    lanes = len(source)
    if lanes == 1:
        # XLA makes a slice of a single entry, which it takes anew for whatever reads it: then it
        # must copy the whole pool before it writes to it (a pool of 64 states of 2 MiB: 134 MiB).
        source = jnp.pad(source, (0, 1), constant_values=len(cache.state))
    conv, state = gathered(cache.conv, source, dtype), gathered(cache.state, source, jnp.float32)
    return conv[:lanes], state[:lanes]


def write_state(cache: StateCache, target, conv, state) -> StateCache:
    """The cache with states, as `read_state` gives them, in the slots `target` [B]; those of slots
    beyond the pool are dropped."""
    conv = _written(cache.conv, conv, target)
    return StateCache(conv=conv, state=_written(cache.state, state, target))


def _written(pool, entries, where):
    if entries.dtype != pool.dtype:
        entries = jax.lax.bitcast_convert_type(entries, pool.dtype)
    return pool.at[where].set(entries, mode="drop")


def gathered(pool, where, dtype):
    """The entries of a pool [P, ...] in its rows or slots `where` [...] -> [..., ...]; zeros for
    those beyond the pool."""
    found = pool.at[where].get(mode="fill", fill_value=0)
    return found if found.dtype == dtype else jax.lax.bitcast_convert_type(found, dtype)
