"""Plans: what is kept where, held against refusals and against known sizes of known models."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import jax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlayer.encodings.registry import SCHEMES
from jlayer.errors import DoesNotFitError
from jlayer.plan.lanes import MOST_LANES, most_lanes
from jlayer.plan.making import make_plan, refit
from jlayer.plan.memory import GUESSING_BYTES, fixed_needs, kept_needs, run_needs
from jlayer.plan.need import Need
from jlayer.plan.shapes import PoolSizes, RunShape, pool_rows, rows_for
from jlayer.plan.tiles import Tier
from jlayer.streaming.devices import Devices
from tests.plan.models import LLAMA_70B, LLAMA_405B, SMALL_8B, machine, plan_of, weights_of


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
        for leaf in jax.tree.leaves(Devices(jax.devices("cpu")[:1]).struct_of(tile))
    )
    assert plan.device.resident_bytes - bare.device.resident_bytes == held
    assert plan.fits


def test_quantized_70b_is_a_fraction_of_the_bytes_and_on_a_cpu_as_much_arithmetic():
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


def sums_of(plan, weights):
    """What the things of a plan need, summed by term: (on the device, in the host)."""
    needs = [
        *fixed_needs(weights, plan.machine, plan.tiling, ring=plan.ring, ahead=plan.ahead),
        *run_needs(weights, plan.machine, plan.tiling, plan.load, cache=plan.cache),
    ]
    device, host = Counter(), Counter()
    if plan.machine.platform == "gpu":
        least = sum(need.host for need in needs if need.term == "cache") // 11
        needs.append(Need("cache", device=max(0, least - sum(need.device for need in needs))))
    for need in needs:
        device[need.term] += need.device
        host[need.term] += need.host
    if plan.machine.platform == "cpu":  # the device's memory is the host's; slots count once
        host["resident"] += device.total() - device["slots"]
    moves = any(
        size and tier is not Tier.DEVICE
        for size, tier in zip(plan.tiling.sizes, plan.tiers, strict=True)
    )
    if plan.machine.platform == "gpu" and not moves:
        device["slots"] = 0
    for need in kept_needs(plan.tiling, plan.tiers):
        device[need.term] += need.device
        host[need.term] += need.host
    return device, host


held_runs = st.lists(
    st.builds(
        lambda batch, longest, more: RunShape(batch, longest, longest + more),
        st.integers(1, 4),
        st.integers(1, 600),
        st.integers(0, 3000),
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=40)
@given(
    stored=st.sampled_from(["bfloat16", *SCHEMES]),
    platform=st.sampled_from(["gpu", "cpu"]),
    host=st.integers(1 << 30, 40 << 30),
    held=held_runs,
    shape=st.fixed_dictionaries(
        {"batch": st.integers(1, 5), "longest": st.integers(1, 700), "all_logits": st.booleans()}
    ),
)
def test_each_term_of_a_plan_is_the_sum_of_the_needs_under_it(stored, platform, host, held, shape):
    on = machine(platform=platform, host_budget=host, device_budget=6 << 30)
    context = shape["longest"] + 30
    plan = plan_of(SMALL_8B, on=on, stored=stored, held=held, context=context, **shape)
    printed = plan.as_dict()
    expected = sums_of(plan, weights_of(SMALL_8B, stored=stored))
    for side, sums in zip(("device", "host"), expected, strict=True):
        known = ("budget_bytes", "peak_bytes")
        terms = {name: n for name, n in printed[side].items() if name not in known}
        assert {f"{term}_bytes": n for term, n in sums.items() if n} == {
            term: n for term, n in terms.items() if n
        }
        assert printed[side]["peak_bytes"] == sum(terms.values()) == sums.total()
    assert printed["device"]["peak_bytes"] == plan.device_peak_bytes
    assert printed["host"]["peak_bytes"] == plan.host_peak_bytes


@pytest.mark.slow
@settings(deadline=None)
@given(held=held_runs.filter(bool))
def test_runs_that_are_alive_add_their_entries_and_share_the_rest(held):
    """A forward pass is for all of them: its rows are those of the longest prompt, or of a token
    for each lane."""
    spacious = machine(device_budget=60 << 30, host_budget=100 << 30)
    alone = plan_of(SMALL_8B, on=spacious, keeps_layers=False)
    beside = plan_of(SMALL_8B, on=spacious, keeps_layers=False, held=held)
    how = SMALL_8B.attention
    numbers = 2 * how.n_kv_heads * how.head_dim * SMALL_8B.num_hidden_layers
    entries = 100 + sum(run.batch * run.context for run in held)
    assert beside.device.cache_bytes == 2 * numbers * pool_rows(entries)
    assert beside.device.slots_bytes == alone.device.slots_bytes
    one_by_one = [plan_of(SMALL_8B, on=spacious, keeps_layers=False, held=[run]) for run in held]
    lanes = 1 + sum(run.batch for run in held)
    assert beside.load.batch == lanes
    most = max(run.longest * run.batch for run in held)
    assert rows_for(lanes) + max(20, most) <= beside.load.n_rows
    assert beside.device.activation_bytes >= max(p.device.activation_bytes for p in one_by_one)
    assert beside.device.temporary_bytes >= max(p.device.temporary_bytes for p in one_by_one)


def test_guessed_tokens_take_entries_rows_and_logits():
    spacious = machine(device_budget=60 << 30, host_budget=100 << 30)
    options = {"on": spacious, "keeps_layers": False, "longest": 64, "context": 100}
    alone, both = (plan_of(SMALL_8B, nodes=nodes, **options) for nodes in (0, 63))
    how = SMALL_8B.attention
    numbers = 2 * how.n_kv_heads * how.head_dim * SMALL_8B.num_hidden_layers
    assert both.device.cache_bytes == 2 * numbers * pool_rows(163)
    assert both.load.n_rows == alone.load.n_rows  # the prompt's are as many
    more = both.host.embedding_bytes - alone.host.embedding_bytes
    assert more == 63 * 4 * SMALL_8B.vocab_size + GUESSING_BYTES
    ways = 3 * 4 * both.tiling.head_rows  # outputs of the head on their way
    more = both.device.activation_bytes - alone.device.activation_bytes
    assert more == ways * (rows_for(64) - rows_for(1))
    short = plan_of(SMALL_8B, **options | {"longest": 1, "nodes": 63})
    assert short.load.n_rows == 64
    assert short.chunk == 64


def test_a_tree_is_in_one_chunk_also_where_that_does_not_fit():
    on = machine(device_budget=1 << 30)
    options = {"on": on, "longest": 1, "context": 8000, "keeps_layers": False}
    assert plan_of(SMALL_8B, batch=64, **options).chunk < 512
    many = plan_of(SMALL_8B, batch=64, nodes=64 * 511, **options)
    assert (many.fits, many.chunk) == (False, 512)
    held = plan_of(SMALL_8B, held=[RunShape(1, 1, 64, nodes=100)], **options)
    assert held.chunk >= 128
    again = refit(held, weights_of(SMALL_8B), RunShape(context=64, nodes=300))
    assert again.chunk == 512


def test_a_pool_that_is_there_is_counted_even_where_less_would_do():
    some = machine(device_budget=60 << 30)
    weights, run = weights_of(SMALL_8B), RunShape(context=100)
    found = make_plan(weights, some, run, least_pool=PoolSizes(4096), keeps_layers=False)
    how = SMALL_8B.attention
    numbers = 2 * how.n_kv_heads * how.head_dim * SMALL_8B.num_hidden_layers
    assert found.device.cache_bytes == 2 * numbers * 4096
    assert refit(found, weights, run, least_pool=PoolSizes(4096)) == found


def test_pools_in_host_memory_are_limited_by_their_page_tables_on_the_device():
    """8 bytes for each page of 4 KiB that is pinned: room for them is kept when JAX is started."""

    def with_lanes(n, device=4 << 30):
        some = machine(device_budget=device, host_budget=400 << 30)
        return plan_of(LLAMA_70B, on=some, batch=n, longest=1, context=512)

    some, many = with_lanes(256), with_lanes(300)
    assert some.cache is many.cache is Tier.HOST
    assert some.fits
    assert some.host.cache_bytes < 11 * (4 << 30) < many.host.cache_bytes
    assert not many.fits
    found = many.as_dict()["smallest_device_memory_bytes"]
    assert with_lanes(300, found).fits


def test_a_prompt_that_does_not_fit_in_one_pass_is_split():
    """100,000 tokens of an 8B model: the activations of one pass would take gigabytes."""
    some = machine(device_budget=5 << 30, host_budget=64 << 30)
    plan = plan_of(SMALL_8B, on=some, longest=100_000, context=100_020)
    assert plan.fits
    assert plan.shapes.prefills > 1
    assert plan.load.n_rows >= 512
    # Nor is there room for its cache, which comes along with the layers.
    assert plan.cache is Tier.HOST
    assert plan.host.cache_bytes > 100_000 * 2 * 2 * 1024 * SMALL_8B.num_hidden_layers
    assert plan.moved_cache_bytes == plan.host.cache_bytes
    assert plan.as_dict()["sweep"]["cache_bytes"] == plan.host.cache_bytes
    bytes_s = (plan.put_bytes + plan.host.cache_bytes) / some.bytes_per_s
    assert plan.sweep_seconds >= bytes_s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "on", "context"),
    [
        (LLAMA_70B, machine(), 512),
        (LLAMA_70B, machine(device_budget=16 << 30, host_budget=64 << 30), 2048),
        (LLAMA_405B, machine(), 512),
        (LLAMA_405B, machine(), 131072),
        (SMALL_8B, machine(platform="cpu"), 512),
        (SMALL_8B, machine(device_budget=2 << 30), 64),
    ],
)
def test_as_many_lanes_fit_as_a_plan_can_be_made_for(cfg, on, context):
    weights, one = weights_of(cfg), RunShape(1, context, context)
    most = most_lanes(weights, on, one)
    assert most == most_lanes(weights, on, replace(one, batch=77))
    assert most < MOST_LANES
    assert most == 0 or make_plan(weights, on, replace(one, batch=most)).fits
    assert not make_plan(weights, on, replace(one, batch=most + 1)).fits


def test_no_more_lanes_are_looked_for_than_the_bound():
    on = machine(device_budget=512 << 30, host_budget=512 << 30)
    assert most_lanes(weights_of(SMALL_8B), on, RunShape(1, 64, 64)) == MOST_LANES


def test_a_token_of_every_lane_takes_little_longer_than_one():
    """The chunks of a prompt do not count in it."""
    on = machine(device_budget=16 << 30)
    one, many = (plan_of(LLAMA_70B, on=on, batch=n, longest=512, context=512) for n in (1, 64))
    assert many.n_chunks >= 64
    assert one.decode_seconds == one.sweep_seconds
    assert one.decode_seconds <= many.decode_seconds < 1.2 * one.decode_seconds


def test_a_plan_is_refitted_without_another_tile_or_place():
    on = machine(host_budget=12 << 30)
    plan = plan_of(SMALL_8B, on=on)
    weights = weights_of(SMALL_8B)
    assert refit(plan, weights, RunShape(longest=20, context=100)) == plan
    longer = refit(plan, weights, RunShape(longest=300, context=4000))
    assert (longer.tiling, longer.tiers, longer.ring) == (plan.tiling, plan.tiers, plan.ring)
    assert longer.device.cache_bytes > plan.device.cache_bytes
    device, host = sums_of(longer, weights)
    assert (device.total(), host.total()) == (longer.device_peak_bytes, longer.host_peak_bytes)
    assert not refit(plan, weights, RunShape(batch=64, longest=4000, context=100_000)).fits


@settings(deadline=None, max_examples=40)
@given(
    device=st.integers(900 << 20, 12 << 30),
    host=st.integers(1 << 30, 40 << 30),
    tokens=st.sampled_from([1, 20, 64, 300, 2000]),
    platform=st.sampled_from(["gpu", "cpu"]),
)
@example(device=4 << 30, host=16 << 30, tokens=64, platform="gpu")
@example(device=4 << 30, host=16 << 30, tokens=64, platform="cpu")
@example(device=900 << 20, host=16 << 30, tokens=2000, platform="gpu")
@example(device=4 << 30, host=200 << 20, tokens=64, platform="gpu")
@example(device=20 << 20, host=16 << 30, tokens=64, platform="cpu")
@example(device=4 << 30, host=200 << 20, tokens=64, platform="cpu")
def test_an_accepted_plan_keeps_both_promises_and_a_refused_one_says_what_would_do(
    device, host, tokens, platform
):
    def with_budgets(device, host):
        on = machine(device_budget=device, host_budget=host, platform=platform)
        return plan_of(SMALL_8B, on=on, longest=tokens, context=tokens + 20)

    plan = with_budgets(device, host)
    on_device, in_host = sums_of(plan, weights_of(SMALL_8B))
    assert plan.fits == (on_device.total() <= device and in_host.total() <= host)
    if plan.fits:
        plan.check()
        return
    with pytest.raises(DoesNotFitError, match="give at least") as refusal:
        plan.check()
    found = refusal.value.report["plan"]
    assert found["fits"] is False
    smallest = found["smallest_device_memory_bytes"]
    assert with_budgets(max(device, smallest), max(host, found["host"]["peak_bytes"])).fits
    assert not with_budgets(smallest - 1, 1 << 50).fits


@pytest.mark.parametrize(("context", "is_said"), [(1 << 30, False), (3 << 30, True)])
def test_a_refusal_says_where_another_program_took_memory_meanwhile(context, is_said):
    """Two runs that were begun together had each other's memory for the driver's."""
    on = machine(device_budget=context + (100 << 20), context_bytes=context)
    with pytest.raises(DoesNotFitError, match="give at least") as refused:
        plan_of(SMALL_8B, on=on).check()
    words = "run it again: another program took memory of the GPU as this one began"
    assert (words in str(refused.value)) == is_said


def test_a_refusal_names_both_budgets_and_advises_fewer_tokens_only_where_they_help():
    """One budget was named at a time, and fewer tokens were advised where one was asked for."""
    tiny = plan_of(SMALL_8B, on=machine(platform="cpu", device_budget=1, host_budget=1))
    with pytest.raises(DoesNotFitError) as refused:
        tiny.check()
    words = str(refused.value)
    assert re.findall(r"(\w+_memory): 1 B given", words) == ["device_memory", "host_memory"]
    assert "fewer tokens" not in words
    plan = plan_of(SMALL_8B, on=machine(), batch=4, longest=500, context=500)
    enough = plan.device_peak_bytes - plan.device.cache_bytes
    tight = replace(plan, device=replace(plan.device, budget_bytes=enough))
    with pytest.raises(DoesNotFitError, match="or ask for fewer tokens"):
        tight.check()
