"""Byte arithmetic before any allocation: what a run holds where, the shortest sweep that fits, or a
refusal with the sum.

Pure and free of JAX, so that `jlayer plan` answers from a config alone. What the formulas say of
compiled programs' temporaries is held against the programs' own figures by a test.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from jlayer.checkpoint.layout import ALIGNMENT
from jlayer.config import ModelConfig
from jlayer.encodings.quantization import (
    BLOCK_BYTES,
    SCHEMES,
    block_rows,
    scheme_of_q,
    split_piece,
    stored_bytes,
)
from jlayer.errors import DoesNotFitError
from jlayer.families.llama import FINAL_NORM, published_tensors
from jlayer.plan.blob import blob_of
from jlayer.plan.tiles import STAGES, Tile, cut, norm_leaves
from jlayer.spec import ITEM_BYTES, query_pieces
from jlayer.stream.schedule import Tier

# Input shapes come from short lists, so that a model of 80 layers, a long prompt and a thousand
# tokens compile no more often than a model of two and a short one.
CHUNK_TOKENS = (2, 8, 64, 512)
MIN_CAPACITY = 64
CAPACITY_STEP = (
    1024  # from here on capacity grows by steps: a doubled 70B cache would cost gigabytes
)

# None: whole layers. On an H200 tiles of 64 MiB move at the link's full speed, 32 MiB at 95% of it.
TILE_BYTES = (None, *(mib << 20 for mib in (256, 128, 64, 48, 32, 16, 8, 4, 2, 1)))
# Tiles on the device at a time, and host slots beyond them that are being read meanwhile.
AHEAD = {"gpu": 4, "cpu": 2}
READING = 2
# Outputs of the head on their way to the host at a time: on the device, and as copies there.
OUTGOING = 3
# What each tile costs beside its bytes, in Python and the driver: a turn of its own, one more for
# each array that crosses the link (in a blob, for each matrix), and for each program that each
# chunk of tokens goes through; a gap on the link (5% of the time of 32 MiB), a gap on the disk.
# H200: 0.29 to 0.44 ms for a tile of a matrix or two, from one machine to the next. Bytes do not
# vary so; a plan is therefore chosen as if steps took STEPS_VARY times as long.
STEP_S = {"gpu": 220e-6, "cpu": 80e-6}
ARRAY_S = {"gpu": 60e-6, "cpu": 0.0}
PROGRAM_S = {"gpu": 50e-6, "cpu": 0.0}
STEPS_VARY = {"gpu": 1.5, "cpu": 1.0}
LINK_GAP_S = 30e-6
DISK_GAP_S = 200e-6
# Bytes/s where nothing was measured or given: a PCIe 4 x16 link, an NVMe disk, and the product of
# bfloat16 weights on two cores.
DEFAULT_LINK = {"gpu": 25e9, "cpu": 14e9}
DEFAULT_DISK = 2e9
# How fast a GPU's programs go through bfloat16 weights that are there, for up to 512 tokens (H200).
# Quantised ones are written out first, on either kind of device: that takes as long as if each had
# QUANTIZED_BYTES.
GPU_ARITHMETIC = 1e12
QUANTIZED_BYTES = 4
# What XLA's libraries hold in the allocator all the time (140 MB measured on an H200), the
# workspace of a matrix product (40 MB), and what is lost between blocks of different sizes.
LIBRARY_BYTES = {"gpu": 256 << 20, "cpu": 0}
LOGIT_BYTES = 5  # of logits that are handed over: a float32, and whether it is finite
# What is left free when the rest of a device is filled with tiles that stay.
RESERVE_BYTES = 96 << 20
# Anonymous memory of the process with JAX started and a model opened, where it was not measured (a
# plan made from a config alone), and what compiling a run's programs adds to it.
BASELINE_BYTES = {"cpu": 76 << 20, "gpu": 270 << 20}
COMPILER_BYTES = {"cpu": 128 << 20, "gpu": 384 << 20}


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. `platform`: "cpu" or "gpu"; bytes, and bytes a second."""

    platform: str
    device_budget: int
    host_budget: int
    context_bytes: int
    disk_speed: float = DEFAULT_DISK
    link_speed: float | None = None
    baseline_bytes: int | None = None

    @property
    def runtime_bytes(self) -> int:
        """What the process holds beside what is counted one by one."""
        baseline = self.baseline_bytes or BASELINE_BYTES[self.platform]
        return baseline + COMPILER_BYTES[self.platform]

    @property
    def bytes_per_s(self) -> float:
        """How fast weights come from the host to where they are multiplied."""
        return self.link_speed or DEFAULT_LINK[self.platform]


