"""Which rows the host multiplies: every row once, as many as pay."""

from dataclasses import replace

import pytest

from jlayer.plan.cutting import cut, host_rows
from jlayer.plan.hosting import EXCHANGE_S, STEP, auto_shares, hosted_tiles
from jlayer.plan.machine import HostSpeeds, expected_speeds
from jlayer.plan.making import make_plan, matrix_forms, with_host
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.plan.time import count_programs, steps_seconds
from tests.plan.models import LLAMA_70B, SMALL, weights_of
from tests.plan.models import machine as machine_of

MIB = 1 << 20


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_every_row_of_every_matrix_is_in_one_tile(share, form):
    weights = weights_of(LLAMA_70B, stored=form)
    forms = matrix_forms(weights)
    tiling = cut(weights, 64 * MIB, platform="gpu", shares=tuple((f, share) for f in forms))
    whole = cut(weights, 64 * MIB, platform="gpu")
    assert tiling.n_bytes == whole.n_bytes
    rows = {}
    for tile in tiling.tiles:
        for part in tile.parts:
            rows.setdefault(part.tensor, []).append((part.first_row, part.shape[0], tile.for_host))
    for ranges in rows.values():
        at, sides = 0, [for_host for *_, for_host in ranges]
        for first, count, _ in ranges:
            assert first == at
            at += count
        assert sides == sorted(sides, reverse=True)  # the host's rows come first
    of_host = sum(t.n_bytes for t in tiling.tiles if t.for_host)
    assert of_host == pytest.approx(share * tiling.n_bytes, rel=0.05)


def test_a_stage_begins_and_ends_once_wherever_its_rows_are():
    weights = weights_of(SMALL)
    for share in (0.5, 1.0):
        tiling = cut(weights, MIB // 8, platform="gpu", shares=(("bfloat16", share),))
        stages = [(tile.layer, tile.stage.name) for tile in tiling.tiles]
        for key in set(stages):
            own = [tile for tile, stage in zip(tiling.tiles, stages, strict=True) if stage == key]
            assert [t.begins_stage for t in own] == [True] + [False] * (len(own) - 1)
            assert [t.ends_stage for t in own] == [False] * (len(own) - 1) + [True]


def test_the_hosts_rows_are_whole_disk_blocks_where_there_are_enough():
    assert host_rows(8192, [16384], 0.7) == round(8192 * 0.7)
    assert host_rows(8192, [100], 0.5) % 1024 == 0
    assert host_rows(1000, [100], 1.0) == 1000
    assert host_rows(1000, [100], 0.0) == 0


@pytest.mark.parametrize("n_rows", [100, 1000, 8192])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.71, 1.0])
def test_the_hosts_rows_end_where_the_devices_may_begin(n_rows, share):
    count = host_rows(n_rows, [100], share, row_unit=128)
    assert count in (0, n_rows) or count % 128 == 0
    assert 0 <= count <= n_rows


def speeds(host, link=50e9, forms=("bfloat16",)):
    return HostSpeeds(tuple((f, ((1, host), (16, host / 2), (64, host / 8))) for f in forms), link)


def test_speeds_between_measured_columns_and_beyond_them():
    found = speeds(100e9)
    assert found.seconds_a_byte("bfloat16", 1) == pytest.approx(1 / 100e9)
    assert 1 / 100e9 < found.seconds_a_byte("bfloat16", 8) < 1 / 50e9
    assert found.seconds_a_byte("bfloat16", 128) == pytest.approx(2 * 8 / 100e9)


def planned(host, *, tokens=1, share=None, budget=1536 * MIB):
    weights = weights_of(LLAMA_70B)
    machine = replace(
        machine_of(device_budget=budget, host_budget=200 << 30), link_speed=55e9, host=speeds(host)
    )

    def plan_of(shares):
        return make_plan(weights, machine, RunShape(1, tokens, 64), shares=shares)

    return with_host(plan_of, matrix_forms(weights), share, machine.host)


def test_host_and_link_take_equally_long():
    found = auto_shares(speeds(100e9), ["bfloat16"], passing=10**9, resident=0, rows=1, n_stages=10)
    # The host has the rest of the link's time when it has its input.
    share = (1e9 / 50e9 - 10 * EXCHANGE_S) / (1e9 / 50e9 + 1e9 / 100e9)
    assert found == (("bfloat16", pytest.approx(share, abs=STEP / 2)),)
    assert 0.4 < share < 2 / 3
    assert found[0][1] % STEP == 0
    plan = planned(100e9)
    assert plan.fits
    assert plan.host_share == pytest.approx(2 / 3, abs=0.05)
    assert plan.decode_seconds < 0.45 * planned(1e9).decode_seconds
    assert plan.as_dict()["sweep"]["host_product_bytes"] == plan.host_product_bytes


