"""Wherever the frozen weights lie, a step gives the same; they are checked, and read as often as
they have to be."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError, DoesNotFitError, UsageError
from jlayer.families.registry import layer_kinds
from jlayer.plan.machine import Machine
from jlayer.plan.need import total
from jlayer.plan.tiles import Tier, unseen_weights
from jlayer.run_config import RunConfig
from jlayer.tuning import planning
from jlayer.tuning.adapter import AdapterConfig, low_ranks, targets_of
from jlayer.tuning.base import Base
from jlayer.tuning.examples import Example
from jlayer.tuning.lanes import packed
from jlayer.tuning.planning import make_plan
from jlayer.tuning.rows import chunks_of
from jlayer.tuning.settings import Settings
from jlayer.tuning.visits import kept_again
from tests.tiny import tiny_llama
from tests.tuning.states import drawn

SETTINGS = Settings(tokens_per_step=32, length=16)
HOW = AdapterConfig(rank=2, alpha=4)
RUN = RunConfig(device="cpu", device_memory=1 << 30, host_memory=4 << 30)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    convert_checkpoint(tiny_llama(folder / "published"), folder / "model")
    return folder / "model"


@contextmanager
def opened(folder, tiers, monkeypatch, n_kept=0):
    """(a base, the chunks of a step, its adapters). `tiers`: (number of a visit, its tile) -> where
    it is kept; `n_kept`: in how many slots tiles are kept for the way back."""
    monkeypatch.setattr(planning, "TILE_BYTES", (1500,))

    def plan_of(*given):
        plan = make_plan(*given)
        chosen = []
        for number, tile in enumerate(plan.tiles):
            first = plan.repeats.get(number)
            chosen.append(tiers(number, tile) if first is None else chosen[first])
        again = kept_again(plan.visits, chosen, n_kept)
        return replace(plan, tiers=tuple(chosen), again=again, ring=plan.ring + n_kept)

    cfg = read_config(folder)
    state = drawn(cfg, HOW)
    base = Base(folder, RUN, SETTINGS, low_ranks(state, HOW), state, plan_of=plan_of)
    try:
        draw = np.random.default_rng(0)
        texts = [Example.of(draw.integers(3, 60, size), [0.0, *[1.0] * (size - 1)])
                 for size in (17, 9, 8)]  # fmt: skip
        chunks = list(chunks_of(base.cfg, packed(texts, 16), 1, share=1.0))
        yield base, chunks, base.stepper.layout.flat(state)
    finally:
        base.close()


def once(base):
    """The bytes of all weights."""
    tiles = enumerate(base.plan.tiles)
    return sum(tile.n_bytes for number, tile in tiles if number not in base.plan.repeats)


def steps_of(folder, tiers, monkeypatch, n=1, n_kept=0):
    """(the losses and gradients of some steps, the bytes read, those of all weights once)."""
    with opened(folder, tiers, monkeypatch, n_kept) as (base, chunks, flats):
        found = [base.stepper.run(base.executor, chunks, flats) for _ in range(n)]
        return found, base.totals.read_bytes, once(base)


TIERS = {
    "host": lambda number, tile: Tier.HOST,
    "disk": lambda number, tile: Tier.DISK,
    "both": lambda number, tile: (Tier.HOST, Tier.DISK)[number % 2],
}


def test_the_same_wherever_they_lie(folder, monkeypatch):
    found = {name: steps_of(folder, tiers, monkeypatch, STEPS) for name, tiers in TIERS.items()}
    (expected, *others), n_host, once = found["host"]
    for one in (*others, *found["disk"][0], *found["both"][0]):
        for own, there in zip(one.losses, expected.losses, strict=True):
            np.testing.assert_array_equal(own, there)
        for layer, gradient in expected.gradients.items():
            np.testing.assert_array_equal(one.gradients[layer], gradient)
    # What is kept is read once; else in every step, and again on the way back.
    assert n_host >= once
    assert 3 * STEPS * n_host > found["disk"][1] > 2 * STEPS * n_host
    assert n_host < found["both"][1] < found["disk"][1]


@pytest.mark.parametrize(("tiers", "n_kept"), [("disk", 1), ("disk", 3), ("disk", 99), ("both", 2)])
def test_what_waits_in_a_slot_for_the_way_back_is_read_once_less(
    folder, monkeypatch, tiers, n_kept
):
    """With some of a layer's tiles, or all; the numbers are the same."""
    (expected, *_), every, _ = steps_of(folder, TIERS[tiers], monkeypatch, STEPS)
    found, read, _ = steps_of(folder, TIERS[tiers], monkeypatch, STEPS, n_kept)
    for one in found:
        np.testing.assert_array_equal(one.losses, expected.losses)
        for layer, gradient in expected.gradients.items():
            np.testing.assert_array_equal(one.gradients[layer], gradient)
    assert read < every
    assert n_kept < 99 or read < 0.8 * every  # of three reads two, but of what is not again