@dataclass(frozen=True)
class Shapes:
    """What a run carries: `n_columns` are the tokens of its longest sweep, padding included,
    `chunk` the most that go through a tile at once; `every`: logits of all of them are wanted,
    `together`: in one array."""

    batch: int
    capacity: int
    chunk: int
    n_columns: int
    every: bool = False
    n_chunks: int = 1
    together: bool = False


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device. On a CPU the context is nothing and the rest is what JAX holds."""

    budget_bytes: int
    context_bytes: int
    slots_bytes: int
    resident_bytes: int
    cache_bytes: int
    activation_bytes: int
    temporary_bytes: int
    draft_bytes: int = 0


@dataclass(frozen=True)
class HostMemory:
    """Anonymous and pinned bytes of the process."""

    budget_bytes: int
    slots_bytes: int
    resident_bytes: int
    embedding_bytes: int
    runtime_bytes: int


@dataclass(frozen=True)
class Plan:
    """What lives where, and the sum behind it. `tiers` has a row for each of `tiles`."""

    machine: Machine
    device: DeviceMemory
    host: HostMemory
    tiles: tuple[Tile, ...]
    tiers: tuple[Tier, ...]
    tile_bytes: int
    ring: int
    ahead: int
    chunk: int
    n_chunks: int
    capacity: int
    model_bytes: int
    published_bytes: int  # before it was quantised, if it was
    n_layers: int

    @property
    def device_peak_bytes(self) -> int:
        return _sum(self.device)

    @property
    def host_peak_bytes(self) -> int:
        return _sum(self.host)

    @property
    def fits(self) -> bool:
        return (
            self.device_peak_bytes <= self.device.budget_bytes
            and self.host_peak_bytes <= self.host.budget_bytes
        )

    def tier_bytes(self, tier: Tier) -> int:
        """Weight bytes of a tier, the head's included."""
        return sum(t.n_bytes for t, own in zip(self.tiles, self.tiers, strict=True) if own is tier)

    @property
    def put_bytes(self) -> int:
        """Bytes that go to the device each sweep."""
        return self.tier_bytes(Tier.DISK) + self.tier_bytes(Tier.HOST)

    @property
    def sweep_seconds(self) -> float:
        """The slowest of disk, link, arithmetic and the steps themselves: each hides the others."""
        return max(self._bytes_s, self._steps_s)

    @property
    def cautious_seconds(self) -> float:
        """The same where steps are slow: what plans are chosen by."""
        return max(self._bytes_s, self._steps_s * STEPS_VARY[self.machine.platform])

    @property
    def _bytes_s(self):
        machine, counts = self.machine, Counter(self.tiers)
        on_gpu = machine.platform == "gpu"
        passing = [Tier.DISK, Tier.HOST] if on_gpu else list(Tier)
        disk_s = self.tier_bytes(Tier.DISK) / machine.disk_speed + counts[Tier.DISK] * DISK_GAP_S
        work = sum(map(_work_bytes, self.tiles))
        # On a CPU nothing is moved: its link is the arithmetic itself, over every weight.
        moved = self.put_bytes if on_gpu else work
        gaps = sum(counts[tier] for tier in passing) * LINK_GAP_S
        link_s = moved / machine.bytes_per_s + gaps
        return max(disk_s, link_s, on_gpu * self.n_chunks * work / GPU_ARITHMETIC)

    @property
    def _steps_s(self):
        platform = self.machine.platform
        n_arrays = sum(
            len(tile.heights if blob_of(tile, platform) else tile.parts) for tile in self.tiles
        )
        n_programs = sum(map(_programs, self.tiles)) * self.n_chunks
        return (
            len(self.tiles) * STEP_S[platform]
            + n_arrays * ARRAY_S[platform]
            + n_programs * PROGRAM_S[platform]
        )

    def layers(self, tier: Tier) -> int:
        """How many layers' worth of bytes a tier holds; the three add up to all layers."""
        shares = dict.fromkeys(Tier, 0)
        for tile, own in zip(self.tiles, self.tiers, strict=True):
            if tile.layer is not None:
                shares[own] += tile.n_bytes
        whole = sum(shares.values()) / self.n_layers
        from_disk = math.ceil(shares[Tier.DISK] / whole - 1e-9)
        on_device = min(math.floor(shares[Tier.DEVICE] / whole), self.n_layers - from_disk)
        in_host = self.n_layers - from_disk - on_device
        return {Tier.DEVICE: on_device, Tier.HOST: in_host, Tier.DISK: from_disk}[tier]

    def as_dict(self) -> dict:
        """As `plan --json` prints it."""
        return {
            "fits": self.fits,
            "smallest_device_memory_bytes": self.device_peak_bytes - self._kept_by_choice,
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
                "bytes": sum(tile.n_bytes for tile in self.tiles),
                "disk_bytes": self.tier_bytes(Tier.DISK),
                "host_bytes": self.tier_bytes(Tier.HOST),
                "seconds": self.sweep_seconds,
            },
        }

    @property
    def _kept_by_choice(self):
        return _kept_on_device(self.tiles, self.tiers, self.machine.platform)

    def check(self):
        """Raises DoesNotFitError with the sum and the smallest budget that would do."""
        for option, memory, peak in (
            ("device_memory", self.device, self.device_peak_bytes),
            ("host_memory", self.host, self.host_peak_bytes),
        ):
            if peak > memory.budget_bytes:
                raise DoesNotFitError(
                    f"{option}: {human(memory.budget_bytes)} given, needed are {human(peak)} = "
                    f"{_terms(memory)}; give at least {-(-peak // 2**20)}MiB, "
                    "or ask for fewer tokens",
                    report={"plan": self.as_dict()},
                )


