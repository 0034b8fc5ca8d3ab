"""The shape of a chunk, which programs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.model.cache import Rows, rows_struct


@dataclass(frozen=True)
class Size:
    """The shape of a chunk: `rows`, of which the first are a pane of `lanes` times `tokens`; tables
    of `capacity` entries, and pools of `pool` rows. `fresh`: see `model.cache.Rows`. `windows`: of
    each window (its size, the capacity of its tables, the rows of its pools). `switches`: whether
    the rotary embedding does for long texts."""

    rows: int
    lanes: int
    tokens: int
    capacity: int
    pool: int
    fresh: int | None = None
    windows: tuple[tuple[int, int, int], ...] = ()
    switches: bool = False

    def attends(self, window: int | None = None) -> str:
        """What the programs that use the cache of layers with this window are compiled for, as a
        label."""
        fresh = f" fresh {self.fresh}" if self.fresh else ""
        capacity, pool = self.cache_of(window)
        sees = f" window {window}" if window else ""
        return f"{self.lanes}x{self.tokens} cache {capacity} of {pool}{fresh}{sees}"

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
        )
