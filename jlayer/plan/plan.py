"""The plan of a run: which tiles stay where, the sums of memory, and the predicted seconds.

What does not fit is refused with the sum. Pure and without JAX, so `jlayer plan` works from a
config alone. `making` makes plans.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

from jlayer.errors import DoesNotFitError
from jlayer.plan import hosting, memory, time
from jlayer.plan.experts import ExpertRooms, Moved, counts_of, moved, sizes_of
from jlayer.plan.machine import PINNED_PAGE_TABLES, Machine
from jlayer.plan.need import DeviceMemory, HostMemory, total
from jlayer.plan.need import terms as terms_of
from jlayer.plan.shapes import Shapes
from jlayer.plan.tiles import Tier, Tile
from jlayer.plan.tiling import Tiling
from jlayer.sizes import human
from jlayer.spec import ModelConfig


@dataclass(frozen=True)
class Plan:
    """Where each tile is kept, and the sums of memory.

    `tiers`: one for each tile. `ring`: host slots for tiles that pass through. `ahead`: tiles on
    the device at a time besides those that stay. `shapes`: the compiled shapes of the run; `load`:
    of all live runs, which share forward passes and are in the sums. `n_held`: how many others
    there are. `rows`: the limit of rows of a forward pass by which the shapes were made. `cache`:
    where the pools are: on the device, or in host memory, from where they come along with their
    layers. `always_hosted`: whether the host multiplies all rows that were set apart for it in
    every forward pass, since the user said so. `experts`: how many of them are kept.
    """

    machine: Machine
    device: DeviceMemory
    host: HostMemory
    tiling: Tiling
    tiers: tuple[Tier, ...]
    ring: int
    ahead: int
    shapes: Shapes
    load: Shapes
    rows: int | None
    cache: Tier
    model_bytes: int
    published_bytes: int  # before it was quantized, if it was
    n_layers: int
    cfg: ModelConfig
    experts: ExpertRooms
    n_held: int = 0
    always_hosted: bool = False

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return self.tiling.tiles

    @property
    def n_tiles(self) -> int:
        return len(self.tiling.shapes)

    @property
    def tile_bytes(self) -> int:
        return self.tiling.tile_bytes

    @property
    def chunk(self) -> int:
        """The most rows of a chunk."""
        return self.load.chunk

    @property
    def n_chunks(self) -> int:
        return self.shapes.n_chunks

    @property
    def capacity(self) -> int:
        return self.shapes.capacity

    @property
    def device_peak_bytes(self) -> int:
        return total(self.device)

    @property
    def host_peak_bytes(self) -> int:
        return total(self.host)

    @property
    def fits(self) -> bool:
        return (
            self.device_peak_bytes <= self.device.budget_bytes
            and self.host_peak_bytes <= self.host.budget_bytes
        )

    def tier_bytes(self, tier: Tier) -> int:
        """Bytes of the tiles in a tier, those of the head included."""
        pairs = zip(self.tiling.sizes, self.tiers, strict=True)
        return sum(size for size, its_tier in pairs if its_tier is tier)

    def hosted(self, n_rows: int) -> frozenset[int]:
        """The tiles that the host's cores multiply in a forward pass of so many rows."""
        known = self._hosted
        if n_rows not in known:
            known[n_rows] = hosting.hosted_tiles(
                *(self.tiling, self.tiers, self.machine.host),
                link=self.machine.bytes_per_s,
                rows=n_rows,
                always=self.always_hosted,
            )
        return known[n_rows]

    @cached_property
    def _hosted(self):
        return {}

    @property
    def host_product_bytes(self) -> int:
        """Bytes that the host's cores multiply in a forward pass with one token for each lane."""
        return sum(self.tiling.sizes[index] for index in self.hosted(self.load.batch))

    @property
    def host_share(self) -> float:
        """The share of the bytes that are not on the device of which these are."""
        passing = self.tiling.n_bytes - self.tier_bytes(Tier.DEVICE)
        return self.host_product_bytes / passing if passing else 0.0

    @property
    def put_bytes(self) -> int:
        """Bytes that go to the device in each forward pass with one token for each lane, where the
        host multiplies none; of experts as many as are expected."""
        certain = self._certain_bytes[Tier.DISK] + self._certain_bytes[Tier.HOST]
        return certain + round(self.moved(self.load.batch).put_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of the weights that a forward pass with one token for each lane uses."""
        certain = sum(self._certain_bytes.values())
        return certain + round(self.moved(self.load.batch).used_bytes)

    @property
    def disk_bytes(self) -> int:
        """Those of `put_bytes` that come from disk."""
        return self._certain_bytes[Tier.DISK] + round(self.moved(self.load.batch).disk_bytes)

    @cached_property
    def _certain_bytes(self):
        found = dict.fromkeys(Tier, 0)
        for index in self.tiling.certain:
            found[self.tiers[index]] += self.tiling.sizes[index]
        return found

    def moved(self, n_rows: int) -> Moved:
        """The experts that a forward pass of so many rows is expected to use and to move."""
        return moved(self.cfg, self.tiling, self.experts, n_rows)

    @property
    def moved_cache_bytes(self) -> int:
        """Bytes of pools that come to the device in each forward pass."""
        if self.cache is Tier.DEVICE or not self.machine.kind.has_link:
            return 0
        return self.host.cache_bytes

    @property
    def attending(self) -> tuple[int, ...]:
        """Where the pools are in host memory, the tiles whose runs use them."""
        if self.cache is Tier.DEVICE:
            return ()
        return tuple(n for n, tile in enumerate(self.tiling.shapes) if tile.uses_cache)

    @property
    def sweep_seconds(self) -> float:
        """The predicted time of a forward pass."""
        return max(self._bytes_s, self._steps_s)

    @property
    def cautious_seconds(self) -> float:
        """The predicted time on a machine with slow steps; plans are chosen by it."""
        return max(self._bytes_s, self._steps_s * self.machine.kind.steps_vary)

    @property
    def decode_seconds(self) -> float:
        """The predicted time of a forward pass with one token for each lane."""
        return self.narrow_seconds(self.load.batch)

    def narrow_seconds(self, n_rows: int) -> float:
        """The predicted time of a forward pass of so few rows, in as many chunks as one with a
        token for each lane."""
        known = self._narrow
        if n_rows not in known:
            known[n_rows] = self._seconds_of_few(n_rows, self.hosted(n_rows))
        return known[n_rows]

    def unaided_seconds(self, n_rows: int) -> float:
        """`narrow_seconds`, if the host's cores multiplied nothing."""
        return self._seconds_of_few(n_rows, frozenset())

    @cached_property
    def _narrow(self):
        return {}

    def _seconds_of_few(self, n_rows, hosted):
        n_chunks = self.load.n_decode_chunks
        bytes_s = time.bytes_seconds(
            *(self.machine, self.tiling, self.tiers),
            n_chunks=n_chunks,
            hosted=hosted,
            rows=n_rows,
            experts=self.moved(n_rows),
        )
        steps_s = time.steps_seconds(
            *(self.machine, self.tiling),
            n_chunks=n_chunks,
            hosted=hosted,
            experts=self.moved(n_rows),
        )
        return max(bytes_s, steps_s)

    @cached_property
    def _bytes_s(self):
        return time.bytes_seconds(
            self.machine,
            self.tiling,
            self.tiers,
            n_chunks=self.n_chunks,
            cache_bytes=self.moved_cache_bytes,
            hosted=self.hosted(self.load.n_rows),
            rows=self.load.n_rows,
            experts=self.moved(self.load.n_rows),
        )

    @cached_property
    def _steps_s(self):
        return time.steps_seconds(
            self.machine,
            self.tiling,
            n_chunks=self.n_chunks,
            hosted=self.hosted(self.load.n_rows),
            experts=self.moved(self.load.n_rows),
        )

    def layers(self, tier: Tier) -> int:
        """The bytes of a tier in whole layers; the three tiers add up to all layers."""
        return self._layers[tier]

    @cached_property
    def _layers(self):
        shares = dict.fromkeys(Tier, 0)
        for index in self.tiling.certain:
            if self.tiling.shapes[index].layer is not None:
                shares[self.tiers[index]] += self.tiling.sizes[index]
        counts, sizes = counts_of(self.cfg), sizes_of(self.tiling)
        kept = zip(counts, sizes, self.experts.on_device, self.experts.in_host, strict=True)
        for n, size, on_device, in_host in kept:
            in_host = min(in_host, n - on_device)
            shares[Tier.DEVICE] += on_device * size.tiles
            shares[Tier.HOST] += in_host * size.tiles
            shares[Tier.DISK] += (n - on_device - in_host) * size.tiles
        whole = sum(shares.values()) / self.n_layers
        from_disk = math.ceil(shares[Tier.DISK] / whole - 1e-9)
        on_device = min(math.floor(shares[Tier.DEVICE] / whole), self.n_layers - from_disk)
        in_host = self.n_layers - from_disk - on_device
        return {Tier.DEVICE: on_device, Tier.HOST: in_host, Tier.DISK: from_disk}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the plan; none is an error."""
        if self.machine.kind.has_link or self.published_bytes == self.model_bytes:
            return ()
        plain = time.plain_seconds(self.machine, self.published_bytes)
        if self.host_product_bytes or self.decode_seconds <= 1.2 * plain:
            return ()
        return (
            "quantized weights are decoded on one core of this CPU: about "
            f"{self.decode_seconds:.2g} s a token, where the unquantized model would take about "
            f'{plain:.2g} s; install kernels for its cores (pip install "llvmlite>=0.45"), or run '
            "the unquantized folder, if speed matters",
        )

    @property
    def streamed(self) -> tuple:
        """What of a plan an executor can change to."""
        return self.tiers, self.attending, self.experts

    def as_dict(self) -> dict:
        """The plan as `plan --json` prints it."""
        kept = memory.kept_needs(self.tiling, self.tiers)
        optional = sum(need.device for need in kept)
        device = {**asdict(self.device), "peak_bytes": self.device_peak_bytes}
        n_devices = self.machine.n_devices
        return {
            "fits": self.fits,
            "smallest_device_memory_bytes": self.device_peak_bytes - optional,
            "device": device,
            **({"devices": [device] * n_devices} if n_devices > 1 else {}),
            "host": {**asdict(self.host), "peak_bytes": self.host_peak_bytes},
            "disk": {
                "source_bytes": self.published_bytes,
                "target_bytes": self.model_bytes,
                "peak_bytes": self.published_bytes + self.model_bytes,
            },
            "tiers": {f"{tier.value}_layers": self.layers(tier) for tier in Tier},
            "tile_bytes": self.tile_bytes,
            "host_share": self.host_share,
            "sweep": {
                "bytes": self.used_bytes,
                "disk_bytes": self.disk_bytes,
                "host_bytes": self.put_bytes - self.disk_bytes,
                "host_product_bytes": self.host_product_bytes,
                "cache_bytes": self.moved_cache_bytes,
                "seconds": self.sweep_seconds,
                "decode_seconds": self.decode_seconds,
            },
        }

    def check(self) -> None:
        """Raises DoesNotFitError, with each sum over its budget and the smallest sufficient one."""
        device, host, has_link = self.device, self.host, self.machine.kind.has_link
        tokens = device.cache_bytes + device.activation_bytes + device.temporary_bytes
        shared, draft = (0, 0) if has_link else (tokens, device.draft_bytes)  # the host holds these
        problems = [
            self._over("device_memory", device, tokens, device.draft_bytes),
            self._over("host_memory", host, host.embedding_bytes + shared, draft),
        ]
        if any(problems):
            line = "; ".join(filter(None, problems))
            raise DoesNotFitError(line, report={"plan": self.as_dict()})

    @property
    def _counts_others(self):
        """Whether what is taken for the driver's is more than any driver takes: it is what went
        from the GPU's free memory while JAX started."""
        on = self.machine
        usual = on.kind.context_of(collectives=on.collectives)
        most = 2 * usual + on.host_budget // PINNED_PAGE_TABLES
        return on.kind.has_link and self.device.context_bytes > most

    def _over(self, option, memory_of, token_bytes, draft_bytes):
        """What to say of a budget that is too small; None where it is not. `token_bytes`: what
        fewer tokens would save at most. `draft_bytes`: of the draft model."""
        peak, budget = total(memory_of), memory_of.budget_bytes
        if peak <= budget:
            return None
        others = f" beside {self.n_held} other runs that are alive" if self.n_held else ""
        advice = ", or ask for fewer tokens" if peak - token_bytes <= budget else ""
        if draft_bytes and peak - draft_bytes <= budget:
            advice += ", or take a smaller draft model, or none"
        advice += ", or end other runs" if self.n_held else ""
        if option == "device_memory" and self._counts_others:
            advice += ", or run it again: another program took memory of the GPU as this one began"
        return (
            f"{option}: {human(budget)} given, needed{others} are {human(peak)} = "
            f"{terms_of(memory_of)}; give at least {-(-peak // 2**20)}MiB{advice}"
        )
