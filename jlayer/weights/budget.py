"""Byte arithmetic before any allocation: what a run holds where, whether it fits, or a refusal that
shows the sum.

Pure and free of JAX, so that `jlayer plan` answers from a config alone. What the formulas say of a
compiled program's temporaries is held against the program's own figure by a test.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from jlayer.config import ModelConfig
from jlayer.errors import DoesNotFitError
from jlayer.families import head_leaf, layer_leaves, published_tensors
from jlayer.spec import ITEM_BYTES
from jlayer.weights.layout import ALIGNMENT

N_SLOTS = 2
# Input shapes come from short lists, so that a model of 80 layers, a long prompt and a thousand
# tokens compile no more often than a model of two and a short one.
CHUNK_TOKENS = (2, 8, 64, 512)
MIN_CAPACITY = 64
# Anonymous memory of Python with JAX started on a CPU and the programs compiled, before any slot:
# 280-330 MB measured.
RUNTIME_BYTES = 352 << 20


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
    """What lives where, and the sum behind it. `n_layers` all come from disk; two tiles are on the
    device at a time."""

    device: DeviceMemory
    host: HostMemory
    model_bytes: int
    n_layers: int
    tile_bytes: int
    sweep_bytes: int

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

    def as_dict(self) -> dict:
        """As `plan --json` prints it."""
        return {
            "fits": self.fits,
            "smallest_device_memory_bytes": self.device_peak_bytes,
            "device": {**asdict(self.device), "peak_bytes": self.device_peak_bytes},
            "host": {**asdict(self.host), "peak_bytes": self.host_peak_bytes},
            "disk": {
                "source_bytes": self.model_bytes,
                "target_bytes": self.model_bytes,
                "peak_bytes": 2 * self.model_bytes,
            },
            "tiers": {"device_layers": 0, "host_layers": 0, "disk_layers": self.n_layers},
            "tile_bytes": self.tile_bytes,
            "sweep": {
                "bytes": self.sweep_bytes,
                "disk_bytes": self.sweep_bytes,
                "host_bytes": 0,
                "seconds": None,
            },
        }

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
    *,
    stored_dtype: str,
    dtype: str,
    device_budget: int,
    host_budget: int,
    context_bytes: int,
    shared_memory: bool,
    batch: int,
    capacity: int,
    chunk: int,
    n_columns: int,
) -> Plan:
    """The plan of a run that streams whole layers through N_SLOTS slots.

    `shared_memory`: the device is the host's own memory, where a slot counts in both promises.
    `chunk`: the most tokens that go through a layer at once; `n_columns`: all tokens of the longest
    sweep, padding included.
    """
    item, stored = ITEM_BYTES[dtype], ITEM_BYTES[stored_dtype]
    layer_bytes = sum(leaf.n_elements(cfg) for leaf in layer_leaves(cfg)) * stored
    vocab, width = head_leaf(cfg).shape(cfg)
    tile_bytes = max(layer_bytes, width * stored)
    cache = 2 * batch * capacity * cfg.num_key_value_heads * cfg.head_dim * item
    activation = 2 * batch * n_columns * width * item
    logits = 3 * batch * 2 * vocab * 4
    temporary = block_temporary_bytes(
        cfg,
        batch=batch,
        tokens=chunk,
        capacity=capacity,
        item_bytes=item,
        casts=dtype != stored_dtype,
    )
    slots = N_SLOTS * tile_bytes
    device = DeviceMemory(
        budget_bytes=device_budget,
        context_bytes=context_bytes,
        slots_bytes=slots,
        resident_bytes=width * stored,
        cache_bytes=cfg.num_hidden_layers * cache,
        activation_bytes=activation + logits,
        temporary_bytes=temporary,
    )
    on_host = _sum(device) - slots if shared_memory else 0
    host = HostMemory(
        budget_bytes=host_budget,
        slots_bytes=N_SLOTS * (tile_bytes + 2 * ALIGNMENT),
        resident_bytes=on_host,
        embedding_bytes=batch * n_columns * width * stored,
        runtime_bytes=RUNTIME_BYTES,
    )
    tensors = published_tensors(cfg)
    layers = cfg.num_hidden_layers * layer_bytes
    return Plan(
        device=device,
        host=host,
        model_bytes=sum(map(math.prod, tensors.values())) * stored,
        n_layers=cfg.num_hidden_layers,
        tile_bytes=tile_bytes,
        sweep_bytes=layers + vocab * width * stored,
    )


def chunks(n_tokens: int) -> tuple[int, ...]:
    """The sizes, from CHUNK_TOKENS, of the chunks that `n_tokens` columns go through a layer in.

    Padding costs arithmetic and every chunk a dispatch, so up to half of the largest size goes in
    chunks of the second.
    """
    tiny, small, middle, large = CHUNK_TOKENS
    sizes = [large] * (n_tokens // large)
    rest = n_tokens % large
    if rest > large // 2:
        return (*sizes, large)
    sizes += [middle] * (rest // middle)
    rest %= middle
    if rest > 0:
        sizes.append(tiny if rest <= tiny else small if rest <= small else middle)
    return tuple(sizes)


def capacity_for(n_positions: int) -> int:
    """Cached positions to make room for: the next of MIN_CAPACITY, doubling."""
    capacity = MIN_CAPACITY
    while capacity < n_positions:
        capacity *= 2
    return capacity


def shapes_of_run(*, batch: int, longest: int, context: int) -> dict[str, int]:
    """The input shapes of a run, as `make_plan` takes them: its longest sweep carries `longest`
    tokens a sequence."""
    sizes = chunks(longest)
    return {
        "batch": batch,
        "capacity": capacity_for(context),
        "chunk": max(sizes),
        "n_columns": sum(sizes),
    }


def block_temporary_bytes(
    cfg: ModelConfig, *, batch: int, tokens: int, capacity: int, item_bytes: int, casts: bool
) -> int:
    """An upper bound for the temporaries of one block: what is alive at once in attention or in the
    MLP, in float32.

    With `casts` (weights of another dtype than the run's) XLA may write every matrix out in the
    run's dtype.
    """
    b, t, s = batch, tokens, capacity
    d, f = cfg.hidden_size, cfg.intermediate_size
    heads = cfg.num_attention_heads * cfg.head_dim
    kv_heads = cfg.num_key_value_heads * cfg.head_dim
    scores = 4 * b * cfg.num_attention_heads * t * s
    attention = 2 * scores + 2 * 4 * b * s * kv_heads + 3 * 4 * b * t * heads
    mlp = 3 * 4 * b * t * f
    cast = sum(leaf.n_elements(cfg) for leaf in layer_leaves(cfg)) * item_bytes if casts else 0
    return cast + max(attention, mlp) + 2 * 4 * b * t * d


def human(n_bytes: int) -> str:
    """Bytes in words, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"


def _sum(memory):
    return sum(value for name, value in asdict(memory).items() if name != "budget_bytes")


def _terms(memory):
    terms = {
        name.removesuffix("_bytes"): value
        for name, value in asdict(memory).items()
        if name != "budget_bytes"
    }
    return " + ".join(f"{name} {human(value)}" for name, value in terms.items() if value)
