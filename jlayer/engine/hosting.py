"""Products of the host's own cores, beside the device: of the rows that lie in host memory.

The input of a stage comes down once, for all tiles of the stage that the host multiplies; their
products are written where the device's programs read them. Meanwhile the device's rows cross the
link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import ml_dtypes
import numpy as np

from jlayer.cores.cores import Cores, Jobs, Matrix, padded_columns
from jlayer.cores.topology import topology
from jlayer.families.base import Stage, bias_name, low_rank_names
from jlayer.model.low_rank import chosen
from jlayer.model.ops import final_logits
from jlayer.plan.machine import Machine
from jlayer.plan.tiles import Tile
from jlayer.streaming.devices import Devices
from jlayer.streaming.landing import Landing, Landings

# Between two stages the device needs longer than threads take to fall asleep, and waking them takes
# as long again. On a CPU they are in the way of XLA's own.
SPIN_BESIDE_A_DEVICE_S = 3e-3
# Of many cores some are left to the driver's threads and to Python, which steers the device (16
# cores, an H100: passes of 69 ms with 12 threads, of 82 ms with 15).
LEFT_BESIDE_A_DEVICE, MANY_THREADS = 3, 8


def cores_beside(machine: Machine) -> Cores:
    """The threads that multiply on the host of this machine's device."""
    threads = topology().threads
    if not machine.kind.has_link:
        return Cores(threads)
    left = LEFT_BESIDE_A_DEVICE if threads > MANY_THREADS else 0
    return Cores(threads - left, spin_s=SPIN_BESIDE_A_DEVICE_S)


class Host:
    """The host's cores, and the memory that their products are read from."""

    def __init__(self, cores: Cores, devices: Devices):
        self.cores, self._landings = cores, Landings(devices)
        self._jobs: dict[tuple, tuple] = {}  # see `jobs_of`
        self._running: HostedStage | None = None

    def begin(self, stage: Stage, xs, real, adapters, heights: Mapping[str, int]) -> HostedStage:
        """Begins a stage; see `HostedStage`."""
        self._running = HostedStage(self, stage, xs, real, adapters, heights)
        return self._running

    def fetch(self, key, array: jax.Array) -> np.ndarray:
        """See `Landings.fetch`."""
        return self._landings.fetch(key, array)

    def landing(self, stage: Stage, n_rows: int, width: int) -> Landing:
        return self._landings.of(stage.name, n_rows, width)

    def jobs_of(self, tiles: Sequence[HostedTile], x: np.ndarray, landing, places) -> Jobs:
        """The list of jobs for some tiles and columns like `x`, whose products belong to `places()`
        in a landing; if the tiles stay where they are, it is kept for the next pass."""
        key = (x.dtype, len(x), id(landing), *[id(tile.views) for tile in tiles])
        if key in self._jobs:
            return self._jobs[key][0]
        lists = [matrices_of(tile.tile, tile.views) for tile in tiles]
        matrices = [matrix for found in lists for matrix in found.values()]
        jobs = self.cores.jobs(matrices, places(), len(x), x.dtype)
        if all(tile.is_kept for tile in tiles):
            # The ids are those of living objects.
            self._jobs[key] = jobs, landing, tuple(tiles)
        return jobs

    @property
    def n_kept(self) -> int:
        """How many lists of jobs are kept."""
        return len(self._jobs)

    def forget(self) -> None:
        """Drops what is kept of tiles: they may be dropped now."""
        self._jobs.clear()

    def leave(self) -> None:
        """Ends the stage under way, if its pass was given up: nothing reads weights after it."""
        if self._running is not None:
            self._running.leave()
            self._running = None

    @property
    def n_bytes(self) -> int:
        """Bytes of host memory that products are written to."""
        return self._landings.n_bytes

    def close(self) -> None:
        self.leave()
        self.forget()
        self.cores.close()
        self._landings.close()


@dataclass(frozen=True)
class HostedTile:
    """A tile, its arrays by leaf, and whether these stay where they are after the pass."""

    tile: Tile
    views: Mapping[str, np.ndarray]
    is_kept: bool


