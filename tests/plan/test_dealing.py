"""Rows that are dealt out: each has one device to take its product from, and what a device has is
as much as the plan says."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.app.cli import main
from jlayer.encodings.registry import SCHEMES
from jlayer.parts import Attention, HeadNorms, Norm
from jlayer.plan.cutting import cut
from jlayer.plan.dealing import deals_heads, dealt, host_rows
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming.devices import ranges_of
from tests.plan.models import SMALL_8B, machine, weights_of


@given(st.integers(1, 400), st.sampled_from([1, 2, 16, 128]), st.integers(2, 7))
def test_every_row_is_taken_once_and_from_whole_units(n_rows, unit, n):
    deal = dealt(n_rows, row_unit=unit, n=n)
    if deal is None:
        assert n_rows % unit or n_rows == unit
        return
    taken = []
    for number in range(n):
        first = deal.first(number)
        assert first % unit == 0
        assert 0 <= first <= n_rows - deal.height
        taken += range(first + deal.repeated(number), first + deal.height)
    assert taken == list(range(n_rows))
    # No device has more than a unit beyond its share.
    assert deal.height - n_rows / n < unit


@given(st.integers(1, 400), st.sampled_from([1, 2, 16, 128]), st.integers(2, 7), st.data())
def test_hosts_have_the_same_rows_whatever_their_devices(n_rows, unit, n, data):
    own = [host_rows(n_rows, row_unit=unit, host=host, hosts=n) for host in range(n)]
    deal = dealt(n_rows, row_unit=unit, n=n)
    if deal is None:
        assert own == [None] * n
        return
    assert {rows.stop - rows.start for rows in own} == {deal.height}
    assert set().union(*(range(rows.start, rows.stop) for rows in own)) == set(range(n_rows))
    # Tile by tile, each some rows from the same place of every range on: each row is taken once.
    step, taken = data.draw(st.integers(1, deal.height)), []
    for at in range(0, deal.height, step):
        count = min(step, deal.height - at)
        joined = [rows.start + row for rows in own for row in range(at, at + count)]
        for columns, first in deal.of_all(at, count):
            assert joined[columns] == list(range(first, first + len(joined[columns])))
            taken += joined[columns]
    assert sorted(taken) == list(range(n_rows))


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
@pytest.mark.parametrize("n_devices", [1, 2])
def test_hosts_together_read_every_row(form, n_devices):
    weights, read = weights_of(SMALL_8B, stored=form), {}
    for host in range(3):
        on = {"platform": "cpu", "n_devices": n_devices, "host": host, "n_hosts": 3}
        for tile in cut(weights, 8 << 20, **on).tiles:
            for part in tile.parts:
                rows = read.setdefault(part.tensor, set())
                rows.add((host, range(part.first_row, part.first_row + part.shape[0])))
    for tensor, found in read.items():
        of_hosts = [
            {row for own_host, own in found if own_host == host for row in own} for host in range(3)
        ]
        n_rows = max(map(max, of_hosts)) + 1
        assert set().union(*of_hosts) == set(range(n_rows)), tensor
        assert {len(rows) for rows in of_hosts} == {-(-n_rows // 3)}, tensor


def test_two_hosts_need_half_the_host_memory_and_read_half():
    weights, run = weights_of(SMALL_8B), RunShape(1, 4, 64)
    on = {"platform": "gpu", "device_budget": 2 << 30, "host_budget": 64 << 30, "link_speed": 2e10}
    alone, both = (
        make_plan(weights, machine(**on, n_hosts=n, host_number=n - 1), run) for n in (1, 2)
    )
    assert both.tiling.n_bytes == alone.tiling.n_bytes // 2
    assert both.decode_seconds < alone.decode_seconds / 1.8
    assert both.device.cache_bytes == alone.device.cache_bytes // 2


def test_of_pools_in_host_memory_each_host_has_those_of_its_own_heads():
    weights, run = weights_of(SMALL_8B), RunShape(1, 4, 100_000)
    on = {"platform": "gpu", "device_budget": 1 << 30, "host_budget": 64 << 30, "link_speed": 2e10}
    alone, both, three = (
        make_plan(weights, machine(**on, n_hosts=n, host_number=n - 1), run) for n in (1, 2, 3)
    )
    assert alone.cache is both.cache is three.cache is Tier.HOST
    assert both.host.cache_bytes == pytest.approx(alone.host.cache_bytes / 2, rel=0.01)
    # Its 8 heads do not come out even.
    assert three.host.cache_bytes == pytest.approx(alone.host.cache_bytes, rel=0.01)


def test_one_device_has_everything():
    assert dealt(64, row_unit=1, n=1) is None


@pytest.mark.parametrize("form", ["bfloat16", *SCHEMES])
@pytest.mark.parametrize("n", [2, 3])
def test_the_ranges_of_a_tile_are_all_of_its_rows(form, n):
    tiling = cut(weights_of(SMALL_8B, stored=form), 8 << 20, platform="cpu", n_devices=n)
    for tile, _ in tiling.distinct:
        for part, share in zip(tile.parts, tile.share.parts, strict=True):
            ranges = ranges_of(tile, part)
            rows = np.zeros(part.shape[0], int)
            for own in ranges:
                rows[own] += 1
            assert rows.all()
            assert {own.stop - own.start for own in ranges} == {share.shape[0]}
        assert tile.n_bytes / n <= tile.share.n_bytes < tile.n_bytes


def test_two_devices_need_half_the_memory_for_weights_and_take_half_the_time():
    weights, run = weights_of(SMALL_8B), RunShape(1, 4, 64)
    on = {"platform": "gpu", "device_budget": 2 << 30, "host_budget": 64 << 30}
    alone = make_plan(weights, machine(**on, link_speed=20e9), run)
    both = make_plan(weights, machine(**on, link_speed=40e9, n_devices=2), run)
    assert both.put_bytes < alone.put_bytes
    kept = [plan.tier_bytes(Tier.DEVICE) for plan in (alone, both)]
    assert kept[1] > 1.7 * kept[0]
    assert both.decode_seconds < alone.decode_seconds / 1.8
    assert both.device.cache_bytes == alone.device.cache_bytes // 2


def attention(n_kv_heads, **options):
    return Attention(n_heads=12, n_kv_heads=n_kv_heads, head_dim=16, rope=None, **options)


def test_heads_are_dealt_out_where_they_divide_and_no_norm_is_taken_over_all_of_them():
    assert [n for n in range(1, 7) if deals_heads(attention(6), n)] == [2, 3, 6]
    assert not deals_heads(None, 2)
    norms = {over: HeadNorms(Norm(), over=over) for over in ("head", "each", "flat")}
    found = {over: deals_heads(attention(6, head_norms=one), 2) for over, one in norms.items()}
    assert found == {"head": True, "each": True, "flat": False}


def test_a_plan_for_several_says_what_each_holds(capsys):
    words = ["plan", "llama-3.2-1b-instruct", "--devices", "3"]
    assert main(words) == 0
    assert "each of 3 devices" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["devices"] == [plan["device"]] * 3


@pytest.mark.parametrize("words", ["0", "-1", "two", "1.5", ""])
def test_what_is_no_number_of_devices_is_refused(words, capsys):
    assert main(["plan", "llama-3.2-1b-instruct", "--devices", words]) == 2
    assert "expected a number from 1 up, or all" in capsys.readouterr().err


def test_a_plan_alone_does_not_know_how_many_all_are(capsys):
    assert main(["plan", "llama-3.2-1b-instruct", "--devices", "all"]) == 2
    assert "say how many" in capsys.readouterr().err
