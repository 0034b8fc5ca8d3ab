"""The devices of a model: what each has of every array.

An array is on all of them, or its rows are dealt out (`plan.dealing`). One table maps the words for
axes to axes of the mesh, and nothing else names those; with one device it is empty. With several
hosts the mesh is over the devices of all, in order of the process; a process puts to its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jlayer.plan.machine import PLATFORMS, platform_of
from jlayer.plan.tiles import Part, Tile
from jlayer.streaming import exchange
from jlayer.streaming.putting import putter

ROWS, HEADS = "rows", "kv_heads"
# Programs of several devices are launched one after another, whichever thread calls them, so that
# they are in the same order on each: where two exchange something, one device would be at the first
# of them and another at the second, and each would wait. (A finalizer may call one inside another.)
LAUNCHES = threading.RLock()
# Words for axes of arrays -> axes of the mesh of devices.
MESH_AXES = {ROWS: "devices", HEADS: "devices"}


class Devices:
    """Some devices, alike: `all`, of which `own` are of this process, as many as each has; `number`
    is its own. `first`: the one whose memory and link are measured. `collectives`: whether they
    exchange what each has by NCCL; `by_copies`: whether by the driver's copies."""

    def __init__(self, devices: Sequence[jax.Device]):
        self.all = tuple(devices)
        self.own = tuple(one for one in self.all if one.process_index == jax.process_index())
        self.n_hosts = len(self.all) // len(self.own)
        self.number = jax.process_index() if self.n_hosts > 1 else 0
        self.first = self.own[0]
        self.platform = platform_of(self.first.platform)
        self.has_link = PLATFORMS[self.platform].has_link
        self.mesh = Mesh(np.array(self.all), ("devices",)) if len(self) > 1 else None
        self.everywhere = self.over()
        how = {"has_link": self.has_link, "n_hosts": self.n_hosts}
        self.put = putter(self.own, self.everywhere, **how)
        self.by_copies, self.collectives = self._exchange()
        self._put_dealt = putter(self.own, self.over(ROWS), **how)

    def __len__(self) -> int:
        return len(self.all)

    def __str__(self) -> str:
        kinds = f"{self.first.platform}:{self.first.id} ({self.first.device_kind})"
        if len(self) == 1:
            return kinds
        each = f"{len(self.own)} x {self.first.device_kind}"
        return each if self.n_hosts == 1 else f"{self.n_hosts} hosts with {each}"

    def over(self, *axes: str | None) -> jax.sharding.Sharding:
        """Of an array with these axes, those that are in the table dealt out; all else is on every
        device."""
        if self.mesh is None:
            return SingleDeviceSharding(self.first)
        return NamedSharding(self.mesh, PartitionSpec(*(axis and MESH_AXES[axis] for axis in axes)))

    def _exchange(self):
        """(whether these exchange by the driver's copies, whether by NCCL, as XLA does between
        GPUs)."""
        if len(self) == 1 or not PLATFORMS[self.platform].collective_bytes:
            return False, False
        by_copies = self.n_hosts == 1 and exchange.begin(self.own, self.platform)
        return by_copies, not by_copies

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user; none is an error."""
        if not self.collectives or self.n_hosts > 1:
            return ()
        why = exchange.hindrance(self.own)
        return (f"the GPUs exchange by NCCL, which takes 450 MiB of each: {why}",)

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Inside a program that every device runs: what each has -> [devices, *x.shape] on each."""
        if self.by_copies:
            return exchange.all_gather(x, len(self))
        return jax.lax.all_gather(x, MESH_AXES[ROWS])

    def put_own(self, arrays, sharding):
        """Begins to put arrays: of an axis that is dealt out what this process has of it."""
        if self.n_hosts == 1:
            return jax.device_put(arrays, sharding)
        put = partial(jax.make_array_from_process_local_data, sharding)
        return jax.tree.map(put, arrays)

    def fetch_own(self, array: jax.Array, axis: int) -> np.ndarray:
        """What this process has of an array that is dealt out along an axis, if any; else all."""
        if self.n_hosts == 1 or isinstance(array, np.ndarray) or array.is_fully_replicated:
            return np.asarray(array)
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[axis].start)
        return np.concatenate([shard.data for shard in shards], axis=axis)

    def put_tile(self, tile: Tile, views):
        """Begins to put what was read of a tile: to each device its rows."""
        if len(self) == 1:
            return self.put(views)
        if tile.joined:
            (length,) = tile.joined.shape
            firsts = range(0, tile.n_devices * length, length)
            return self._put_dealt([views[first : first + length] for first in firsts])
        return {part.leaf: self._put_part(tile, part, views[part.leaf]) for part in tile.parts}

    def _put_part(self, tile, part, view):
        ranges = ranges_of(tile, part)
        if ranges is None:
            return self.put(view)
        return self._put_dealt([view[rows] for rows in ranges])

    def struct_of(self, tile: Tile):
        """The shapes of what `put_tile` gives."""
        if tile.joined:
            (length,), sharding = tile.joined.shape, self.over(ROWS) if len(self) > 1 else None
            shape = (len(self) * length,)
            return jax.ShapeDtypeStruct(shape, tile.joined.dtype, sharding=sharding)
        return {part.leaf: self._struct_of_part(tile, part) for part in tile.parts}

    def _struct_of_part(self, tile, part):
        ranges = ranges_of(tile, part)
        if ranges is None:
            return jax.ShapeDtypeStruct(part.shape, part.dtype)
        rows = ranges[0].stop - ranges[0].start
        shape = (len(self) * rows, *part.shape[1:])
        return jax.ShapeDtypeStruct(shape, part.dtype, sharding=self.over(ROWS))

    def on_each(self, function: Callable, args: tuple, results) -> Callable:
        """A function that each device runs on what it has of these arguments: shapes, with a
        sharding where something is dealt out. `results`: the sharding of what it returns."""
        if self.mesh is None:
            return function
        shardings = jax.tree.map(lambda leaf: leaf.sharding or self.everywhere, args)
        spec = partial(jax.tree.map, lambda sharding: sharding.spec)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=spec(shardings),
            out_specs=spec(results),
            check_vma=False,
        )


def ranges_of(tile: Tile, part: Part) -> list[slice] | None:
    """The rows of a part of a tile, or of its piece, that each device of this process has; None:
    each device of every process has all of them, and the same."""
    if part.is_for_all_rows:
        return None
    deal = tile.deal_of(part.n_rows)
    if deal is not None:
        return [part.rows_of_piece(deal.first(number), deal.height) for number in range(deal.n)]
    return [slice(0, part.shape[0])] * tile.n_devices if part.hosts else None
