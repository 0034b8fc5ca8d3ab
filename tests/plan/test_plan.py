"""The plan's sums: held against compiled programs, against refusals, and against known sizes of
known models."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.encodings.registry import SCHEMES
from jlayer.engine.forward import _Outgoing
from jlayer.engine.programs import struct_of
from jlayer.errors import DoesNotFitError
from jlayer.plan.machine import Machine
from jlayer.plan.memory import logits_bytes, temporary_bytes
from jlayer.plan.plan import make_plan, shapes_of_run
from jlayer.plan.shapes import CHUNK_TOKENS, Shapes, capacity_for, chunks
from jlayer.plan.tiles import Tier, cut
from jlayer.spec import ModelConfig, Rope

LLAMA_70B = ModelConfig(
    "llama",
    128256,
    8192,
    28672,
    80,
    64,
    8,
    128,
    131072,
    1e-5,
    Rope(),
    False,
    False,
    False,
    False,
    "silu",
    "bfloat16",
)
SMALL = replace(
    LLAMA_70B,
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=48,
    max_position_embeddings=4096,
)
LLAMA_405B = replace(
    LLAMA_70B,
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
)
SMALL_8B = replace(
    LLAMA_70B,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=8,
    num_attention_heads=32,
)


def machine(**options):
    given = {"platform": "gpu", "device_budget": 4 << 30, "host_budget": 16 << 30}
    return Machine(**{**given, "context_bytes": 640 << 20, **options})


def forms(stored):
    """What each tensor is stored in: a quantised model's vectors are bfloat16."""
    return lambda name: (
        "bfloat16" if stored in SCHEMES and name.endswith(("norm.weight", ".bias")) else stored
    )


def plan_of(cfg, *, dtype="bfloat16", stored="bfloat16", on=None, **options):
    shape = {"longest": 20, "context": 100, **options}
    return make_plan(cfg, on or machine(), dtype_of=forms(stored), dtype=dtype, **shape)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 65, 150, 255, 256, 257, 511, 512, 513, 700, 4096])
@pytest.mark.parametrize("most", CHUNK_TOKENS)
def test_chunks_hold_all_tokens_with_little_padding(n, most):
    sizes = chunks(n, most)
    assert set(sizes) <= {size for size in CHUNK_TOKENS if size <= most}
    assert n <= sum(sizes) < n + 256
    assert list(sizes) == sorted(sizes, reverse=True)


def test_capacity_doubles_then_goes_in_steps():
    found = [capacity_for(n) for n in (1, 64, 65, 128, 129, 1000, 1025, 4160, 5121)]
    assert found == [64, 64, 128, 128, 256, 1024, 2048, 5120, 6144]


def test_known_sizes_of_llama_3_70b():
    plan = plan_of(LLAMA_70B)
    assert plan.model_bytes == 141_107_412_992
    assert plan.as_dict()["sweep"]["bytes"] == 80 * (1_711_308_800 - 2 * 16384) + 128256 * 16384


def test_70b_runs_in_1536_mib_and_405b_in_2048():
    tight = plan_of(LLAMA_70B, on=machine(device_budget=1536 << 20), longest=64, context=64)
    assert tight.fits
    assert 32 << 20 <= tight.tile_bytes <= 64 << 20
    assert plan_of(LLAMA_405B, on=machine(device_budget=2 << 30), longest=64, context=64).fits
    assert plan_of(LLAMA_70B, longest=4096, context=4160).fits


def test_what_is_left_over_keeps_tiles_evenly_spread():
    plan = plan_of(LLAMA_70B, on=machine(device_budget=8 << 30, host_budget=64 << 30))
    counts = Counter(plan.tiers)
    assert min(counts.values()) > 50
    assert plan.layers(Tier.DEVICE) + plan.layers(Tier.HOST) + plan.layers(Tier.DISK) == 80
    for tier, count in counts.items():  # any window holds its share, give or take two
        for start in range(0, len(plan.tiers) - 200, 50):
            found = plan.tiers[start : start + 200].count(tier)
            assert abs(found - 200 * count / len(plan.tiers)) <= 4


