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


@given(st.integers(1, 400), st.sampled_from([1, 2, 16, 128]), st.integers(1, 7))
def test_hosts_have_the_ranges_that_devices_would_have(n_rows, unit, hosts):
    deal = dealt(n_rows, row_unit=unit, n=hosts)
    for host in range(hosts):
        rows = host_rows(n_rows, row_unit=unit, host=host, hosts=hosts)
        if deal is None:
            assert rows is None
        else:
            assert (rows.start, rows.stop) == (deal.first(host), deal.first(host) + deal.height)


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
