"""Plans of tuning a 70B model on a GPU, from its sizes alone."""

import math
from collections import Counter

import pytest

from jlayer.additions import Additions
from jlayer.plan.machine import PLATFORMS, Machine
from jlayer.plan.need import total
from jlayer.plan.tiles import Tier, unseen_weights
from jlayer.tuning import planning
from jlayer.tuning.adapter import AdapterConfig, targets_of
from jlayer.tuning.planning import MOST_AHEAD, SPARE, make_plan
from jlayer.tuning.settings import Settings
from jlayer.tuning.visits import Way
from tests.plan.models import llama

AT_ONCE = PLATFORMS["gpu"].ahead


def plan_of(device_budget, host_budget=60 << 30):
    cfg = llama(num_hidden_layers=8)
    how = AdapterConfig(rank=16)
    rows = ((name, how.rank, how.scale) for name in targets_of(cfg, how))
    machine = Machine("gpu", device_budget, host_budget, context_bytes=640 << 20)
    weights = unseen_weights(cfg, None, stored="bfloat16", dtype="bfloat16")
    settings = Settings(tokens_per_step=4096, length=512)
    return make_plan(weights, machine, settings, Additions.of_one(rows))


@pytest.fixture
def one_chunk(monkeypatch):
    monkeypatch.setattr(planning, "CHUNK_ROWS", (1024,))


def test_more_tiles_are_ahead_where_memory_is_free():
    plan = plan_of(4096 << 20)
    assert AT_ONCE < plan.ahead <= MOST_AHEAD
    assert total(plan.device) + SPARE * plan.device.temporary_bytes <= plan.device.budget_bytes


@pytest.mark.parametrize(("spare", "ahead"), [(0, AT_ONCE), (SPARE, MOST_AHEAD)])
def test_none_takes_the_last_of_it(one_chunk, spare, ahead):
    roomy = plan_of(64 << 30)
    assert roomy.ahead == MOST_AHEAD
    bare = total(roomy.device) + spare * roomy.device.temporary_bytes
    plan = plan_of(math.ceil(bare))
    assert (plan.ahead, plan.tiling.tile_bytes) == (ahead, roomy.tiling.tile_bytes)


def test_no_tile_leaves_host_memory_for_it(one_chunk):
    roomy = plan_of(64 << 30)
    tight = plan_of(64 << 30, total(roomy.host) - 1)
    assert AT_ONCE <= tight.ahead < MOST_AHEAD
    assert tight.disk_bytes == 0


def test_slots_are_kept_for_the_way_back_where_that_saves_reads(monkeypatch):
    """Of weights of 16 GiB: in place of a few tiles that would be there always."""
    host_budget = 9 << 30
    plan = plan_of(4096 << 20, host_budget)
    assert plan.again
    assert plan.fits
    by_layer = Counter(plan.visits[number].tile.layer for number in plan.again)
    assert plan.ring == plan.ahead + planning.READING + max(by_layer.values())
    for later, first in plan.again.items():
        assert plan.tiles[later].name == plan.tiles[first].name
        assert (plan.visits[first].way, plan.visits[later].way) == (Way.AGAIN, Way.BACK)
        assert plan.tiers[first] is Tier.DISK
    monkeypatch.setattr(planning, "kept_again", lambda *_: {})
    without = plan_of(4096 << 20, host_budget)
    assert (without.ring, without.again) == (without.ahead + planning.READING, {})
    assert plan.disk_bytes < 0.9 * without.disk_bytes
    assert plan.seconds <= without.seconds