def test_wide_passes_leave_more_to_the_device_and_the_widest_all():
    plan = planned(100e9)
    hosted = [len(plan.hosted(rows)) for rows in (1, 16, 64, 512)]
    assert hosted == sorted(hosted, reverse=True)
    assert hosted[0] > hosted[1] > hosted[2]
    assert hosted[3] == 0
    for rows in (1, 16, 64):
        assert plan.hosted(rows) <= plan.hosted(1)
        stages = [plan.tiling.shapes[i] for i in plan.hosted(rows)]
        assert all(tile.for_host for tile in stages)


def test_the_widest_passes_are_left_to_the_device_however_fast_the_cores_are():
    """Their inputs and products take the link's time too, which no plan counts."""
    plan = planned(100e12)
    assert plan.hosted(64)
    assert not plan.hosted(256)


def test_a_share_is_held_against_the_link_as_it_is_while_the_cores_rest():
    """It was held against the link beside the cores, which is slower; so cores were taken that cost
    more of the link than they gave."""
    weights = weights_of(LLAMA_70B)
    machine = machine_of(device_budget=1536 * MIB, host_budget=200 << 30)
    hosted = []
    for beside in (50e9, 20e9):
        found = replace(machine, link_speed=55e9, host=speeds(100e9, beside))
        shares = (("bfloat16", 0.5),)
        plan = make_plan(weights, found, RunShape(1, 1, 64), shares=shares)
        hosted.append([len(plan.hosted(rows)) for rows in (1, 64)])
    assert hosted[0][0] > hosted[0][1] > 0
    assert hosted[1] == [hosted[1][0], 0]


def test_slow_cores_and_what_fits_the_device_are_left_alone():
    assert planned(1e9).host_share == 0
    assert planned(100e9, budget=160 << 30).host_share == 0


def test_a_share_that_was_asked_for_holds_in_every_pass():
    plan = planned(100e9, share=0.4)
    assert plan.host_share == pytest.approx(0.4, abs=0.05)
    assert plan.hosted(1) == plan.hosted(512) != frozenset()
    assert planned(100e9, share=0.0).host_share == 0


def test_a_tile_that_stays_on_the_device_is_not_the_hosts():
    weights = weights_of(SMALL)
    tiling = cut(weights, MIB // 8, platform="gpu", shares=(("bfloat16", 1.0),))
    tiers = [Tier.DEVICE if i % 2 else Tier.HOST for i in range(len(tiling.shapes))]
    found = hosted_tiles(tiling, tiers, None, link=1e9, rows=1, always=True)
    assert found == {i for i in range(len(tiers)) if i % 2 == 0}


def test_on_a_cpu_quantized_weights_are_the_cores():
    weights = weights_of(LLAMA_70B, stored="int4")
    machine = machine_of(platform="cpu", device_budget=8 << 30, host_budget=100 << 30)
    machine = replace(machine, cores=16)
    machine = replace(machine, host=expected_speeds(machine))

    def plan_of(shares):
        return make_plan(weights, machine, RunShape(1, 1, 64), shares=shares)

    plan = with_host(plan_of, matrix_forms(weights), None, machine.host)
    assert plan.host_share == 1
    assert plan.decode_seconds < 0.1 * plan_of(()).decode_seconds
    assert not plan.notes
    assert "llvmlite" in plan_of(()).notes[0]


def test_what_the_host_multiplies_is_neither_put_nor_called_for():
    """Of each stage the host has the first tiles; a program ends it, once their products are
    there."""
    tiling = cut(weights_of(SMALL), MIB // 8, platform="gpu", shares=(("bfloat16", 0.5),))
    on, apart = machine_of(), [n for n, tile in enumerate(tiling.shapes) if tile.for_host]
    layers = frozenset(n for n in apart if tiling.shapes[n].kind is not None)
    kind, n_chunks = on.kind, 3
    alone = steps_seconds(on, tiling, n_chunks=n_chunks)
    beside = steps_seconds(on, tiling, n_chunks=n_chunks, hosted=layers)
    arrays = sum(tiling.shapes[n].n_arrays for n in layers)
    fewer = len(layers) - sum(tiling.shapes[n].begins_stage for n in layers)
    spared = arrays * kind.array_s + fewer * n_chunks * kind.program_s
    assert alone - beside == pytest.approx(spared)
    assert count_programs(tiling) == len(tiling.shapes) + 1
    n_stages = 8 + 1  # of two layers, and the head's
    assert (
        count_programs(tiling, frozenset(apart)) == len(tiling.shapes) - len(apart) + n_stages + 1
    )