class Copied:
    """An output of the head whose copy on the host begins when it is asked for, as on a GPU."""

    n_alive = most = 0

    def __init__(self, logits):
        self._logits, self.nbytes = logits, logits.nbytes

    def copy_to_host_async(self):
        Copied.n_alive += 1
        Copied.most = max(Copied.most, Copied.n_alive)

    def __array__(self, dtype=None, copy=None):
        return self._logits

    def __del__(self):
        Copied.n_alive -= 1


def test_the_host_has_room_for_every_copy_of_logits_on_its_way():
    outgoing = _Outgoing(lambda output, column, row: None)
    for column in range(8):
        outgoing.add(Copied(np.zeros((1, 2, 3), np.float32)), column, 0)
    outgoing.finish()
    assert Copied.n_alive == 0
    shape = {"batch": 4, "longest": 512, "context": 512}
    spacious = machine(device_budget=24 << 30)
    plan = plan_of(LLAMA_70B, on=spacious, every=True, **shape)
    shapes = shapes_of_run(**shape, every=True, most=plan.chunk)
    without = plan_of(LLAMA_70B, on=spacious, **shape).host.embedding_bytes
    logits = logits_bytes(LLAMA_70B, shapes, plan.tiles)
    assert plan.host.embedding_bytes >= without + Copied.most * logits


@pytest.mark.parametrize("stored", ["bfloat16", *SCHEMES])
def test_tiles_that_stay_are_counted_as_they_lie_on_the_device(stored):
    """What came as one array has room between its parts: 30 MiB of it in 140 GiB."""
    spacious = machine(device_budget=140 << 30)
    plan = plan_of(LLAMA_405B, stored=stored, on=spacious)
    bare = plan_of(LLAMA_405B, stored=stored, on=spacious, keeps_layers=False)
    kept = [tile for tile, tier in zip(plan.tiles, plan.tiers, strict=True) if tier is Tier.DEVICE]
    assert len(kept) > 100
    held = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for tile in kept
        for leaf in jax.tree.leaves(struct_of(tile, "gpu"))
    )
    assert plan.device.resident_bytes - bare.device.resident_bytes == held
    assert plan.fits


def test_quantised_70b_is_a_fraction_of_the_bytes_and_on_a_cpu_as_much_arithmetic():
    plans = {stored: plan_of(LLAMA_70B, stored=stored) for stored in ("bfloat16", "int8", "int4")}
    layers = {kind: sum(t.n_bytes for t in p.tiles if t.layer == 0) for kind, p in plans.items()}
    assert layers["int8"] * 16 == layers["bfloat16"] * 8.125
    assert layers["int4"] * 16 == layers["bfloat16"] * 4.25
    assert plans["int4"].published_bytes == plans["bfloat16"].model_bytes
    on = machine(platform="cpu", disk_speed=1e12, host_budget=400 << 30)
    seconds = {kind: plan_of(LLAMA_70B, stored=kind, on=on).sweep_seconds for kind in plans}
    assert seconds["int8"] == pytest.approx(seconds["int4"], rel=0.05)
    assert seconds["bfloat16"] < seconds["int4"]


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_many_arrays_and_written_out_weights_are_part_of_the_choice(stored):
    """Measured on an H200: tiles of 32 MiB with three arrays each are bound by their steps, and a
    prompt of 512 tokens in chunks of 64 writes every weight out eight times."""
    cfg = replace(LLAMA_70B, num_hidden_layers=8)
    on = machine(device_budget=1536 << 20, host_budget=100 << 30, link_speed=55.4e9)
    for tokens in (1, 64, 512):
        plan = plan_of(cfg, stored=stored, on=on, longest=tokens, context=max(64, tokens))
        assert plan.fits
        assert plan.tile_bytes > 40 << 20 or plan.chunk == 512
        assert plan.sweep_seconds < 1.05 * plan.put_bytes / 55.4e9 + 0.005