@pytest.mark.parametrize("tiers", TIERS)
def test_held_out_text_goes_through_each_tile_once(folder, monkeypatch, tiers):
    """And the steps before and after it are as they would be without."""
    with opened(folder, TIERS[tiers], monkeypatch) as (base, chunks, flats):

        def run(**how):
            before = base.totals.put_bytes, base.totals.read_bytes
            found = base.stepper.run(base.executor, chunks, flats, **how)
            after = base.totals.put_bytes, base.totals.read_bytes
            return found, [a - b for a, b in zip(after, before, strict=True)]

        (first, of_step), *measured, (last, _) = (
            *(run(), run(trains=False), run(trains=False)),
            *(run(trains=False), run()),
        )
        for found, _ in measured:
            assert found.gradients == {}
            np.testing.assert_array_equal(found.losses, first.losses)
        put, read = measured[-1][1]  # what is ahead is of the next one then
        assert put == once(base) < of_step[0] / 2
        assert read == 0 if tiers == "host" else 0 < read < of_step[1] / 2
        np.testing.assert_array_equal(last.losses, first.losses)
        for layer, gradient in first.gradients.items():
            np.testing.assert_array_equal(last.gradients[layer], gradient)


@pytest.mark.parametrize("tiers", ["host", "disk"])
def test_a_flipped_bit_is_found(folder, tmp_path, monkeypatch, tiers):
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    file = sorted((tmp_path / "model").glob("layer-*.safetensors"))[1]
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        steps_of(tmp_path / "model", TIERS[tiers], monkeypatch)


def test_no_memory_is_refused_with_the_sum(folder):
    state = drawn(read_config(folder), HOW)
    run = replace(RUN, device_memory=10_000)
    with pytest.raises(DoesNotFitError, match=r"tuning needs .* of device memory, of which"):
        Base(folder, run, SETTINGS, low_ranks(state, HOW), state)


def test_what_is_not_trained(folder):
    state = drawn(read_config(folder), HOW)
    given = low_ranks(state, HOW), state
    with pytest.raises(UsageError, match="float16"):
        Base(folder, replace(RUN, dtype="float16"), SETTINGS, *given)
    long = Settings(tokens_per_step=1024, length=1024)
    with pytest.raises(UsageError, match="the model's own limit is 512"):
        Base(folder, RUN, long, *given)


def plan_on_a_gpu(cfg):
    machine = Machine("gpu", device_budget=4 << 30, host_budget=200 << 30, context_bytes=640 << 20)
    weights = unseen_weights(cfg, None, stored="bfloat16", dtype="bfloat16")
    rows = low_ranks(
        {name: {"a": np.zeros((16, shape[1])), "b": np.zeros((shape[0], 16))}
         for name, shape in targets_of(cfg, AdapterConfig()).items()},
        AdapterConfig(),
    )  # fmt: skip
    return make_plan(weights, machine, Settings(), rows)


def test_the_device_holds_as_much_for_more_layers(folder):
    cfg = read_config(folder)
    four, eight = (plan_on_a_gpu(replace(cfg, num_hidden_layers=n)) for n in (4, 8))
    assert len(layer_kinds(replace(cfg, num_hidden_layers=8))) == 8
    more = eight.device.resident_bytes - four.device.resident_bytes  # norms
    assert total(eight.device) == total(four.device) + more
    assert eight.host.cache_bytes == 2 * four.host.cache_bytes  # the input of each layer