def make_plan(
    cfg: ModelConfig,
    machine: Machine,
    *,
    dtype_of: Callable[[str], str],
    dtype: str,
    batch: int = 1,
    longest: int = 1,
    context: int = 1,
    every: bool = False,
    together: bool = False,
    keeps_layers: bool = True,
) -> Plan:
    """The plan of the shortest sweep that fits: tile size, chunk of tokens, and what stays where.

    `longest`: tokens of a sequence in its longest sweep; `context`: positions it may reach;
    `every`: logits of all tokens are wanted, not of the last alone; `together`: in one array on the
    host. Where nothing fits, the plan
    that needs least (`fits` is False; `check` refuses).
    """
    options = {"dtype_of": dtype_of, "dtype": dtype}
    shape = {"batch": batch, "longest": longest, "context": context}
    shape |= {"every": every, "together": together}
    best = smallest = None
    for tile_bytes in TILE_BYTES:
        tiles = cut(cfg, dtype_of, tile_bytes)
        bare = _with_largest_chunk(cfg, machine, tiles, options, shape)
        if smallest is None or bare.device_peak_bytes < smallest.device_peak_bytes:
            smallest = bare
        if not bare.fits:
            continue
        plan = _with_tiers(bare) if keeps_layers else bare
        if best is None or plan.cautious_seconds < best.cautious_seconds:
            best = plan
        elif plan.chunk <= best.chunk:
            break  # smaller tiles leave more memory to keep layers in; here that no longer pays
    return best or smallest


def _with_largest_chunk(cfg, machine, tiles, options, shape):
    """The bare plan with as many tokens at once as fit: fewer only cost dispatches."""
    for most in reversed(CHUNK_TOKENS):
        shapes = shapes_of_run(**shape, most=most)
        bare = _bare_plan(cfg, machine, tiles, shapes=shapes, **options)
        if bare.fits:
            break
    return bare


def refit(
    plan: Plan,
    cfg: ModelConfig,
    *,
    dtype_of: Callable[[str], str],
    dtype: str,
    batch: int,
    longest: int,
    context: int,
    every: bool = False,
    together: bool = False,
) -> Plan:
    """The same tiles in the same places for another run; `fits` says whether the promises allow
    it."""
    options = {"dtype_of": dtype_of, "dtype": dtype}
    shape = {"batch": batch, "longest": longest, "context": context}
    shape |= {"every": every, "together": together}
    for most in reversed(CHUNK_TOKENS):
        shapes = shapes_of_run(**shape, most=most)
        bare = _bare_plan(cfg, plan.machine, plan.tiles, shapes=shapes, **options)
        same = _with_kept(bare, plan.tiers)
        if same.fits:
            break
    return same


