"""The pools of all layers on the device, and who uses which of their rows."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jlayer.engine.pool import Pool, Table
from jlayer.engine.programs import Programs
from jlayer.families.registry import layer_kinds


class Caches:
    """A pool for each layer, of one size. Made with the first lane, grown between forward passes,
    and dropped with the last lane."""

    def __init__(self, programs: Programs, tables: Callable[[], list[Table]]):
        """`tables`: gives those of all live lanes."""
        self._programs, self._tables = programs, tables
        self._kinds = layer_kinds(programs.cfg)
        self.pool = Pool()
        self.layers: list = []

    @property
    def n_bytes(self) -> int:
        """Bytes of the pools on the device now."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))

    @property
    def n_rows(self) -> int:
        """The rows that each pool has, or is about to have."""
        return self.pool.n_rows

    def table(self) -> Table:
        return Table(self.pool)

    def reserve(self, n_rows: int) -> None:
        """Makes room for `n_rows` rows in all; memory is allocated before the next pass."""
        if n_rows > self.pool.n_rows:
            self.pool.grow(n_rows)

    def ready(self) -> None:
        """Allocates what was reserved: one layer after another, so that only one is there twice."""
        n_rows = self.pool.n_rows
        if not self.layers:
            self.layers = [
                self._programs.empty_cache(kind, n_rows=n_rows)() for kind in self._kinds
            ]
        for number, kind in enumerate(self._kinds):
            before = self._rows_of(number)
            if before != n_rows:
                grow = self._programs.grown_cache(kind, before=before, n_rows=n_rows)
                self.layers[number] = grow(self.layers[number])
                jax.block_until_ready(self.layers[number])

    def _rows_of(self, number):
        return jax.tree.leaves(self.layers[number])[0].shape[0]

    def check_whole(self) -> None:
        """After a failure of the device the memory of a pool that a program was to reuse may be
        gone. Then all entries are: every table is emptied, and its lane is computed anew."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.layers)):
            for table in self._tables():
                table.cut(0)
            self.layers = []

    def drop(self) -> None:
        """Frees all memory; no lane may be left."""
        assert self.pool.n_free == self.pool.n_rows
        self.layers = []
        self.pool = Pool()
