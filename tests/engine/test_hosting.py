"""The host's cores multiply a share of the rows: the same tokens as without, counted bytes, and
nothing left behind where a pass ends early."""

from dataclasses import replace

import numpy as np
import pytest

from jlayer import AutoModel, generate
from jlayer.convert import convert_checkpoint
from jlayer.cores.cores import Cores
from jlayer.engine import engine
from jlayer.engine.speeds import no_slower_than_more
from jlayer.errors import CheckpointError
from jlayer.plan import hosting, making, time
from jlayer.plan.tiles import Tier
from tests.conftest import BUNDLED
from tests.quantized import converted

IDS = [list(range(40, 80))]
PROMPT = "Once upon a time"
GREEDY = {"max_new_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosted") / "int4"
    convert_checkpoint(BUNDLED, folder, quantize="int4")
    return folder


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of a stage on each side."""
    monkeypatch.setattr(making, "TILE_BYTES", (30_000,))


def opened(folder, share, **options):
    return AutoModel.from_pretrained(folder, device="cpu", host_share=share, **options)


def found(folder, share, **options):
    """(logits, greedy tokens, the generation)"""
    with opened(folder, share, dtype="float32", **options) as model:
        logits = model.logits(IDS)
        one = generate(model, PROMPT, speculate="lookup", draft_tokens=7, **GREEDY)
    return logits, one.token_ids, one


def assert_alike(ours, expected):
    assert np.abs(ours[0] - expected[0]).max() <= 1e-5 * np.abs(expected[0]).max()
    assert ours[1] == expected[1]


@pytest.mark.slow
def test_greedy_tokens_are_equal_for_a_share(int4):
    alone, ours = found(int4, 0), found(int4, 0.6)
    assert_alike(ours, alone)
    assert alone[2].stats["host_product_bytes"] == 0
    assert ours[2].stats["host_product_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "int4"])
def test_greedy_tokens_are_equal_for_every_share(fable, int4, form):
    folder = {"plain": fable, "int4": int4}[form]
    alone, before = found(folder, 0), 0
    for share in (0.3, 0.7, 1):
        ours = found(folder, share)
        assert_alike(ours, alone)
        stats, plan = ours[2].stats, ours[2].plan
        assert before < stats["host_product_bytes"]
        before = stats["host_product_bytes"]
        assert before == plan["sweep"]["host_product_bytes"] * stats["sweeps"]
        assert abs(plan["host_share"] - share) < 0.25  # rows of whole disk blocks
    assert stats["put_bytes"] == 0
    assert plan["host_share"] == 1


@pytest.mark.slow
def test_from_disk_it_multiplies_what_passes_through_the_slots(int4):
    """Every share's tiles come through the ring, which is freed in time."""
    alone, ours = found(int4, 0), found(int4, 0.6, keeps_layers=False)
    assert_alike(ours, alone)
    stats = ours[2].stats
    assert 0 < stats["host_product_bytes"] < stats["read_bytes"]


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_biases_and_widths_without_a_kernel(tmp_path, scheme):
    _, layered = converted(tmp_path, scheme, attention_bias=True, mlp_bias=True)
    ids = np.random.default_rng(0).integers(0, 100, (2, 33)).tolist()
    logits = []
    for share in (0, 0.5, 1):
        with opened(layered, share, dtype="float32") as model:
            logits.append(model.logits(ids))
    for ours in logits[1:]:
        assert np.abs(ours - logits[0]).max() <= 1e-5 * np.abs(logits[0]).max()


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_to_the_exact_result_as_without(int4):
    with opened(int4, 0, dtype="float32") as model:
        exact = model.logits(IDS)
    far = []
    for share in (0, 0.6, 1):
        with opened(int4, share, dtype="bfloat16") as model:
            far.append(np.sqrt(np.square(model.logits(IDS) - exact).mean()))
    assert max(far[1:]) <= 1.2 * far[0]


@pytest.mark.slow
def test_lanes_that_share_a_pass_have_the_tokens_that_they_have_alone(int4):
    """Rows of several lanes, with padding between them."""
    prompts = [PROMPT, "The king", "He said that it was not so, and"]
    with opened(int4, 0.6, dtype="float32") as model:
        together = generate(model, prompts, **GREEDY)
    with opened(int4, 0, dtype="float32") as model:
        assert [one.token_ids for one in together] == [
            generate(model, prompt, **GREEDY).token_ids for prompt in prompts
        ]


