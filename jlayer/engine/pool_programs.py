"""The programs that make, widen and read the pools of caches. With several devices each has the
keys and values of its own heads, where they divide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.families.base import CacheSpec, LayerKind, rows_cache
from jlayer.model.cache import Cache, cache_struct, empty_cache
from jlayer.plan.dealing import deals_heads
from jlayer.streaming.devices import HEADS, Devices

HEADS_AXIS = 1  # of the entries of a pool


class PoolPrograms:
    """`get`: see `Programs.get`."""

    def __init__(self, devices: Devices, *, dtype: str, get: Callable):
        self._devices, self._dtype, self._get = devices, dtype, get

    def deals_heads(self, kind: LayerKind) -> bool:
        """Whether each device has its own heads of a layer of this kind."""
        return deals_heads(kind.attention, len(self._devices))

    def over(self, kind: LayerKind) -> jax.sharding.Sharding:
        """Where the arrays of a pool are."""
        axes = [None] * HEADS_AXIS
        return self._devices.over(*axes, HEADS if self.deals_heads(kind) else None)

    def of_host(self, kind: LayerKind) -> CacheSpec:
        """What one host has of each entry."""
        return self._part(kind, self._devices.n_hosts)

    def fetch(self, entries: jax.Array) -> np.ndarray:
        """What this host has of the entries of a pool."""
        return self._devices.fetch_own(entries, HEADS_AXIS)

    def put(self, kind: LayerKind, room: Cache) -> Cache:
        """Begins to put what this host has of a pool."""
        return self._devices.put_own(room, self.over(kind))

    def struct(self, kind: LayerKind, n_rows: int) -> Cache:
        """The shapes of a pool of a layer, and where they are."""
        sharding = self.over(kind)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            cache_struct(kind.cache, n_rows=n_rows, dtype=self._dtype),
        )

    def empty(self, kind: LayerKind, *, n_rows: int) -> Callable:
        """The program () -> an empty pool of a layer, allocated on the devices."""
        own = self._part(kind, len(self._devices))

        def make():
            return empty_cache(own, n_rows=n_rows, dtype=self._dtype)

        return self._get(f"pool {n_rows}", (kind.cache,), make, (), results=self.over(kind))

    def grown(self, kind: LayerKind, *, before: int, n_rows: int) -> Callable:
        """The program (a pool of `before` rows) -> the same with `n_rows` rows."""

        def grow(cache):
            return jax.tree.map(
                lambda entry: jnp.pad(entry, ((0, n_rows - before), *[(0, 0)] * (entry.ndim - 1))),
                cache,
            )

        label, given = f"pool {before} to {n_rows}", (self.struct(kind, before),)
        return self._get(label, (kind.cache,), grow, given, results=self.over(kind))

    def written(self, kind: LayerKind, *, pool: int, n_rows: int) -> Callable:
        """The program (a pool, rows [R]) -> the entries in these rows, [R, ...] each."""

        def rows_of(cache, rows):
            return jax.tree.map(lambda entry: entry.at[rows].get(mode="clip"), cache)

        given = (self.struct(kind, pool), jax.ShapeDtypeStruct((n_rows,), "int32"))
        label, how = f"written rows {n_rows} of {pool}", {"reuses": False}
        return self._get(label, (kind.cache,), rows_of, given, results=self.over(kind), **how)

    def placed(self, kind: LayerKind, *, pool: int, n_rows: int) -> Callable:
        """The program ({rows [R], entries [R, ...]}, a pool) -> the pool with these entries in
        these rows; rows beyond the pool are dropped."""

        def place(given, cache):
            def into(entry, new):
                return entry.at[given["rows"]].set(new, mode="drop")

            return jax.tree.map(into, cache, given["entries"])

        rows = jax.ShapeDtypeStruct((n_rows,), "int32")
        given = {"rows": rows, "entries": self.struct(kind, n_rows)}
        label, args = f"placed rows {n_rows} of {pool}", (given, self.struct(kind, pool))
        return self._get(label, (kind.cache,), place, args, results=self.over(kind))

    def _part(self, kind, n):
        """Of each entry what there is in each of `n` equal parts of the devices."""
        if not self.deals_heads(kind):
            return kind.cache
        n_kv_heads = kind.attention.n_kv_heads // n
        return rows_cache(replace(kind.attention, n_kv_heads=n_kv_heads))