def test_more_memory_never_makes_a_sweep_slower():
    sizes = [2, 3, 4, 6, 8, 12, 24, 48, 96, 200]
    device = [plan_of(LLAMA_70B, on=machine(device_budget=n << 30)).sweep_seconds for n in sizes]
    host = [plan_of(LLAMA_70B, on=machine(host_budget=n << 30)).sweep_seconds for n in sizes]
    for found in (device, host):
        assert all(b <= a * 1.001 for a, b in pairwise(found))


@settings(deadline=None, max_examples=40)
@given(
    device=st.integers(900 << 20, 12 << 30),
    host=st.integers(1 << 30, 40 << 30),
    tokens=st.sampled_from([1, 20, 64, 300, 2000]),
    platform=st.sampled_from(["gpu", "cpu"]),
)
def test_an_accepted_plan_keeps_both_promises_and_a_refused_one_says_what_would_do(
    device, host, tokens, platform
):
    on = machine(device_budget=device, host_budget=host, platform=platform)
    plan = plan_of(SMALL_8B, on=on, longest=tokens, context=tokens + 20)
    if plan.fits:
        assert plan.device_peak_bytes <= device
        assert plan.host_peak_bytes <= host
        plan.check()
        return
    with pytest.raises(DoesNotFitError, match="give at least") as refusal:
        plan.check()
    found = refusal.value.report["plan"]
    assert found["fits"] is False
    enough = machine(
        device_budget=max(device, found["smallest_device_memory_bytes"]),
        host_budget=max(host, found["host"]["peak_bytes"]),
        platform=platform,
    )
    assert plan_of(SMALL_8B, on=enough, longest=tokens, context=tokens + 20).fits


def test_the_peak_is_the_sum_of_its_terms():
    plan = plan_of(LLAMA_70B).as_dict()
    for memory in (plan["device"], plan["host"]):
        known = ("budget_bytes", "peak_bytes")
        assert memory["peak_bytes"] == sum(n for name, n in memory.items() if name not in known)


@pytest.fixture
def without_machine_code_optimised():
    """Buffers are assigned before machine code is made: its optimisation takes half of the time of
    a compilation and moves no byte of the temporaries. Such programs are not run."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PLAIN = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
QUANTISED = [("int8", "bfloat16"), ("int4", "bfloat16"), ("int4", "float32")]


@pytest.mark.parametrize(
    ("tokens", "capacity", "stored", "dtype"),
    [
        *((tokens, capacity, *kind) for tokens in CHUNK_TOKENS for capacity in (64, 1024)
          for kind in PLAIN),
        *((tokens, 64, *kind) for tokens in (2, 512) for kind in QUANTISED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tile_bytes", [None, 100_000])
def test_temporaries_of_compiled_programs_stay_within_the_formula(
    tokens, capacity, stored, dtype, tile_bytes, monkeypatch, without_machine_code_optimised
):
    import jax

    from jlayer.engine.forward import _stage_widths
    from jlayer.engine.programs import Programs

    monkeypatch.setitem(BLOCK_BYTES, "cpu", 60_000)  # so that matrices go in several blocks
    shapes = Shapes(1, capacity, tokens, tokens)
    tiles = cut(SMALL, forms(stored), tile_bytes)
    programs = Programs(SMALL, dtype=dtype, device=jax.devices("cpu")[0])
    widths = _stage_widths(tiles)
    shape = {"batch": 1, "tokens": tokens}
    for tile in tiles:
        if tile.stage == "block":
            programs.block(tile, capacity=capacity, **shape)
        elif tile.stage == "head":
            if stored in SCHEMES:
                programs.head(tile, last=tokens, **shape)
        else:
            programs.rows(tile, **shape)
            if tile.stage == "qkv" and tile.ends_stage:
                programs.attend(widths[tile.layer, "qkv"], capacity=capacity, **shape)
    bound = temporary_bytes(SMALL, shapes, tiles, dtype=dtype, platform="cpu")
    assert programs.temporary_bytes <= bound
    # A bound that is far off refuses what would fit.
    assert bound <= 4 * programs.temporary_bytes + (1 << 20)
