"""The pools of all layers, and who uses which of their rows.

They are on the device, or in host memory, from where each comes to the device for its layer in
every forward pass; what the pass wrote goes back. Either way a row that no table lists may hold
anything, so a pass that ends early has changed nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import jax
import numpy as np

from jlayer.engine.pool import Pool, Table
from jlayer.engine.programs import Programs
from jlayer.engine.size import Size
from jlayer.errors import StorageError
from jlayer.families.base import CacheSpec
from jlayer.families.registry import has_state, layer_kinds, windows_of
from jlayer.model.cache import LayerCache, Rows, cache_struct
from jlayer.plan.memory import POOLS_ON_DEVICE
from jlayer.plan.shapes import PoolSizes, power_of_two
from jlayer.plan.tiles import Tier
from jlayer.spec import ITEM_BYTES
from jlayer.streaming.guard import first_line
from jlayer.streaming.slots import HostMemory

BLOCK_ROWS = 2048  # of a pool that are fetched, or placed, at a time


class Caches:
    """A pool for each layer, of one size for all layers that see as much. Made with the first lane,
    grown between forward passes, and dropped with the last lane.

    `layers`: the pools that are on the device, by layer; None for one that is in host memory.
    """

    def __init__(self, programs: Programs, tables: Callable[[], list[Table]]):
        """`tables`: gives those of all live lanes."""
        self._programs, self._tables = programs, tables
        self._kinds = layer_kinds(programs.cfg)
        self._has_link = programs.devices.has_link
        self._windows = windows_of(programs.cfg)
        self.pool = self._empty_pool()
        self.tier = Tier.DEVICE
        self.layers: list[LayerCache | None] = []
        self._rooms: list[LayerCache | None] = []  # numpy arrays in host memory, by layer
        self._memory: HostMemory | None = None
        self._written: Sequence[tuple[Rows, Rows]] = ()
        self._coming: deque = deque()  # (layer, rows of the pool, their entries on the way back)

    @property
    def n_bytes(self) -> int:
        """Bytes of the pools on a device now."""
        return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(self.layers))

    @property
    def host_bytes(self) -> int:
        """Bytes of the pools in host memory now."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._rooms))

    @property
    def sizes(self) -> PoolSizes:
        """The rows that the pools have, or are about to have."""
        return self.pool.sizes

    def reserve(self, sizes: PoolSizes, tier: Tier = Tier.DEVICE) -> None:
        """Makes room for so many rows in all, in this tier. Memory is allocated, and entries are
        moved, before the next pass."""
        self.pool.grow(sizes)
        self.tier = tier

    def make_room(self, more: Sequence[np.ndarray] = ()) -> None:
        """Ahead of a forward pass: the pools of layers with a window keep what the next tokens of
        all lanes see, and those of `more` sequences of rows."""
        self.pool.keep([*(table.rows for table in self._tables()), *more])

    def _n_rows(self, layer):
        return self.sizes.of(self._kinds[layer].cache, self._windows)

    def _empty_pool(self):
        return Pool(self._windows, has_state=has_state(self._programs.cfg))

    def ready(self) -> None:
        """Allocates what was reserved: one layer after another, so that only one is there twice.
        Raises StorageError where the device refuses."""
        try:
            self._allocate()
        except jax.errors.JaxRuntimeError as error:
            raise StorageError(f"the cache: the device failed ({first_line(error)})") from error

    def _allocate(self):
        if not self.layers:
            self.layers = [None] * len(self._kinds)
            self._rooms = [None] * len(self._kinds)
        for layer in range(len(self._kinds)):
            if self.tier is Tier.HOST:
                self._keep_on_host(layer)
            else:
                self._keep_on_device(layer)

    def _keep_on_host(self, layer):
        struct = self._struct(layer)
        old = self._rooms[layer] or self.layers[layer]
        if old is self._rooms[layer] and old is not None and _n_rows(old) == self._n_rows(layer):
            self.layers[layer] = None
            return
        room = self._make_room(layer, struct)
        if old is not None:
            for into, entries in zip(jax.tree.leaves(room), jax.tree.leaves(old), strict=True):
                into[: len(entries)] = self._programs.pools.fetch(entries)
            self._drop_room(layer)
        self._rooms[layer], self.layers[layer] = room, None

    def _keep_on_device(self, layer):
        kind, cache, room = self._kinds[layer], self.layers[layer], self._rooms[layer]
        if cache is None and room is not None:
            cache = self._put(layer, room)
        if cache is None:
            cache = self._programs.pools.empty(kind, n_rows=self._n_rows(layer))()
        if _n_rows(cache) != self._n_rows(layer):
            before, n_rows = _n_rows(cache), self._n_rows(layer)
            cache = self._programs.pools.grown(kind, before=before, n_rows=n_rows)(cache)
        if cache is not self.layers[layer]:
            self.layers[layer] = jax.block_until_ready(cache)
            self._drop_room(layer)

    def _struct(self, layer):
        dtype = self._programs.dtype
        own = self._programs.pools.of_host(self._kinds[layer])
        return cache_struct(own, n_rows=self._n_rows(layer), dtype=dtype)

    def _make_room(self, layer, struct) -> LayerCache:
        """Arrays in memory of their own, pinned where there is a link."""
        if self._memory is None:
            self._memory = HostMemory([1], pin=self._has_link)
        leaves, tree = jax.tree.flatten(struct)
        sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves]
        room = self._memory.room((layer, self._n_rows(layer)), sum(sizes))
        firsts = accumulate(sizes, initial=0)
        return jax.tree.unflatten(
            tree,
            [
                room[at : at + size].view(leaf.dtype).reshape(leaf.shape)
                for leaf, size, at in zip(leaves, sizes, firsts, strict=False)
            ],
        )

    def _drop_room(self, layer):
        if self._rooms[layer] is not None:
            key = (layer, _n_rows(self._rooms[layer]))
            self._rooms[layer] = None
            self._memory.drop_room(key)

    def _put(self, layer, room):
        if not self._has_link:  # a CPU's arrays would be views of the room, which is written
            room = jax.tree.map(np.copy, room)
        return self._programs.pools.put(self._kinds[layer], room)

    # Entries that come from elsewhere, or go there. Between passes, once the pools are `ready`.

    @property
    def specs(self) -> tuple[CacheSpec, ...]:
        """The cache of each layer, as it is whole."""
        return tuple(kind.cache for kind in self._kinds)

    def entry_bytes(self, layer: int) -> int:
        """Of one entry of a layer: of a token, or the state of a lane."""
        spec = self._kinds[layer].cache
        return spec.n_bytes(n_rows=1, item_bytes=ITEM_BYTES[self._programs.dtype])

    def struct(self, layer: int, n_entries: int) -> dict[str, tuple]:
        """The name, shape and dtype of each array of so many entries of a layer."""
        own = cache_struct(self._kinds[layer].cache, n_rows=n_entries, dtype=self._programs.dtype)
        return {name: (leaf.shape, leaf.dtype) for name, leaf in vars(own).items()}

    def entries(self, layer: int, where: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the entries in these rows, or slots, of a layer's pool."""
        found = [self._fetched(layer, some) for some in _blocks_of(where)]
        names = [array.name for array in self._kinds[layer].cache.arrays]
        return {name: np.concatenate([one[name] for one in found]) for name in names if found}

    def place(self, layer: int, where: np.ndarray, entries: Mapping[str, np.ndarray]) -> None:
        """Writes entries into rows, or slots, of a layer's pool. Raises StorageError."""
        first = 0
        for some in _blocks_of(where):
            own = {name: array[first : first + len(some)] for name, array in entries.items()}
            self._place(layer, some, own)
            first += len(some)

    def _fetched(self, layer, where):
        if self.tier is Tier.HOST:
            return {name: leaf[where] for name, leaf in vars(self._rooms[layer]).items()}
        kind, padded = self._kinds[layer], _padded(where, 0)
        program = self._programs.pools.written(kind, pool=self._n_rows(layer), n_rows=len(padded))
        entries = vars(program(self.layers[layer], padded))
        fetch = self._programs.pools.fetch
        return {name: fetch(leaf)[: len(where)].copy() for name, leaf in entries.items()}

    def _place(self, layer, where, entries):
        if self.tier is Tier.HOST:
            for name, leaf in vars(self._rooms[layer]).items():
                leaf[where] = entries[name]
            return
        kind, pool = self._kinds[layer], self._n_rows(layer)
        padded = _padded(where, pool)
        struct = cache_struct(kind.cache, n_rows=len(padded), dtype=self._programs.dtype)
        new = dict(entries)
        if len(padded) > len(where):
            new = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in vars(struct).items()}
            for name, array in entries.items():
                new[name][: len(where)] = array
        program = self._programs.pools.placed(kind, pool=pool, n_rows=len(padded))
        put = self._programs.pools.put(kind, type(struct)(**new))
        try:
            placed = program({"rows": padded, "entries": put}, self.layers[layer])
            self.layers[layer] = jax.block_until_ready(placed)
        except jax.errors.JaxRuntimeError as error:
            raise StorageError(f"the cache: the device failed ({first_line(error)})") from error

    # A forward pass with pools in host memory.

    def compile(self, size: Size) -> None:
        """Compiles what a chunk of this size needs, ahead of it."""
        for layer in range(len(self._kinds)) if self.tier is Tier.HOST else ():
            kind, pool = self._kinds[layer], self._n_rows(layer)
            (n_rows,) = size.rows_struct.written(kind.cache).shape
            self._programs.pools.written(kind, pool=pool, n_rows=n_rows)

    def begin(self, written: Sequence[tuple[Rows, Rows]]) -> None:
        """A forward pass begins, whose chunks have these rows: on the device, and on the host."""
        self._written = written

    def put(self, layer: int) -> int:
        """Begins to put a layer's pool on the device; returns its bytes."""
        # What came before the last one is back: two pools at most are on the device.
        self._collect(POOLS_ON_DEVICE - 1)
        self.layers[layer] = self._put(layer, self._rooms[layer])
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._rooms[layer]))

    def take(self, layer: int) -> None:
        """Begins to bring back the rows that were written, and drops the pool from the device."""
        cache, self.layers[layer] = self.layers[layer], None
        kind = self._kinds[layer]
        for on_device, on_host in self._written:
            written, rows = (each.written(kind.cache) for each in (on_device, on_host))
            program = self._programs.pools.written(
                kind, pool=self._n_rows(layer), n_rows=len(written)
            )
            entries = program(cache, written)
            for leaf in jax.tree.leaves(entries):
                leaf.copy_to_host_async()
            self._coming.append((layer, rows, entries))

    def finish(self) -> None:
        """Waits until everything that was written is back. Raises StorageError."""
        try:
            self._collect(0)
        except jax.errors.JaxRuntimeError as error:
            raise StorageError(f"the cache: the device failed ({first_line(error)})") from error

    def _collect(self, n_left):
        n_left *= max(1, len(self._written))
        while len(self._coming) > n_left:
            layer, rows, entries = self._coming.popleft()
            is_real = rows < self._n_rows(layer)
            pairs = zip(jax.tree.leaves(self._rooms[layer]), jax.tree.leaves(entries), strict=True)
            for room, new in pairs:
                room[rows[is_real]] = self._programs.pools.fetch(new)[is_real]

    def give_up(self) -> None:
        """A forward pass has ended early. After a failure of the device the memory of a pool that a
        program was to reuse may be gone, or what the program left there. Then all entries are:
        every table is emptied, and its lane is computed anew."""
        self._coming.clear()
        if self.tier is Tier.HOST:
            is_lost = any(room is None for room in self._rooms)  # on its way from the device
        else:
            is_lost = any(map(_is_lost, jax.tree.leaves(self.layers)))
        if is_lost:
            for table in self._tables():
                table.cut(0)
            self._free()
        elif self.tier is Tier.HOST:
            self.layers = [None] * len(self._kinds)

    def _free(self):
        for layer in range(len(self._rooms)):
            self._drop_room(layer)
        self.layers, self._rooms = [], []

    def drop(self) -> None:
        """Frees all memory; no lane may be left."""
        assert self.pool.n_free == self.pool.n_rows
        self._free()
        self.pool = self._empty_pool()

    def close(self) -> None:
        """Unpins host memory; the caches cannot be used afterwards."""
        self.layers, self._rooms = [], []
        if self._memory is not None:
            self._memory.close()


def _n_rows(cache: LayerCache) -> int:
    return jax.tree.leaves(cache)[0].shape[0]


def _blocks_of(where):
    """Rows in blocks, so that there are few programs, and little beside the pool."""
    return [where[first : first + BLOCK_ROWS] for first in range(0, len(where), BLOCK_ROWS)]


def _padded(where, filling):
    """Rows, padded to a power of two."""
    more = power_of_two(len(where)) - len(where)
    return np.pad(where.astype(np.int32), (0, more), constant_values=filling)


def _is_lost(leaf):
    if leaf.is_deleted():
        return True
    try:
        jax.block_until_ready(leaf)
    except jax.errors.JaxRuntimeError:  # of the program that wrote it
        return True
    return False
