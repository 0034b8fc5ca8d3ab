"""What fails while tokens are guessed changes nothing: no pool row is lost, and a second try gives
the plain tokens. What is kept is bounded, and what is promised of memory is kept."""

import gc
import threading
from contextlib import suppress
from functools import partial

import jax
import numpy as np
import pytest

import jlayer
from jlayer import DoesNotFitError, StorageError
from jlayer.drafting.scores import Sharpness
from jlayer.engine import drawing, growing, scheduler
from jlayer.engine.draft import DraftModel
from jlayer.engine.growing import Grower
from jlayer.engine.lane import Lane
from jlayer.engine.speculation import Speculation
from tests.engine.guesses import PROMPT, Made, is_whole
from tests.engine.guessing.test_speculation import chain
from tests.engine.lanes import Run, check_rows, raises_at, within
from tests.engine.test_engine import opened

OPTIONS = {"max_new_tokens": 9, "temperature": 0.7, "seed": 5}
GUESSES = {"speculate": "auto", "draft_tokens": 3}


# Interrupts

SOME = [PROMPT, [5]]
# What is called in a pass before its tokens are given: each call fails in turn.
STEPS = [
    (growing, "check"),
    (Grower, "grow"),
    (Grower, "_begin"),
    (Grower, "_step"),
    (Grower, "_add"),
    (DraftModel, "guess"),
    (DraftModel, "_run"),
    (Speculation, "_settle"),
    (drawing, "draw"),
    (Lane, "choose"),
    (scheduler.Scheduler, "_draw"),
]


def raising(monkeypatch, owner, name, number, error, *, after):
    """The call of this number raises, before or after its work; -> a list that is filled then."""
    whole, calls, raised = getattr(owner, name), iter(range(1 << 30)), []

    def wrapped(*given, **options):
        fails = next(calls) == number
        result = whole(*given, **options) if after or not fails else None
        if fails:
            raised.append(number)
            raise error
        return result

    monkeypatch.setattr(owner, name, wrapped)
    return raised


def check_interrupted(model, want, begun, raised_in):
    """Two runs, one pass of which is interrupted inside `raised_in`."""
    runs = [Run(model, prompt, **GUESSES, **OPTIONS) for prompt in SOME]
    for _ in range(begun):
        runs[0].advance()
        runs[1].take()
    before = [(lane.table.rows.tolist(), lane.token_ids) for run in runs for lane in run.lanes]
    with raised_in() as raised, suppress(KeyboardInterrupt):
        runs[0].advance()
    if raised:
        after = [(lane.table.rows.tolist(), lane.token_ids) for run in runs for lane in run.lanes]
        assert before == after
    check_rows(model, *runs)
    for run in runs:
        run.take()
    assert [run.tokens()[0] for run in runs] == want
    check_rows(model, *runs)
    for run in runs:
        run.close()
    assert is_whole(model)
    return bool(raised)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [0, 1], ids=["of prompts", "of next tokens"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])
def test_an_interrupt_of_any_step_of_guessing_changes_nothing(model, plain, step, begun):
    want = [plain.generations(prompt, **OPTIONS)[0].token_ids for prompt in SOME]
    n_stopped = 0
    for number in (0, 1, 2, 5):
        for after in (False, True):

            class Raised:
                def __enter__(self, number=number, after=after):
                    self.patch = pytest.MonkeyPatch()
                    error = KeyboardInterrupt()
                    return raising(self.patch, *step, number, error, after=after)

                def __exit__(self, *_):
                    self.patch.undo()

            n_stopped += check_interrupted(model, want, begun, Raised)
    assert n_stopped > 0


@pytest.mark.slow
@pytest.mark.parametrize("begun", [0, 1], ids=["of prompts", "of next tokens"])
def test_an_interrupt_at_any_tile_changes_nothing(model, plain, begun):
    want = [plain.generations(prompt, **OPTIONS)[0].token_ids for prompt in SOME]
    number = 0
    while check_interrupted(
        model, want, begun, partial(raises_at, model, number, KeyboardInterrupt())
    ):
        number += 1
    assert number > 5