def shapes_of_run(
    *,
    batch: int,
    longest: int,
    context: int,
    every: bool = False,
    together: bool = False,
    most: int = CHUNK_TOKENS[-1],
) -> Shapes:
    """The input shapes of a run whose longest sweep carries `longest` tokens a sequence, `most` at
    once."""
    sizes = chunks(longest, most)
    capacity = capacity_for(context)
    return Shapes(batch, capacity, max(sizes), sum(sizes), every, len(sizes), together)


def chunks(n_tokens: int, most: int = CHUNK_TOKENS[-1]) -> tuple[int, ...]:
    """The sizes, from CHUNK_TOKENS up to `most`, of the chunks that `n_tokens` columns go through a
    tile in.

    Padding costs arithmetic and every chunk a dispatch, so up to half of a size goes in chunks of
    the next smaller.
    """
    sizes, rest = [], n_tokens
    usable = [size for size in CHUNK_TOKENS if size <= most]
    for size, smaller in zip(reversed(usable), [*reversed(usable[:-1]), 0], strict=True):
        sizes += [size] * (rest // size)
        rest %= size
        if rest > (size // 2 if smaller >= 64 else smaller):
            return (*sizes, size)
    return tuple(sizes)


def capacity_for(n_positions: int) -> int:
    """Cached positions to make room for: doubling from MIN_CAPACITY, then in steps of
    CAPACITY_STEP."""
    if n_positions > CAPACITY_STEP:
        return -(-n_positions // CAPACITY_STEP) * CAPACITY_STEP
    capacity = MIN_CAPACITY
    while capacity < n_positions:
        capacity *= 2
    return capacity


def _bare_plan(cfg, machine, tiles, *, dtype_of, dtype, shapes):
    """The least that a way of cutting needs: nothing kept beyond the ring."""
    item = ITEM_BYTES[dtype]
    stored = dtype_of(FINAL_NORM.published)
    tile_bytes = max(tile.n_bytes for tile in tiles)
    slot = tile_bytes + _slack(tiles)
    ahead = min(AHEAD[machine.platform], len(tiles))
    ring = ahead + READING
    layers, width = cfg.num_hidden_layers, cfg.hidden_size
    n_norms = len(norm_leaves(cfg)) * layers + 1
    logits = logits_bytes(cfg, shapes, tiles)
    cache = 2 * shapes.batch * shapes.capacity * cfg.num_key_value_heads * cfg.head_dim * item
    device = DeviceMemory(
        budget_bytes=machine.device_budget,
        context_bytes=machine.context_bytes,
        # One more than are there at a time: blocks of other sizes leave gaps between them. What
        # comes as a blob has the slack of its slot.
        slots_bytes=(ahead + 1) * slot if machine.platform == "gpu" else ahead * tile_bytes,
        resident_bytes=n_norms * width * item,
        cache_bytes=layers * cache,
        activation_bytes=activation_bytes(cfg, shapes, item_bytes=item, whole=_is_whole(tiles))
        + OUTGOING * logits,
        temporary_bytes=temporary_bytes(cfg, shapes, tiles, dtype=dtype, platform=machine.platform)
        + LIBRARY_BYTES[machine.platform],
    )
    on_host = _sum(device) - device.slots_bytes if machine.platform == "cpu" else 0
    host = HostMemory(
        budget_bytes=machine.host_budget,
        slots_bytes=ring * slot,
        resident_bytes=on_host,
        embedding_bytes=shapes.batch * shapes.n_columns * width * (item + 8)
        + shapes.batch * 2 * cfg.vocab_size * 16
        + shapes.every * (OUTGOING if machine.platform == "gpu" else 1) * logits
        + shapes.together * shapes.batch * shapes.n_columns * cfg.vocab_size * LOGIT_BYTES,
        runtime_bytes=machine.runtime_bytes,
    )
    return Plan(
        machine=machine,
        device=device,
        host=host,
        tiles=tiles,
        tiers=(Tier.DISK,) * len(tiles),
        tile_bytes=tile_bytes,
        ring=ring,
        ahead=ahead,
        chunk=shapes.chunk,
        n_chunks=shapes.n_chunks,
        capacity=shapes.capacity,
        model_bytes=sum(
            stored_bytes(dtype_of(name), shape) for name, shape in published_tensors(cfg).items()
        ),
        published_bytes=sum(
            stored_bytes(stored if dtype_of(name) in SCHEMES else dtype_of(name), shape)
            for name, shape in published_tensors(cfg).items()
        ),
        n_layers=layers,
    )


def _with_tiers(plan: Plan) -> Plan:
    """What the budgets leave over keeps tiles: on the device (where it is not the host's own
    memory), then in the host.

    Each kept set is spread evenly over the sweep, so that the disk and the link work side by side
    all along.
    """
    sizes = [tile.n_bytes for tile in plan.tiles]
    on_device = [_device_bytes(tile, plan.machine.platform) for tile in plan.tiles]
    room = plan.device.budget_bytes - plan.device_peak_bytes - RESERVE_BYTES
    kept = _spread(on_device, room if plan.machine.platform == "gpu" else 0)
    rest = [index for index, keep in enumerate(kept) if not keep]
    slack = _slack(plan.tiles)
    room = plan.host.budget_bytes - plan.host_peak_bytes
    in_host = _spread([sizes[index] + slack for index in rest], room)
    tiers = [Tier.DEVICE if keep else Tier.DISK for keep in kept]
    for index, keep in zip(rest, in_host, strict=True):
        if keep:
            tiers[index] = Tier.HOST
    return _with_kept(plan, tuple(tiers))


def _with_kept(plan, tiers):
    """A bare plan with what `tiers` keep added to its sums."""
    slack = _slack(plan.tiles)
    kept = list(zip(plan.tiles, tiers, strict=True))
    device_bytes = _kept_on_device(plan.tiles, tiers, plan.machine.platform)
    host_bytes = sum(tile.n_bytes + slack for tile, tier in kept if tier is Tier.HOST)
    return replace(
        plan,
        tiers=tiers,
        device=replace(plan.device, resident_bytes=plan.device.resident_bytes + device_bytes),
        host=replace(plan.host, resident_bytes=plan.host.resident_bytes + host_bytes),
    )


def _kept_on_device(tiles, tiers, platform):
    kept = zip(tiles, tiers, strict=True)
    return sum(_device_bytes(tile, platform) for tile, tier in kept if tier is Tier.DEVICE)


def _device_bytes(tile, platform):
    """What a tile is on the device: a blob is there with the room around its parts."""
    blob = blob_of(tile, platform)
    return blob.n_bytes if blob else tile.n_bytes


def _spread(sizes: list[int], room: int) -> list[bool]:
    """Which of `sizes` to keep within `room`, evenly over the list."""
    total = sum(sizes)
    if room >= total:
        return [True] * len(sizes)
    kept, used, passed = [], 0, 0
    for size in sizes:
        passed += size
        # What should be kept by now, in proportion; a whole tile or none of it.
        keep = used + size <= min(room, room * passed / total + size / 2)
        kept.append(keep)
        used += size * keep
    return kept


def activation_bytes(cfg: ModelConfig, shapes: Shapes, *, item_bytes: int, whole: bool) -> int:
    """What a sweep's tokens hold between programs: hidden states and the stage under way.

    Whole layers keep only hidden states; tiles also hold a stage's input and the products so far,
    of all tokens.
    """
    d, f = cfg.hidden_size, cfg.intermediate_size
    heads = cfg.num_attention_heads * cfg.head_dim
    kv_heads = cfg.num_key_value_heads * cfg.head_dim
    each = 2 * d if whole else 3 * d + max(f + d, 2 * (heads + 2 * kv_heads))
    columns = shapes.batch * shapes.n_columns
    joined = 0 if whole else shapes.batch * shapes.chunk * f * item_bytes
    return columns * (each * item_bytes + 4) + joined


def logits_bytes(cfg: ModelConfig, shapes: Shapes, tiles: tuple[Tile, ...]) -> int:
    """The logits that one of the head's programs gives; a few of them wait on their way out."""
    if not shapes.every:
        return shapes.batch * 2 * cfg.vocab_size * 4
    rows = max(sum(tile.heights.values()) for tile in tiles if tile.stage == "head")
    return shapes.batch * shapes.chunk * rows * 4


def temporary_bytes(
    cfg: ModelConfig, shapes: Shapes, tiles: tuple[Tile, ...], *, dtype: str, platform: str
) -> int:
    """An upper bound for the temporaries of any one program of a run.

    What is alive at once in attention or in the MLP, in float32; and, where weights are of another
    dtype than the run's, the tile's matrices written out in the run's; of quantised ones a block of
    rows each.
    """
    from_attention = attention_temporary_bytes(cfg, shapes)
    b, t = shapes.batch, shapes.chunk
    cast = max(sum(_written_out(part, dtype, platform) for part in tile.parts) for tile in tiles)
    quantized = any(split_piece(part.leaf)[1] for part in tiles[0].parts)
    if _is_whole(tiles):
        # The products of a quantised matrix's blocks are put in order once more.
        mlp = (4 if quantized else 3) * 4 * b * t * cfg.intermediate_size
        return cast + max(from_attention, mlp) + 2 * 4 * b * t * cfg.hidden_size
    rows = max(sum(tile.heights.values()) for tile in tiles)
    widest = max(cfg.hidden_size, cfg.intermediate_size)
    product = 3 * 4 * b * t * rows + 4 * b * t * widest
    return max(cast + product, from_attention, 4 * 4 * b * t * widest)


def _written_out(part, dtype, platform):
    """What a program writes of a part in the run's dtype; a CPU may take float32 for quantised
    ones."""
    piece = split_piece(part.leaf)[1]
    if piece is None:
        return 0 if part.dtype == dtype else math.prod(part.shape) * ITEM_BYTES[dtype]
    if piece != "q":
        return 0
    item = ITEM_BYTES["float32" if platform == "cpu" else dtype]
    row_bytes = scheme_of_q(part.dtype).n_weights(part.shape[1:]) * item
    return block_rows(part.shape[0], row_bytes, BLOCK_BYTES[platform]) * row_bytes


def attention_temporary_bytes(cfg: ModelConfig, shapes: Shapes) -> int:
    """Scores of as many queries as are made at once (twice: before and after the exponential), the
    cache read in float32, and the heads in float32."""
    b, t, s = shapes.batch, shapes.chunk, shapes.capacity
    heads = cfg.num_attention_heads * cfg.head_dim
    kv_heads = cfg.num_key_value_heads * cfg.head_dim
    pieces = query_pieces(batch=b, tokens=t, n_heads=cfg.num_attention_heads, capacity=s)
    scores = 4 * b * cfg.num_attention_heads * (t // pieces) * s
    return 2 * scores + 2 * 4 * b * s * kv_heads + 4 * 4 * b * t * heads


def human(n_bytes: int) -> str:
    """Bytes in words, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"


def _slack(tiles):
    """What a slot or a room has beyond its tile: the blocks around each segment, one for each part
    at most."""
    return ALIGNMENT * 2 * max(len(tile.parts) for tile in tiles)


def _work_bytes(tile):
    """What a tile is to the arithmetic: its bytes, quantised weights as if each had
    QUANTIZED_BYTES."""
    return sum(
        QUANTIZED_BYTES * scheme_of_q(part.dtype).n_weights(part.shape)
        if split_piece(part.leaf)[1] == "q"
        else part.n_bytes
        for part in tile.parts
    )


def _programs(tile):
    """How many programs a chunk goes through at a tile: one over its rows, one where a stage ends,
    and one where a layer begins."""
    ends_stage = tile.ends_stage and tile.stage in dict(STAGES)
    return 1 + ends_stage + (ends_stage and tile.stage == STAGES[0][0])


def _is_whole(tiles):
    return tiles[0].stage == "block"


def _sum(memory):
    return sum(value for name, value in asdict(memory).items() if name != "budget_bytes")


def _terms(memory):
    terms = {
        name.removesuffix("_bytes"): value
        for name, value in asdict(memory).items()
        if name != "budget_bytes"
    }
    return " + ".join(f"{name} {human(value)}" for name, value in terms.items() if value)
