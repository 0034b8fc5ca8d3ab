"""The plan of a run: which tiles stay where in the fastest forward pass that fits the budgets.

If none fits, the refusal shows the sum. Pure and without JAX, so `jlayer plan` works from a config
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from jlayer.errors import DoesNotFitError
from jlayer.plan import memory, time
from jlayer.plan.draft import draft_need
from jlayer.plan.limits import Limits, chunk_limits, row_limits
from jlayer.plan.machine import CACHE_PINNED, READING, Machine
from jlayer.plan.need import DeviceMemory, HostMemory, Need, device_memory, host_memory, total
from jlayer.plan.need import terms as terms_of
from jlayer.plan.shapes import RunShape, Shapes, pool_rows, together
from jlayer.plan.tiles import Tier, Tile, Tiling, Weights, cut
from jlayer.sizes import human

# None: whole layers. On an H200 tiles of 64 MiB move at the full speed of the link, 32 MiB at 95%.
TILE_BYTES = (None, *(mib << 20 for mib in (256, 128, 64, 48, 32, 16, 8, 4, 2, 1)))
# Device memory left free when tiles that stay fill the rest.
RESERVE_BYTES = 96 << 20


@dataclass(frozen=True)
class Plan:
    """Where each tile is kept, and the sums of memory.

    `tiers`: one for each tile. `ring`: host slots for tiles that pass through. `ahead`: tiles on
    the device at a time besides those that stay. `shapes`: the compiled shapes of the run; `load`:
    of all live runs, which share forward passes and are in the sums. `n_held`: how many others
    there are. `rows`: the limit of rows of a forward pass by which the shapes were made. `cache`:
    where the pools are: on the device, or in host memory, from where they come along with their
    layers.
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
    n_held: int = 0

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

    @property
    def put_bytes(self) -> int:
        """Bytes that go to the device in each forward pass."""
        return self.tier_bytes(Tier.DISK) + self.tier_bytes(Tier.HOST)

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
        n_chunks = self.load.n_decode_chunks
        return max(
            time.bytes_seconds(self.machine, self.tiling, self.tiers, n_chunks=n_chunks),
            time.steps_seconds(self.machine, self.tiling, n_chunks=n_chunks),
        )

    @cached_property
    def _bytes_s(self):
        return time.bytes_seconds(
            self.machine,
            self.tiling,
            self.tiers,
            n_chunks=self.n_chunks,
            cache_bytes=self.moved_cache_bytes,
        )

    @cached_property
    def _steps_s(self):
        return time.steps_seconds(self.machine, self.tiling, n_chunks=self.n_chunks)

    def layers(self, tier: Tier) -> int:
        """The bytes of a tier in whole layers; the three tiers add up to all layers."""
        return self._layers[tier]

    @cached_property
    def _layers(self):
        shares = dict.fromkeys(Tier, 0)
        for tile, its_tier in zip(self.tiling.shapes, self.tiers, strict=True):
            if tile.layer is not None:
                shares[its_tier] += tile.n_bytes
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
        if self.sweep_seconds <= 1.2 * plain:
            return ()
        return (
            "quantized weights are decoded on one core of this CPU: about "
            f"{self.sweep_seconds:.2g} s a token, where the unquantized model would take about "
            f"{plain:.2g} s; run the unquantized folder if speed matters",
        )

    def as_dict(self) -> dict:
        """The plan as `plan --json` prints it."""
        kept = memory.kept_needs(self.tiling, self.tiers)
        optional = sum(need.device for need in kept)
        return {
            "fits": self.fits,
            "smallest_device_memory_bytes": self.device_peak_bytes - optional,
            "device": {**asdict(self.device), "peak_bytes": self.device_peak_bytes},
            "host": {**asdict(self.host), "peak_bytes": self.host_peak_bytes},
            "disk": {
                "source_bytes": self.published_bytes,
                "target_bytes": self.model_bytes,
                "peak_bytes": self.published_bytes + self.model_bytes,
            },
            "tiers": {f"{tier.value}_layers": self.layers(tier) for tier in Tier},
            "tile_bytes": self.tile_bytes,
            "sweep": {
                "bytes": self.tiling.n_bytes,
                "disk_bytes": self.tier_bytes(Tier.DISK),
                "host_bytes": self.tier_bytes(Tier.HOST),
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
        return (
            f"{option}: {human(budget)} given, needed{others} are {human(peak)} = "
            f"{terms_of(memory_of)}; give at least {-(-peak // 2**20)}MiB{advice}"
        )


def make_plan(
    weights: Weights,
    machine: Machine,
    run: RunShape,
    *,
    held: Sequence[RunShape] = (),
    least_pool: int = 0,
    keeps_layers: bool = True,
    tilings: dict[int | None, Tiling] | None = None,
    draft: Weights | None = None,
) -> Plan:
    """The plan of the fastest forward pass that fits: tiles, chunk of rows, tiers.

    `held`: other live runs. `least_pool`: the rows that the pools have. `tilings`: existing ones of
    this model by the tile size that was asked for, to reuse; new ones are added. `draft`: the
    weights of a draft model, which the device holds too. Prompts are split over several forward
    passes, and pools are in host memory, only where nothing fits otherwise: whichever takes less
    time. If nothing fits at all, the plan that needs least memory (`fits` is False; `check`
    refuses).
    """
    tilings = {} if tilings is None else tilings

    def bare(tile_bytes, limits):
        tiling = tiling_of(tilings, weights, machine, tile_bytes)
        return bare_plan(weights, machine, tiling, run, held, limits, least_pool, draft)

    def fastest(rows, cache):
        """The plan of the fastest forward pass by these limits; None where none fits."""
        best = None
        for tile_bytes in TILE_BYTES:
            of_chunks = (bare(tile_bytes, Limits(most, rows, cache)) for most in chunk_rows)
            # Smaller chunks only cost dispatches.
            found = next((plan for plan in of_chunks if plan.fits), None)
            if found is None:
                continue
            plan = _with_tiers(found) if keeps_layers else found
            if best is None or plan.cautious_seconds < best.cautious_seconds:
                best = plan
            elif plan.chunk <= best.chunk:
                break  # smaller tiles leave more memory for kept tiles; that no longer pays here
        return best

    smallest, candidates = None, []
    chunk_rows = chunk_limits(run, *held)
    for rows in row_limits(run, *held):
        for cache in (Tier.DEVICE, Tier.HOST):
            # Whole layers, or the smallest tiles, need least memory.
            limits = Limits(chunk_rows[-1], rows, cache)
            least = [bare(tile_bytes, limits) for tile_bytes in (TILE_BYTES[0], TILE_BYTES[-1])]
            smallest = min(filter(None, (smallest, *least)), key=lambda p: p.device_peak_bytes)
            best = fastest(rows, cache) if any(plan.fits for plan in least) else None
            if best is not None and (rows, cache) == (None, Tier.DEVICE):
                return best
            candidates += [] if best is None else [best]
    return min(candidates, key=lambda plan: run_seconds(plan, run), default=smallest)


def tiling_of(
    tilings: dict[int | None, Tiling], weights: Weights, machine: Machine, tile_bytes: int | None
) -> Tiling:
    """The tiling of this tile size: of `tilings`, to which it is added where it is not there."""
    if tile_bytes not in tilings:
        tilings[tile_bytes] = cut(weights, tile_bytes, platform=machine.platform)
    return tilings[tile_bytes]


def run_seconds(plan: Plan, run: RunShape) -> float:
    """About the seconds of all forward passes of a run."""
    return (plan.shapes.prefills - 1 + max(1, run.sweeps)) * plan.cautious_seconds


def refit(
    plan: Plan,
    weights: Weights,
    run: RunShape,
    *,
    held: Sequence[RunShape] = (),
    least_pool: int = 0,
    draft: Weights | None = None,
) -> Plan:
    """The plan of another run with the same tiles and tiers; it may not fit."""
    for rows in row_limits(run, *held):
        for cache in (Tier.DEVICE, Tier.HOST):
            for most in chunk_limits(run, *held):
                limits, on = Limits(most, rows, cache), plan.machine
                bare = bare_plan(weights, on, plan.tiling, run, held, limits, least_pool, draft)
                same = _with_kept(bare, plan.tiers)
                if same.fits:
                    return same
    return same


def fitting(plan_of: Callable[[RunShape], Plan], shape: RunShape) -> Plan:
    """The plan of a run with as many guessed tokens as fit: those of `shape`, else half as many,
    and so on; if none fit, the plan without any. How many they are is in `plan.shapes.nodes`."""
    while True:
        plan = plan_of(shape)
        if plan.fits or shape.nodes == 0:
            return plan
        half = shape.nodes // 2
        shape = replace(shape, nodes=half if half >= shape.batch else 0)


def bare_plan(
    weights: Weights,
    machine: Machine,
    tiling: Tiling,
    run: RunShape,
    held: Sequence[RunShape],
    limits: Limits,
    least_pool: int = 0,
    draft: Weights | None = None,
) -> Plan:
    """The plan of a tiling that needs least memory: no tile stays."""
    ahead = min(machine.kind.ahead, len(tiling.shapes))
    ring = ahead + READING
    shapes = [each.shapes(limits.chunk, limits.rows) for each in (run, *held)]
    load = together(shapes, limits.chunk)
    needs = [
        *memory.fixed_needs(weights, machine, tiling, ring=ring, ahead=ahead),
        *memory.run_needs(
            weights, machine, tiling, load, cache=limits.cache, least_pool=least_pool
        ),
    ]
    if draft is not None:
        pool = max(pool_rows(load.entries), least_pool)
        needs.append(draft_need(draft, machine, load, pool=pool))
    device = device_memory(machine.device_budget, needs)
    if machine.kind.has_link:
        # Page tables of pools in host memory: see CACHE_PINNED.
        least = sum(need.host for need in needs if need.term == "cache") // CACHE_PINNED
        needs.append(Need("cache", device=max(0, least - total(device))))
        device = device_memory(machine.device_budget, needs)
    else:
        # Device memory is host memory; the slots are counted once.
        needs.append(Need("resident", host=total(device) - device.slots_bytes))
    return Plan(
        machine=machine,
        device=device,
        host=host_memory(machine.host_budget, needs),
        tiling=tiling,
        tiers=(Tier.DISK,) * len(tiling.shapes),
        ring=ring,
        ahead=ahead,
        shapes=shapes[0],
        load=load,
        rows=limits.rows,
        cache=limits.cache,
        model_bytes=weights.stored_bytes,
        published_bytes=weights.published_bytes,
        n_layers=weights.cfg.num_hidden_layers,
        n_held=len(held),
    )


def _with_tiers(plan: Plan) -> Plan:
    """Keeps tiles in the rest of the budgets: first on a GPU, then in host memory.

    Kept tiles are spread evenly over the forward pass, so that disk and link are busy at the same
    time throughout.
    """
    tiling = plan.tiling
    room = plan.device.budget_bytes - plan.device_peak_bytes - RESERVE_BYTES
    kept = _spread(tiling.device_sizes, room if plan.machine.kind.has_link else 0)
    rest = [index for index, keep in enumerate(kept) if not keep]
    room = plan.host.budget_bytes - plan.host_peak_bytes
    in_host = _spread([tiling.sizes[index] + tiling.slack for index in rest], room)
    tiers = [Tier.DEVICE if keep else Tier.DISK for keep in kept]
    for index, keep in zip(rest, in_host, strict=True):
        if keep:
            tiers[index] = Tier.HOST
    return _with_kept(plan, tuple(tiers))


def _with_kept(plan, tiers):
    """A bare plan with these tiers, and the tiles that they keep added to its sums."""
    (kept,) = memory.kept_needs(plan.tiling, tiers)
    device, host = plan.device, plan.host
    return replace(
        plan,
        tiers=tiers,
        device=replace(device, resident_bytes=device.resident_bytes + kept.device),
        host=replace(host, resident_bytes=host.resident_bytes + kept.host),
    )


def _spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which of `sizes` to keep within `room` bytes, spread evenly over the list."""
    whole = sum(sizes)
    if room >= whole:
        return [True] * len(sizes)
    if room < min(sizes, default=0):
        return [False] * len(sizes)
    kept, used, passed = [], 0, 0
    for size in sizes:
        passed += size
        # Keep this tile if the kept bytes are behind the proportional share by half of it or more.
        with_it = used + size
        keep = with_it <= room and with_it <= room * passed / whole + size / 2
        kept.append(keep)
        if keep:
            used = with_it
    return kept
