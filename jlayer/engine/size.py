"""The shape of a chunk, which programs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.families.base import CacheSpec
from jlayer.model.cache import Rows, rows_struct


@dataclass(frozen=True)
class Size:
    """The shape of a chunk: `rows`, of which the first are a pane of `lanes` times `tokens`; tables
    of `capacity` entries, and pools of `pool` rows. `fresh`: see `model.cache.Rows`. `windows`: of
    each window (its size, the capacity of its tables, the rows of its pools). `switches`: whether
    the rotary embedding does for long texts. `slots`: of layers with a state; `is_chain`: see
    `model.cache.Rows`."""

    rows: int
    lanes: int
    tokens: int
    capacity: int
    pool: int
    fresh: int | None = None
    windows: tuple[tuple[int, int, int], ...] = ()
    switches: bool = False
    slots: int = 0
    is_chain: bool = False

    def attends(self, cache: CacheSpec | None = None) -> str:
        """What the programs that use this cache are compiled for, as a label; None: one of all
        entries."""
        pane = f"{self.lanes}x{self.tokens}"
        beside = f" beside {self.capacity}"  # the table of all entries comes along
        if cache and cache.kind == "state":
            return f"{pane} {'chain' if self.is_chain else 'tree'} state of {self.slots}{beside}"
        fresh = f" fresh {self.fresh}" if self.fresh else ""
        window = cache.window if cache else None
        capacity, pool = self.cache_of(window)
        sees = f" window {window}{beside}" if window else ""
        return f"{pane} cache {capacity} of {pool}{fresh}{sees}"

    def pool_of(self, cache: CacheSpec) -> int:
        """The rows or slots of the pools of layers with this cache."""
        return self.slots if cache.kind == "state" else self.cache_of(cache.window)[1]

    def cache_of(self, window: int | None) -> tuple[int, int]:
        """(the capacity of tables, the rows of pools) of layers with this window."""
        own = {size: (capacity, pool) for size, capacity, pool in self.windows}
        return own.get(window, (self.capacity, self.pool))

    @property
    def rows_struct(self) -> Rows:
        """The shapes of its rows, as attention needs them."""
        return rows_struct(
            n_rows=self.rows,
            lanes=self.lanes,
            tokens=self.tokens,
            capacity=self.capacity,
            fresh=self.fresh,
            windows={size: capacity for size, capacity, _ in self.windows},
            switches=self.switches,
            has_state=self.slots > 0,
            is_chain=self.is_chain,
        )
