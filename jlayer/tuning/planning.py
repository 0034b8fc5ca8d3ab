"""The plan of a run of tuning: tiles, chunks, what stays in host memory, the sums of memory, and
about the seconds of a step. Pure and without JAX, so that it works from a config alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

from jlayer.additions import Additions
from jlayer.errors import DoesNotFitError
from jlayer.families.registry import layer_kinds, layer_tensor_name
from jlayer.pieces import attention_pieces, delta_bytes
from jlayer.plan import memory
from jlayer.plan.cutting import cut
from jlayer.plan.machine import Machine
from jlayer.plan.need import (
    DeviceMemory,
    HostMemory,
    Need,
    device_memory,
    host_memory,
    memory_name,
    total,
)
from jlayer.plan.need import terms as terms_of
from jlayer.plan.tiles import Tier, Tile, Weights
from jlayer.plan.tiling import Tiling
from jlayer.sizes import human
from jlayer.spec import ITEM_BYTES, ModelConfig
from jlayer.tuning.settings import Settings
from jlayer.tuning.units import again, units_of
from jlayer.tuning.visits import (
    Trained,
    Visit,
    Way,
    kept_again,
    leaves_of,
    streamed,
    tiers_of,
    visits_of,
)

# The sizes of tiles that are tried, the largest first: fewer tiles take the host less time.
TILE_BYTES = tuple(mib << 20 for mib in (128, 64, 32, 16, 8, 4, 2, 1))
# The most rows of a chunk that are tried, unless a lane has more. A program is called for each
# chunk at each tile, which takes the host about 0.1 ms.
CHUNK_ROWS = (4096, 2048, 1024, 512, 256, 128, 64)
ENOUGH_ROWS = 1024  # more tiles ahead are worth more than more rows (H100, 70B shape, bfloat16)
# The most tiles on the device at a time. On the way back a layer's arithmetic comes in lumps, each
# longer than a few tiles take to cross the link: with more of them there the link goes on. Some
# room stays free, since a program's temporaries are in one piece: with 8 ahead in all of 4096 MiB
# there was none of 391 MiB left (H100, 70B shape, tiles of 128 MiB).
MOST_AHEAD = 6
SPARE = 0.3  # of the largest temporaries
READING = 2  # host slots beyond the tiles on the device, for the reads in progress
FLOAT32 = 4
SMALLER = "take a smaller --tokens-per-step or --length"  # where a plan does not fit
# Multiplications and additions a second: of a GPU in 16 bits (H200, 4096 rows), of a CPU's core.
GPU_OPERATIONS, CORE_OPERATIONS = 2.6e14, 1.5e11


@dataclass(frozen=True)
class Order:
    """What the order of a step's sums and the masks of dropout hang on, besides its settings: runs
    of one order come to the same bytes, whatever of the weights stays in which memory. `platform`:
    of the device; `tile_bytes`: as the weights are cut; `chunk_lanes`: how many lanes are a chunk.
    """

    platform: str
    tile_bytes: int
    chunk_lanes: int


@dataclass(frozen=True)
class TunePlan:
    """`visits`: of a step; `tiles`: theirs, as they are streamed, and their `tiers`; `repeats`: as
    of the executor, `again` too. `order`: what a run that is gone on with must have too. `seconds`:
    about those of a step.
    """

    machine: Machine
    tiling: Tiling
    visits: tuple[Visit, ...]
    tiles: tuple[Tile, ...]
    repeats: Mapping[int, int]
    again: Mapping[int, int]
    tiers: tuple[Tier, ...]
    ring: int
    ahead: int
    order: Order
    device: DeviceMemory
    host: HostMemory
    seconds: float
    tokens: int
    n_trained: int

    @property
    def fits(self) -> bool:
        return (
            total(self.device) <= self.device.budget_bytes
            and total(self.host) <= self.host.budget_bytes
        )

    @property
    def put_bytes(self) -> int:
        """Bytes of weights that go to the device in a step."""
        return sum(tile.n_bytes for tile in self.tiles)

    @property
    def disk_bytes(self) -> int:
        """Those of them that are read from disk in every step."""
        return _read_bytes(self.tiles, self.tiers, self.again)

    def check(self, lead: str = "", other: str = SMALLER) -> None:
        """Raises DoesNotFitError, with the sum, where the budgets do not hold it. `lead`: said
        before that; `other`: what can be done besides giving it more."""
        for what, found in (("device", self.device), ("host", self.host)):
            if total(found) > found.budget_bytes:
                raise DoesNotFitError(
                    f"{lead}tuning needs {human(total(found))} of {what} memory, of which "
                    f"{human(found.budget_bytes)} may be used ({terms_of(found)}); give it "
                    f"--{what}-memory, or {other}",
                    report=self.as_dict(),
                )

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "fits": self.fits,
            "device": asdict(self.device),
            "host": asdict(self.host),
            "device_peak_bytes": total(self.device),
            "host_peak_bytes": total(self.host),
            "tile_bytes": self.tiling.tile_bytes,
            "tiles": len(self.tiles),
            "step": {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "bytes": self.put_bytes,
                "disk_bytes": self.disk_bytes,
            },
            "trained_numbers": self.n_trained,
        }


def lanes_of_chunk(length: int, n_lanes: int, most_rows: int) -> int:
    """How many lanes of so many tokens a chunk has: as many as `most_rows` holds, of which there is
    a whole number of chunks."""
    most = max(1, min(n_lanes, most_rows // length))
    return max(count for count in range(1, most + 1) if n_lanes % count == 0)


def trained_of(cfg: ModelConfig, adapter: Additions) -> Trained:
    """The adapters of each layer that has some, by leaf."""
    found = {}
    for layer, kind in enumerate(layer_kinds(cfg)):
        names = {leaf.name: layer_tensor_name(cfg, leaf, layer) for leaf in kind.leaves}
        own = {
            leaf: (name, adapter.of_matrix[name].scale)
            for leaf, name in names.items()
            if name in adapter.of_matrix
        }
        if own:
            found[layer] = own
    return found


def make_plan(
    weights: Weights,
    machine: Machine,
    settings: Settings,
    adapter: Additions,
    *,
    order: Order | None = None,
) -> TunePlan:
    """The plan with the largest chunks and tiles that fit, the most tiles ahead, and the fewest
    reads; if none fits, the smallest (`check` refuses). `adapter`: what is trained. `order`: of a
    run that was begun, whose chunks and tiles are taken whether or not they fit; it is of this
    platform."""
    trained = trained_of(weights.cfg, adapter)

    def plan_of(tiling, count, ahead, n_kept=0):
        given = weights, machine, settings, adapter, trained, tiling
        return _plan(*given, count, ahead, n_kept)

    if order is not None:
        assert order.platform == machine.platform, order
        of_tiles = partial(plan_of, cut(weights, order.tile_bytes, platform=machine.platform))
        plan = of_tiles(order.chunk_lanes, machine.kind.ahead)
        plan = _further_ahead(plan, of_tiles, [order.chunk_lanes])
        return _with_fewer_reads(plan, of_tiles)
    lengths = [lanes_of_chunk(settings.length, settings.lanes, rows) for rows in CHUNK_ROWS]
    counts = list(dict.fromkeys(lengths))
    for tile_bytes in TILE_BYTES:
        least = _least(weights, tile_bytes)
        of_tiles = partial(plan_of, cut(weights, least, platform=machine.platform))
        for number, count in enumerate(counts):
            plan = of_tiles(count, machine.kind.ahead)
            if plan.fits:
                enough = [n for n in counts[number + 1 :] if n * settings.length >= ENOUGH_ROWS]
                plan = _further_ahead(plan, of_tiles, [count, *enough])
                return _with_fewer_reads(plan, of_tiles)
    return plan


def _further_ahead(plan, plan_of, counts):
    """The one with most tiles ahead that the budgets hold, where there is a link; none of those
    that stay in host memory gives way to them. `counts`: the lanes of a chunk that are tried."""
    if not plan.machine.kind.has_link:
        return plan
    for ahead in range(MOST_AHEAD, plan.ahead, -1):
        for found in (plan_of(count, ahead) for count in counts):
            free = found.device.budget_bytes - total(found.device)
            is_spare = free >= SPARE * found.device.temporary_bytes
            if found.fits and is_spare and found.disk_bytes <= plan.disk_bytes:
                return found
    return plan


def _with_fewer_reads(plan, of_tiles):
    """The one with the fewest bytes from disk, where some slots keep tiles of a layer from when
    they are computed with again until they are gone back through. Such a slot saves a read in every
    layer, and one tile more that stays in host memory three of that one."""
    kept = kept_again(plan.visits, plan.tiers, len(plan.tiles))
    most = max(Counter(plan.visits[number].tile.layer for number in kept).values(), default=0)
    found = [plan]
    while most:
        found.append(of_tiles(plan.order.chunk_lanes, plan.ahead, most))
        most //= 2
    return min((one for one in found if one.fits), key=lambda one: one.disk_bytes, default=plan)


def _least(weights, tile_bytes):
    """A whole expert is a tile."""
    experts = weights.cfg.experts
    if experts is None:
        return tile_bytes
    numbers = 3 * experts.width * weights.cfg.hidden_size + experts.width
    return max(tile_bytes, 2 * ITEM_BYTES["float32"] * numbers)


def _plan(weights, machine, settings, adapter, trained, tiling, count, ahead, n_kept):
    """`n_kept`: the slots in which tiles are kept from the second time to the third."""
    visits = visits_of(tiling.tiles, {n: frozenset(of) for n, of in trained.items()})
    tiles, repeats = streamed(visits)
    ahead = min(ahead, len(tiles))
    ring = ahead + READING + n_kept
    needs = [
        *memory.fixed_needs(weights, machine, tiling, ring=ring, ahead=ahead),
        *_needs(weights, machine, settings, trained, tiling, count, adapter),
    ]
    device = device_memory(machine.device_budget, needs)
    if not machine.kind.has_link:
        # Device memory is host memory; the slots are counted once.
        needs.append(Need("resident", host=total(device) - device.slots_bytes))
    host = host_memory(machine.host_budget, needs)
    room = host.budget_bytes - total(host)
    tiers = tiers_of(tiles, repeats, room, tiling.slack)
    again = kept_again(visits, tiers, n_kept)
    read = _read_bytes(tiles, tiers, again)
    kept = sum(
        tile.n_bytes + tiling.slack
        for number, (tile, tier) in enumerate(zip(tiles, tiers, strict=True))
        if tier is Tier.HOST and number not in repeats
    )
    needs.append(Need("resident", host=kept))
    return TunePlan(
        machine=machine,
        tiling=tiling,
        visits=visits,
        tiles=tiles,
        repeats=repeats,
        again=again,
        tiers=tiers,
        ring=ring,
        ahead=ahead,
        order=Order(machine.platform, tiling.cut_as[0], count),
        device=device,
        host=host_memory(machine.host_budget, needs),
        seconds=_seconds(weights, machine, settings, visits, tiles, read, count),
        tokens=settings.lanes * settings.length,
        n_trained=_numbers_of(weights.cfg, trained, adapter),
    )


def _needs(weights, machine, settings, trained, tiling, count, adapter) -> list[Need]:
    """What a step needs of rows and adapters."""
    cfg, item = weights.cfg, ITEM_BYTES[weights.dtype]
    rows, chunk = settings.lanes * settings.length, count * settings.length
    lowest = min(trained)
    layers = cfg.num_hidden_layers - lowest
    of_layer = [FLOAT32 * _numbers_of(cfg, {layer: own}, adapter) for layer, own in trained.items()]
    state = FLOAT32 * _numbers_of(cfg, trained, adapter)
    inputs = layers * rows * cfg.hidden_size * item
    return [
        # Of two layers the adapters; of one the gradients as they are summed, and as they leave.
        Need("activation", device=_row_bytes(cfg, trained, tiling, item) * rows),
        Need("activation", device=4 * max(of_layer)),
        Need("temporary", device=_temporary_bytes(weights, tiling, settings, count)),
        Need("activation", device=rows // settings.length * settings.length**2),  # what is seen
        # Adapters, their gradients and moments, the same again while a step makes new ones, and
        # what they began as; or, of adapters and moments, what is written of them at a time.
        Need("runtime", host=10 * state),
        Need("cache", host=inputs) if machine.kind.has_link else Need("activation", device=inputs),
        Need("embedding", host=chunk * cfg.hidden_size * FLOAT32 + rows * 64),
        Need("runtime", host=machine.kind.compiler_bytes),
    ]


def _numbers_of(cfg, trained, adapter):
    """The numbers of the adapters of some layers."""
    kinds = layer_kinds(cfg)
    return sum(
        adapter.of_matrix[name].rank * sum(kinds[layer].leaf(leaf).shape(cfg))
        for layer, own in trained.items()
        for leaf, (name, _) in own.items()
    )


def _row_bytes(cfg, trained, tiling, item):
    """The most bytes of a row on the device: on the way back through a layer, where its numbers are
    there again beside their gradients."""
    width, most = cfg.hidden_size, 0
    for layer, kind in enumerate(layer_kinds(cfg)):
        units, needs = units_of(kind), again(kind, leaves_of(trained, layer))
        inputs = [_input_width(cfg, kind, unit) for unit in units]
        outs = [_out_width(cfg, kind, unit) for unit in units]
        experts = _routing_bytes(cfg, kind)
        for number in range(len(units)):
            kept = sum(
                item * (own if unit.source in names else 0) + item * (out if keeps else 0)
                for unit, names, keeps, own, out in zip(
                    units[: number + 1],
                    needs.kept[: number + 1],
                    needs.keeps_products[: number + 1],
                    inputs[: number + 1],
                    outs[: number + 1],
                    strict=True,
                )
            )
            later = inputs[number + 1] if number + 1 < len(units) else 0
            gradients = item * outs[number] + FLOAT32 * (inputs[number] + later)
            hidden = item * 3 * width + FLOAT32 * width  # before and within the layer; gradients
            most = max(most, kept + gradients + hidden + experts)
    # At the head: its input and the sums, before and after a program.
    return max(most, item * 2 * width + 4 * FLOAT32 * width)


def _routing_bytes(cfg, kind):
    """Of a row in a layer with experts: what they read and add to, and the gradients of that."""
    if not kind.n_experts:
        return 0
    return 4 * FLOAT32 * cfg.hidden_size + 4 * FLOAT32 * kind.n_experts


def _input_width(cfg, kind, unit):
    return kind.leaf(unit.leaves[0]).shape(cfg)[-1] if unit.leaves else 0


def _out_width(cfg, kind, unit):
    if unit.of_experts:
        return 0
    groups = unit.stage.groups
    return sum(kind.leaf(group.leaves[0]).shape(cfg)[0] for group in groups)


def _temporary_bytes(weights, tiling, settings, count):
    """Bytes of the temporaries of the largest program of a chunk."""
    cfg, rows = weights.cfg, count * settings.length
    wide = max(
        part.width for tile, _ in tiling.distinct for part in tile.parts if len(part.shape) > 1
    )
    high = max(sum(tile.heights.values()) for tile, _ in tiling.distinct) if rows else 0
    of_rows = FLOAT32 * rows * (2 * wide + 3 * high)
    of_head = FLOAT32 * rows * (3 * cfg.hidden_size + 3 * tiling.head_rows)
    # What is decoded to float32 is brought into order, and rounded.
    decoded = tiling.decoded_bytes * (1 + 2 * FLOAT32 // ITEM_BYTES[weights.dtype])
    mixing = _mixing_bytes(cfg, settings.length, count) + tiling.decoded_bytes
    return max(of_rows + decoded, of_head + decoded, mixing)


def _mixing_bytes(cfg, length, count):
    """Those of the way back through what mixes tokens."""
    most = 0
    for kind in set(layer_kinds(cfg)):
        if kind.delta is not None:
            found = 4 * delta_bytes(kind.delta, lanes=count, tokens=length, is_chain=True)
        else:
            attention = kind.attention or kind.latent.of_heads
            pieces = attention_pieces(attention, lanes=count, tokens=length, capacity=0)
            heads, size = attention.n_heads, attention.head_dim
            # Scores and their gradients, of a piece, with which are seen. What is turned, by which
            # sines, normalised and multiplied, and the same on the way back, of all rows. What was
            # mixed before each piece.
            scores = 2 * FLOAT32 * pieces.lanes * heads * length * (length // pieces.fresh)
            row = FLOAT32 * length * heads * size
            copies = 9 + (2 if attention.head_norms or attention.clip else 0)
            small = count * length * (length // pieces.fresh + 4 * FLOAT32 * size)
            found = scores + copies * count * row + small + (pieces.fresh - 1) * pieces.lanes * row
        most = max(most, found)
    return most


def _read_bytes(tiles, tiers, again):
    """The bytes that are read from disk in a step."""
    pairs = enumerate(zip(tiles, tiers, strict=True))
    return sum(t.n_bytes for n, (t, tier) in pairs if tier is Tier.DISK and n not in again)


def _seconds(weights, machine, settings, visits, tiles, read, count):
    """The slowest of disk, of which `read` bytes are read, link, arithmetic and the steps of the
    host."""
    rows = settings.lanes * settings.length
    moved = sum(tile.n_bytes for tile in tiles) if machine.kind.has_link else 0
    times = {Way.FORWARD: 1, Way.AGAIN: 1, Way.BACK: 2, Way.HEAD: 4}
    products = sum(
        times[visit.way] * sum(part.n_weights for part in visit.tile.parts) for visit in visits
    )
    of_gpu = GPU_OPERATIONS if weights.dtype != "float32" else GPU_OPERATIONS / 8
    speed = of_gpu if machine.kind.has_link else CORE_OPERATIONS * machine.cores
    n_calls = len(visits) * (settings.lanes // count)
    steps = len(visits) * machine.kind.step_s + 2 * n_calls * machine.kind.program_s
    return max(
        read / machine.disk_speed,
        moved / machine.bytes_per_s,
        2 * rows * products / speed,
        steps,
    )


def described(plan: TunePlan) -> list[str]:
    """The plan in lines for a person."""
    lines = []
    for title, found in (("device", plan.device), ("host", plan.host)):
        lines.append(title)
        for name, n_bytes in asdict(found).items():
            if n_bytes and name != "budget_bytes":
                lines.append(f"  {memory_name(name):<14}{human(n_bytes):>12}")
        lines.append(f"  {'together':<14}{human(total(found)):>12} of {human(found.budget_bytes)}")
    return lines