def test_what_fails_after_the_tokens_were_given_loses_none(model, plain, monkeypatch):
    want = [plain.generations(prompt, **OPTIONS)[0].token_ids for prompt in SOME]
    runs = [Run(model, prompt, **GUESSES, **OPTIONS) for prompt in SOME]
    with pytest.MonkeyPatch.context() as patch:
        raising(patch, Grower, "learn", 0, KeyboardInterrupt(), after=False)
        with pytest.raises(KeyboardInterrupt):
            runs[0].advance()
    check_rows(model, *runs)
    for run in runs:
        run.take()
    assert [run.tokens()[0] for run in runs] == want
    for run in runs:
        run.close()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_device_that_fails_while_guessing_is_an_error_of_storage(model, plain, number):
    (want,) = plain.generations(PROMPT, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        error = jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")
        raising(patch, DraftModel, "_run", number, error, after=True)
        with pytest.raises(StorageError, match="draft model: the device failed"):
            jlayer.generate(model, PROMPT, **GUESSES, **OPTIONS)
    assert is_whole(model)
    assert jlayer.generate(model, PROMPT, **GUESSES, **OPTIONS).token_ids == want.token_ids


# Not finite

BAD = 99


@pytest.fixture
def bad_token(model, monkeypatch):
    read = model.engine.embedding.read

    def damaged(ids):
        return {
            name: np.where((ids == BAD)[:, None], np.nan, rows).astype(rows.dtype)
            for name, rows in read(ids).items()
        }

    monkeypatch.setattr(model.engine.embedding, "read", damaged)


def beside_bad(want, most, deepest):
    """The right tokens, with the damaged one beside each and below the last."""
    nodes, parent = [], -1
    for token in want[: min(deepest, most // 2)]:
        nodes += [(parent, BAD), (parent, token)]
        parent = len(nodes) - 1
    return nodes


def test_what_is_not_finite_in_a_branch_that_is_rejected_is_of_no_matter(
    model, plain, bad_token, monkeypatch
):
    """Nor are its entries, whose rows others take."""
    for temperature in (0, 0.7):
        options = OPTIONS | {"temperature": temperature, "logit_bias": {BAD: -100.0}}
        (want,) = plain.generations([5], **options)
        made = Made(beside_bad, {(5,): want.token_ids}).within(model, monkeypatch)
        (found,) = plain.check([5], speculate="lookup", draft_tokens=7, **options)
        assert made.depths[0] == 3
        assert found.stats["sweeps"] == 3
    monkeypatch.undo()
    plain.check(PROMPT, **GUESSES, **OPTIONS)


def test_what_is_not_finite_on_the_path_ends_the_lane_with_the_layer(model, bad_token, monkeypatch):
    """Beside a lane that goes on; what was drawn before it is given."""
    options = {"max_new_tokens": 9, "temperature": 0}
    want = jlayer.generate(model, PROMPT, speculate="off", **options).token_ids
    before = jlayer.generate(
        model, [5], speculate="off", **(options | {"max_new_tokens": 2})
    ).token_ids

    choose = Lane.choose

    def forced(lane, logits, more=()):
        """The damaged token comes third."""
        choice = choose(lane, logits, more)
        is_third = lane.n_prompt == 1 and len(lane.token_ids) + len(more) == 2
        return type(choice)(BAD) if is_third else choice

    monkeypatch.setattr(Lane, "choose", forced)
    wants = {(5,): [*before, BAD, *range(20)], tuple(PROMPT): want}
    Made(chain, wants).within(model, monkeypatch)
    bad, good = (
        Run(model, prompt, speculate="lookup", draft_tokens=7, **options)
        for prompt in ([5], PROMPT)
    )
    good.advance()
    (lane,) = bad.lanes
    assert lane.token_ids == [*before, BAD]
    assert "layer 0: its output is not finite" in str(lane.error)
    assert good.tokens() == [want]
    check_rows(model, bad, good)
    bad.close(), good.close()
    with pytest.raises(jlayer.CheckpointError, match="layer 0"):
        jlayer.generate(model, [5], speculate="lookup", draft_tokens=7, **options)
    assert is_whole(model)


def test_a_draft_that_is_not_finite_guesses_badly_and_that_is_all(model, plain, monkeypatch):
    """And once it is, what was learnt of it is still a number."""
    guess = DraftModel.guess

    def damaged(draft, parts):
        """Few candidates, so that others are looked up."""
        found = guess(draft, parts)
        return type(found)(found.ids[:, :4], np.full((len(found.ids), 4), np.nan, np.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftModel, "guess", damaged)
        for temperature in (0, 0.7):
            options = OPTIONS | {"max_new_tokens": 24, "temperature": temperature}
            for mode in ("draft", "auto"):
                plain.check([*PROMPT, *PROMPT], speculate=mode, draft_tokens=3, **options)
    (found,) = plain.check(PROMPT, speculate="draft", draft_tokens=3, **OPTIONS)
    assert np.isfinite(found.stats["sharpness"])
    assert found.stats["sweeps"] < 9


def test_what_is_learnt_is_of_the_noise_that_was_drawn_with(fable, monkeypatch):
    """A draft that is the model draws what the model draws, also where a text ended before the last
    token that was drawn."""
    places, observe = [], Sharpness.observe

    def watched(sharpness, perturbed, place):
        places.append((int(np.argmax(perturbed)), place))
        observe(sharpness, perturbed, place)

    monkeypatch.setattr(Sharpness, "observe", watched)
    options = {"max_new_tokens": 16, "temperature": 1, "stop": ["e", "a", "o"], "top_k": 0}
    with opened(fable, draft=fable) as model:
        for seed in range(6):
            found = jlayer.generate(
                model, "The", speculate="draft", draft_tokens=15, seed=seed, **options
            )
            assert found.finish_reason == "stop"
    assert len(places) > 6
    for best, place in places:
        assert place in (None, best)


# What is left


@pytest.mark.slow
def test_many_requests_leave_no_more_than_a_few(model, monkeypatch):
    monkeypatch.setattr("jlayer.engine.speculation.OTHERS_TOKENS", 300)
    speculation = model.engine.speculation
    speculation.forget_answers()
    for number in range(200):
        options = {"max_new_tokens": 4, "temperature": 1, "seed": number}
        jlayer.generate(model, [3 + number % 100], **GUESSES, **options)
    gc.collect()
    assert is_whole(model)
    assert len(speculation.others) <= 300
    assert len(speculation.own_texts) <= 2  # those that the scheduler lets go with the next
    noise = speculation.grower.noise
    assert len(noise) <= noise.most
    assert model.engine.draft.n_rows == 0
    speculation.forget_answers()


def test_two_threads_get_what_each_gets_alone(model, plain):
    wants = [plain.generations(prompt, **OPTIONS)[0].token_ids for prompt in SOME]
    errors = []

    def go(prompt, want):
        for _ in range(6):
            found = jlayer.generate(model, prompt, **GUESSES, **OPTIONS)
            if found.token_ids != want:
                errors.append((prompt, found.token_ids))

    def both():
        threads = [threading.Thread(target=go, args=pair) for pair in zip(SOME, wants, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)

    within(120, both)
    assert not errors
    assert is_whole(model)


def test_programs_are_compiled_in_the_first_rounds_alone(model):
    options = {"max_new_tokens": 24, "temperature": 0.7, **GUESSES}
    for seed in range(4):
        jlayer.generate(model, PROMPT, seed=seed, **options)
    before = dict(model.engine.compiles)
    for seed in range(4, 20):
        jlayer.generate(model, PROMPT, seed=seed, **options)
    assert model.engine.compiles == before
    steps = [label.partition(" wanted ")[0] for label in before if " fresh " in label]
    assert len(set(steps)) == len(steps) > 0


def test_without_a_draft_a_model_in_memory_does_what_it_does_without_guesses(tiny):
    found = []
    for mode in ("off", "auto"):
        with opened(tiny) as model:
            options = {"max_new_tokens": 24, "temperature": 0, "speculate": mode}
            one = jlayer.generate(model, PROMPT, **options)
            plan = model.engine.plan
            assert (one.stats["drafted"], plan.load.nodes, plan.shapes.nodes) == (0, 0, 0)
            found.append((one.token_ids, one.stats["rows"], model.engine.compiles.keys()))
    assert found[0] == found[1]


# Budgets


@pytest.fixture
def whole_pools(monkeypatch):
    """Pools of the size that was planned."""
    from jlayer.plan.shapes import pool_sizes

    monkeypatch.setattr("jlayer.engine.engine.pool_sizes", pool_sizes)
    monkeypatch.setattr("jlayer.engine.alike.anonymous_bytes", lambda: 100 << 20)


@pytest.mark.slow
def test_trees_are_as_wide_as_fits_and_within_the_budget(fable, whole_pools):
    """Down to the smallest budget; a draft that does not fit is refused with its share."""
    options = {"max_new_tokens": 100, "temperature": 0}
    guessed = {"speculate": "draft", "draft_tokens": 63}
    with opened(fable, draft=fable) as model:
        want = jlayer.generate(model, PROMPT, speculate="off", **options).token_ids
        jlayer.generate(model, PROMPT, **guessed, **options)
        most = model.engine.plan.device_peak_bytes
    widths, refusals = [], []
    for budget in [most, most * 24 // 25, most * 9 // 10, most * 7 // 10]:
        try:
            with opened(fable, draft=fable, device_memory=budget) as model:
                found = jlayer.generate(model, PROMPT, **guessed, **options)
                assert found.token_ids == want
                assert found.memory["device_peak_bytes"] <= budget
                widths.append(model.engine.plan.shapes.nodes)
        except DoesNotFitError as error:
            widths.append(None)
            refusals.append(str(error))
    fitting = [width for width in widths if width is not None]
    assert widths == fitting + [None] * (len(widths) - len(fitting))
    assert fitting == sorted(fitting, reverse=True)
    assert len(set(fitting)) > 1, widths
    assert refusals
    assert all(" + draft " in words and "smaller draft model" in words for words in refusals)
