"""Pools in host memory, from where they come along with their layers: the same tokens, within the
budget, whatever else happens."""

from dataclasses import replace

import numpy as np
import pytest

import jlayer
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming.steps import PutCache, Run, Take
from tests.campaigns import slow_but
from tests.engine.test_engine import IDS, opened
from tests.streaming.conftest import set_tile_bytes

pytestmark = pytest.mark.usefixtures("all_shapes")

LONG = {"max_new_tokens": 120, "temperature": 0}
SHAPE = RunShape(1, len(IDS), len(IDS) + 120, sweeps=120)


def tight(folder, shape=SHAPE, on=None, **options):
    """The smallest device budget that holds a run, with its pools in host memory. `on`: what
    differs of the machine."""
    with opened(folder, **options) as model:
        engine = model.engine
        machine = replace(engine.plan.machine, device_budget=1, **(on or {}))
        needed = make_plan(engine.weights, machine, shape)
    assert needed.cache is Tier.HOST
    return needed.device_peak_bytes


@pytest.fixture(scope="module")
def want(fable):
    with opened(fable) as model:
        found = jlayer.generate(model, IDS, **LONG)
        assert model.plan.cache is Tier.DEVICE
        return found.token_ids


@pytest.mark.parametrize("tile_bytes", slow_but([None, 100_000], (100_000,)))
def test_a_cache_on_the_host_gives_the_tokens_of_one_on_the_device(
    fable, want, monkeypatch, tile_bytes
):
    set_tile_bytes(monkeypatch, tile_bytes)
    budget = tight(fable)
    with opened(fable, device_memory=budget) as model:
        found = jlayer.generate(model, IDS, **LONG)
        plan, engine = model.plan, model.engine
        assert plan.cache is Tier.HOST
        assert engine.memory()["device_peak_bytes"] <= budget
        assert engine.caches.host_bytes == 0  # the run is over
    assert found.token_ids == want
    assert found.plan["host"]["cache_bytes"] > found.plan["device"]["cache_bytes"] > 0


def test_each_pool_comes_for_its_layer_and_goes(fable):
    budget = tight(fable)
    with opened(fable, device_memory=budget) as model:
        run = model.engine.start(SHAPE)
        run.sweep([IDS], [0])
        caches, most, order = model.engine.caches, [], []

        def watch(step, tile):
            most.append(sum(layer is not None for layer in caches.layers))
            if isinstance(step, (PutCache, Take)) or (isinstance(step, Run) and tile.uses_cache):
                order.append((type(step).__name__, tile.layer))

        model.engine.watch.on_step = watch
        run.sweep([[5]], [len(IDS)])
        n = model.config.num_hidden_layers
        assert max(most) == 1  # beside one whose last run is under way
        expected = [("PutCache", 0)]
        for layer in range(n):
            expected += [("Run", layer), ("Take", layer)]
            expected += [("PutCache", layer + 1)] if layer + 1 < n else []
        assert order == expected
        assert caches.host_bytes > 2 * caches.n_bytes
        run.close()
        assert caches.host_bytes == 0


def test_the_last_row_of_a_prompt_in_several_chunks_sees_all_of_it(fable):
    """What an earlier chunk wrote is in the pool on the device, not yet in host memory."""
    prompt = [3 + (7 * n) % 900 for n in range(700)]
    shape = RunShape(1, len(prompt), len(prompt), sweeps=1)
    with opened(fable) as model:
        run = model.engine.start(shape)
        want = run.sweep([prompt], [0])
    with opened(fable, device_memory=tight(fable, shape)) as model:
        run = model.engine.start(shape)
        assert model.plan.cache is Tier.HOST
        found = run.sweep([prompt[:650]], [0])
        found = run.sweep([prompt[650:]], [650])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_pools_move_to_the_host_as_a_run_joins(fable, want):
    """And the tokens of the first run are what they were. They stay there until the last run has
    left, since their size stays."""
    with opened(fable) as model:
        engine = model.engine
        alone = engine.plan_for(SHAPE)
        many = replace(SHAPE, batch=8, sweeps=1)
        machine = replace(engine.plan.machine, device_budget=1)
        both = make_plan(engine.weights, machine, many, held=(SHAPE,))
    budget = max(both.device_peak_bytes, alone.device_peak_bytes) + 4096
    with opened(fable, device_memory=budget) as model:
        tokens, tiers = [], []
        for number, step in enumerate(jlayer.stream(model, IDS, **LONG)):
            tokens += step.token_ids
            if number == 20:
                run = model.engine.start(many)
                assert model.plan.cache is Tier.HOST
            if number == 40:
                run.close()
                model.engine.start(RunShape()).close()
            tiers.append(model.plan.cache)
        assert jlayer.generate(model, IDS, **LONG).token_ids == want
        assert model.plan.cache is Tier.DEVICE
        assert model.engine.device_peak_bytes <= budget
    assert tokens == want
    assert tiers == [Tier.DEVICE] * 20 + [Tier.HOST] * 100


def test_a_pass_that_is_interrupted_leaves_the_entries_as_they_were(fable, want):
    with opened(fable, device_memory=tight(fable)) as model:
        decoding, _ = model.decoding(IDS, options=LONG)
        steps, tokens, stopped = iter(decoding), [], []

        def stop(step, tile):
            if isinstance(step, Take) and tile.layer == len(stopped) % 6 and len(tokens) % 25 == 9:
                stopped.append(tile.layer)
                raise KeyboardInterrupt

        for _ in range(3):
            tokens += next(steps)[0].token_ids
        assert tokens == want[:3]
        lane = decoding.lanes[0]
        before = len(lane.table)
        model.engine.watch.on_step = stop
        tokens += [0] * 6  # so that the next pass is interrupted
        with pytest.raises(KeyboardInterrupt):
            model.engine.scheduler.advance(decoding.lanes)
        assert stopped == [0]
        assert len(lane.table) == before
        model.engine.watch.on_step = None
        found = want[:3]
        while lane.is_alive:
            model.engine.scheduler.advance(decoding.lanes)
            found = found + list(lane.unread.popleft().token_ids)
        decoding.close()
    assert found == want