@pytest.mark.slow
def test_auto_measures_and_multiplies_quantized_weights_on_a_cpu(int4, monkeypatch):
    expected = found(int4, 0)
    with opened(int4, "auto") as model:  # too small to be worth a measurement
        assert model.plan.machine.host is None
        assert model.plan.host_share == 0
    monkeypatch.setattr(engine, "LEAST_HOSTED_BYTES", 0)
    measured = measured_as(monkeypatch, 1e12)
    for module in (hosting, time):  # decoding takes long, as it does for a model of real size
        monkeypatch.setattr(module, "CPU_DECODED_WEIGHTS", 1e7)
    ours = found(int4, "auto")
    assert measured
    assert_alike(ours, expected)
    assert ours[2].plan["host_share"] == 1
    assert ours[2].stats["put_bytes"] == 0


def measured_as(monkeypatch, speed):
    """Speeds are taken to be this, once they were measured. -> a list of what was measured."""
    seen, measure = [], engine.host_speeds

    def host_speeds(*given, dtype):
        seen.append(measure(*given, dtype=dtype))
        forms = tuple((form, ((1, speed), (64, speed))) for form, _ in seen[-1].forms)
        return replace(seen[-1], forms=forms)

    monkeypatch.setattr(engine, "host_speeds", host_speeds)
    return seen


def test_cores_that_are_slow_are_not_used(int4, monkeypatch):
    monkeypatch.setattr(engine, "LEAST_HOSTED_BYTES", 0)
    measured = measured_as(monkeypatch, 1.0)
    with opened(int4, "auto") as model:
        assert model.plan.host_share == 0
    (speeds,) = measured
    assert {form for form, _ in speeds.forms} == {"int4", "int8"}
    for _, points in speeds.forms:
        assert all(speed > 1e6 for _, speed in points)
        assert [columns for columns, _ in points] == sorted(columns for columns, _ in points)


def test_without_kernels_auto_leaves_the_cores_alone(int4, monkeypatch):
    monkeypatch.setattr(engine, "LEAST_HOSTED_BYTES", 0)
    monkeypatch.setattr(engine, "missing", lambda: "llvmlite is not there")
    with opened(int4, "auto") as model:
        assert model.plan.host_share == 0
        assert model.plan.machine.host is None
        assert any("llvmlite is not there" in note for note in model.notes)
    with opened(int4, 0.5) as model:  # asked for, so it is done
        assert model.plan.host_share > 0
        assert any("by numpy" in note and "is not there" in note for note in model.notes)


def test_a_pass_that_is_given_up_leaves_nothing_running(int4, monkeypatch):
    with opened(int4, 0.6, dtype="float32") as model:
        expected = model.logits(IDS)
        calls, begin = [], Cores.begin

        def fail(*given):
            calls.append(given)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return begin(*given)

        monkeypatch.setattr(Cores, "begin", fail)
        with pytest.raises(KeyboardInterrupt):
            model.logits(IDS)
        monkeypatch.undo()
        assert np.array_equal(model.logits(IDS), expected)


def test_values_that_are_not_finite_are_found_on_the_host_too(int4, monkeypatch):
    """The first layer is named, though the host multiplied its rows."""
    begin = Cores.begin

    def spoilt(self, jobs, x):
        return begin(self, jobs, np.full_like(x, np.nan))

    with opened(int4, 1, dtype="float32") as model:
        monkeypatch.setattr(Cores, "begin", spoilt)
        with pytest.raises(CheckpointError, match="not finite"):
            model.logits(IDS)


def test_what_moves_to_another_tier_is_let_go(int4):
    """The lists of jobs point into memory: they go with it."""
    with opened(int4, 0.6, dtype="float32") as model:
        expected, host = model.logits(IDS), model.engine.host
        assert host.n_kept > 0
        held = model.engine.totals.read_bytes
        plan = model.plan
        disk = tuple(Tier.DISK for _ in plan.tiers)
        with model.engine.turn() as executor:
            executor.retier(disk)
            host.forget()
            assert host.n_kept == 0
            model.engine.plan = replace(plan, tiers=disk)
            rooms = executor.host_bytes
        assert rooms < plan.tiling.n_bytes
        assert np.array_equal(model.logits(IDS), expected)
        assert model.engine.totals.read_bytes > held


def test_few_columns_are_no_slower_than_more():
    """A product of few that was disturbed does not leave all rows to the device."""
    measured = [(1, 10.0), (4, 50.0), (16, 58.0), (64, 14.0)]
    assert no_slower_than_more(measured) == ((1, 58.0), (4, 58.0), (16, 58.0), (64, 14.0))


def test_a_closed_model_lets_go_of_its_weights(int4):
    """The lists of jobs would keep them alive as long as somebody has the model."""
    with opened(int4, 0.6, dtype="float32") as model:
        model.logits(IDS)
        assert model.engine.host.n_kept > 0
    assert model.engine.host.n_kept == 0
