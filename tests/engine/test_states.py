"""Layers whose state cannot be cut back: whatever rides in a pass, and however it ends, a lane's
tokens are those of Transformers."""

from dataclasses import replace

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine import engine
from jlayer.plan.making import make_plan, refit
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from tests.engine.lanes import GREEDY, Run
from tests.reference.dense_forms import reference_logits, save

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(5)
# More than two blocks of 64, and a rest; said again and again, so that there is something to guess.
PROMPT = np.resize(RNG.integers(3, 133, 23), 150).tolist()
OPTIONS = {**GREEDY, "max_new_tokens": 24, "eos_token_id": None}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen 3.5: three layers with a state, one with attention."""
    return save(tmp_path_factory.mktemp("qwen") / "source", "qwen3_5")


@pytest.fixture(scope="module")
def model(qwen):
    with AutoModel.from_pretrained(qwen, device="cpu", dtype="float32") as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(model):
    """The tokens that follow the prompt, without guesses."""
    return jlayer.generate(model, PROMPT, speculate="off", **OPTIONS).token_ids


@pytest.mark.slow
def test_a_prompt_in_blocks_and_in_pieces_is_that_of_transformers(qwen, model):
    """Divisions by lengths that nearly cancel cost digits: the reference is 2e-5 from itself in
    float64 here."""
    expected = reference_logits(qwen, [PROMPT], torch.float64).numpy()
    own = np.abs(reference_logits(qwen, [PROMPT], torch.float32).numpy() - expected).max()
    close = {"rtol": 0, "atol": 2 * own}
    np.testing.assert_allclose(model.logits([PROMPT]), expected, **close)
    forward = model.engine.start(RunShape(longest=128, context=150, all_logits=True))
    at = 0
    for size in (1, 70, 2, 64, 13):
        found = forward.sweep([PROMPT[at : at + size]], [at], all_logits=True)
        np.testing.assert_allclose(found, expected[:, at : at + size], **close)
        at += size
    with pytest.raises(jlayer.errors.StorageError, match="first token"):
        forward.sweep([PROMPT[100:]], [100])
    again = forward.sweep([PROMPT[:70]], [0], all_logits=True)
    np.testing.assert_allclose(again, expected[:, :70], **close)
    forward.close()


@pytest.mark.slow
@pytest.mark.parametrize("n_guesses", [1, 7, 15])
def test_guesses_change_no_token(model, plain, n_guesses):
    """Right ones and wrong ones: these leave the state as it was."""
    found = jlayer.generate(model, PROMPT, speculate="lookup", draft_tokens=n_guesses, **OPTIONS)
    assert found.token_ids == plain
    accepted = sum(found.stats["accepted_by_depth"])
    assert 0 < accepted < found.stats["drafted"]
    # Those that were right save passes, though they ride again.
    assert found.stats["sweeps"] < len(plain)


@pytest.mark.slow
def test_lanes_that_begin_alike_and_guess_are_what_each_is_alone(model, plain):
    prompts = [PROMPT, PROMPT[:40], [*PROMPT[:64], 9], PROMPT[:2], PROMPT]
    alone = [
        jlayer.generate(model, prompt, speculate="off", **OPTIONS).token_ids for prompt in prompts
    ]
    together = jlayer.generate(model, prompts, speculate="lookup", draft_tokens=7, **OPTIONS)
    assert [one.token_ids for one in together] == alone
    assert alone[0] == alone[-1] == plain
    options = {"do_sample": True, "num_return_sequences": 3, "seed": 1, "max_new_tokens": 9}
    several = model.generate([PROMPT[:40]], **options)
    assert several == model.generate([PROMPT[:40]], **options)


@pytest.mark.slow
def test_a_pass_that_fails_has_changed_no_state(model, plain, monkeypatch):
    sweeper = model.engine.sweeper
    run = Run(model, PROMPT, speculate="lookup", draft_tokens=7, **OPTIONS)
    whole, faults = sweeper.run, iter([2, 3, 3])

    def failing(executor, parts, take, *, check=lambda: None, **more):
        left = next(faults, None)

        def fail():
            nonlocal left
            check()
            if left is not None:
                left -= 1
                if left < 0:
                    raise RuntimeError("in the middle")

        return whole(executor, parts, take, check=fail, **more)

    monkeypatch.setattr(sweeper, "run", failing)
    n_failed = 0
    while any(lane.is_alive for lane in run.lanes):
        try:
            run.advance()
        except RuntimeError:
            n_failed += 1
    assert n_failed == 3
    assert [lane.token_ids for lane in run.lanes] == [plain]
    run.close()


@pytest.mark.slow
def test_states_in_host_memory_come_and_go(qwen, plain, monkeypatch):
    for name, made in (("make_plan", make_plan), ("refit", refit)):

        def on_host(*given, made=made, **options):
            return replace(made(*given, **options), cache=Tier.HOST)

        monkeypatch.setattr(engine, name, on_host)
    with AutoModel.from_pretrained(qwen, device="cpu", dtype="float32") as opened:
        found = jlayer.generate(opened, PROMPT, speculate="lookup", draft_tokens=7, **OPTIONS)
        assert opened.engine.plan.cache is Tier.HOST
        assert all(pool is None for pool in opened.engine.caches.layers)
    assert found.token_ids == plain


@pytest.mark.slow
def test_temporaries_and_states_are_within_what_was_planned(qwen):
    for n_lanes, length in ((1, 150), (5, 30)):
        with AutoModel.from_pretrained(qwen, device="cpu", dtype="float32") as opened:
            prompts = [PROMPT[:length]] * n_lanes
            jlayer.generate(opened, prompts, speculate="lookup", draft_tokens=15, **OPTIONS)
            plan = opened.engine.plan
            assert opened.engine.programs.temporary_bytes <= plan.device.temporary_bytes
            assert opened.engine.memory()["device_peak_bytes"] <= plan.device_peak_bytes