class HostedStage:
    """The rows of a stage that the host multiplies.

    `xs`: the input [R, in] of each chunk, on the device; `real`: the rows of each that are not
    padding, and `adapters`: the numbers of the adapters of these. `heights`: matrix -> its rows on
    the host. The products of all chunks' real rows, C of them, are written to a landing float32
    [padded C, sum of `heights`], the rows of one matrix after another.
    """

    def __init__(self, host: Host, stage: Stage, xs, real, adapters, heights: Mapping[str, int]):
        self._host, self._xs, self._real, self._adapters = host, xs, real, adapters
        self.n_columns = sum(map(len, real))
        self._landing = host.landing(stage, landing_rows(self.n_columns), sum(heights.values()))
        firsts = accumulate(heights.values(), initial=0)
        self._firsts = dict(zip(heights, firsts, strict=False))
        self._x: np.ndarray | None = None
        self._x32: np.ndarray | None = None
        self._waiting: list[HostedTile] = []  # not begun yet
        self._begun: list[HostedTile] = []
        self._product = None

    def add(self, tile: Tile, views: Mapping[str, np.ndarray], *, is_kept: bool) -> Hosted:
        """Notes a tile, whose arrays by leaf are `views`; `begin` multiplies it. `is_kept`: they
        stay where they are."""
        self._waiting.append(HostedTile(tile, views, is_kept))
        return Hosted(self)

    def begin(self) -> None:
        """Begins to multiply the tiles that were added, in the background."""
        if not self._waiting:
            return
        self._end_product()
        self._begun, self._waiting = self._waiting, []
        if self.n_columns:
            x = self._input()
            jobs = self._host.jobs_of(self._begun, x, self._landing, self._all_places)
            self._product = self._host.cores.begin(jobs, x)

    def settle(self) -> None:
        """Begins what was not begun, and waits until all products are written."""
        self.begin()
        self._end_product()

    def leave(self) -> None:
        """Begins nothing more, and waits for what was begun; the products are of no use."""
        self._waiting.clear()
        if self._product is not None:
            self._product.finish()
            self._product = None

    def on_device(self) -> jax.Array:
        """The landing, for a program; after `settle`."""
        return self._landing.on_device()

    def logits(self, tile: Tile) -> np.ndarray:
        """A copy of what was written for a tile of the head: float32 [C, rows]."""
        (place,) = self._places(tile).values()
        return final_logits(place.copy(), tile.stage.logits, np.tanh)

    def _end_product(self):
        if self._product is None:
            return
        self._product.finish()
        self._product = None
        for one in self._begun:
            additions = dict(each for group in one.tile.stage.groups for each in group.added)
            for name, place in self._places(one.tile).items():
                if name in additions:
                    place += self._added(additions[name], one.views, name)
                if (bias := one.views.get(bias_name(name))) is not None:
                    place += bias.astype(np.float32)
        self._begun = []

    def _added(self, added, views, name):
        """What adapters add to the products of a matrix: as `model.low_rank` has it."""
        a, b = (views[each].astype(np.float32, copy=False) for each in low_rank_names(name))
        inner = self._in_float32() @ a.T
        if not added.chooses:
            return np.float32(added.scale) * (inner @ b.T)
        is_own, scale = chosen(added, np.concatenate(self._adapters))
        inner[~is_own] = 0
        return scale * (inner @ b.T)

    def _all_places(self):
        """Where the products of what was begun are written, padding included."""
        n_rows = padded_columns(self.n_columns)
        return [p for one in self._begun for p in self._places(one.tile, n_rows).values()]

    def _places(self, tile, n_rows=None):
        """Matrix -> where the products of the tile's rows are written, [C, rows]."""
        n_rows = self.n_columns if n_rows is None else n_rows
        first_rows = {part.matrix: part.first_row for part in tile.parts if part.has_rows}
        places = {}
        for name, height in tile.heights.items():
            begin = self._firsts[name] + first_rows[name]
            places[name] = self._landing.memory[:n_rows, begin : begin + height]
        return places

    def _in_float32(self):
        """The real rows of all chunks [C, in] in float32: what an adapter's part is computed in."""
        if self._x32 is None:
            self._x32 = self._input().astype(np.float32, copy=False)
        return self._x32

    def _input(self):
        """The real rows of all chunks [C, in]: bfloat16 as it is, else float32."""
        if self._x is None:
            rows = [
                self._host.fetch(number, x)[real]
                for number, (x, real) in enumerate(zip(self._xs, self._real, strict=True))
            ]
            x = rows[0] if len(rows) == 1 else np.concatenate(rows)
            self._x = x if x.dtype == ml_dtypes.bfloat16 else x.astype(np.float32)
            self._xs = ()
        return self._x


class Hosted:
    """What a tile's run gives to wait for."""

    def __init__(self, stage: HostedStage):
        self._stage = stage

    def wait(self) -> None:
        self._stage.settle()

    def leave(self) -> None:
        self._stage.leave()


def landing_rows(n_columns: int) -> int:
    """The rows of a landing for so many products: few sizes, since programs are compiled for it."""
    return max(2, 1 << (n_columns - 1).bit_length()) if n_columns else 2


def matrices_of(tile: Tile, views: Mapping[str, np.ndarray]) -> dict[str, Matrix]:
    """The matrices of a tile, whose arrays by leaf are `views`."""
    pieces: dict[str, dict] = {}
    of = {}
    for part in tile.parts:
        if part.of is None:
            pieces.setdefault(part.matrix, {})[part.piece] = views[part.leaf]
            if part.has_rows:
                of[part.matrix] = part
    return {name: Matrix(of[name].form, found, of[name].width) for name, found in pieces.items()}


def hosted_heights(tiles: Sequence[Tile], stage: Stage) -> dict[str, int]:
    """Matrix -> the number of its rows in these tiles of a stage, in the stage's order."""
    heights: dict[str, int] = {}
    for leaf in stage.leaves:
        rows = sum(tile.heights.get(leaf, 0) for tile in tiles)
        if rows:
            heights[leaf] = rows
    return heights


def hosted_logits(stage: HostedStage, tile: Tile) -> np.ndarray:
    """Waits for the host's cores -> a copy of what they wrote for a tile of the head."""
    stage.settle()
    return stage.logits(tile)
