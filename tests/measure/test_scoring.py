"""Continuations are scored and texts continued as by themselves, in few passes."""

import random

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel, UsageError
from jlayer.engine.options import SamplingOptions
from jlayer.errors import DoesNotFitError
from jlayer.measure import scoring
from jlayer.measure.scoring import Scored, continue_all, score
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from tests.conftest import BUNDLED
from tests.programs import all_shapes
from tests.reference.dense_forms import save

SHOTS = [10 + (7 * n) % 900 for n in range(40)]  # the examples before each question


@pytest.fixture(scope="module")
def model():
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as opened:
        yield opened


def questions(count, *, seed=0, n_answers=4, vocab=900):
    """(context, continuation) of each answer to each question."""
    drawn = random.Random(seed)

    def some(least, most):
        return [drawn.randrange(3, vocab) for _ in range(drawn.randint(least, most))]

    shots = [token % vocab for token in SHOTS]
    contexts = [[*shots, *some(3, 20)] for _ in range(count)]
    return [(context, some(1, 4)) for context in contexts for _ in range(n_answers)]


def plainly(model, context, continuation):
    """The same from the logits of a call."""
    ids = [*context, *continuation][-model.context_limit - 1 :]
    logits = model.logits([ids[:-1]])[0][-len(continuation) :].astype(np.float64)
    totals = np.log(np.exp(logits).sum(1))
    own = logits[np.arange(len(continuation)), continuation]
    return Scored(float((own - totals).sum()), logits.argmax(1).tolist() == list(continuation))


def check(model, pairs, found):
    for pair, one in zip(pairs, found, strict=True):
        expected = plainly(model, *pair)
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert one.is_greedy == expected.is_greedy


def test_answers_are_scored_as_by_themselves_in_one_pass(model):
    pairs = questions(3)
    context = pairs[0][0]
    likeliest = int(model.logits([context])[0, -1].argmax())
    pairs += [(context, [likeliest]), pairs[3], ([5], [9, 9]), ([5], [9])]
    before, told = model.engine.scheduler.n_passes, []
    found = score(model, pairs, told=lambda *counts: told.append(counts))
    assert model.engine.scheduler.n_passes == before + 1
    assert told[-1] == (len(pairs) - 1, len(pairs) - 1), "equal ones are scored once"
    check(model, pairs, found)
    assert found[12].is_greedy
    assert found[13] == found[3]
    assert not all(one.is_greedy for one in found)


def test_what_is_longer_than_the_context_loses_its_first_tokens():
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32", context=50) as model:
        check_longer_than_the_context(model, limit=50)


def check_longer_than_the_context(model, limit):
    long = np.resize(SHOTS, limit + 30).tolist()
    pairs = [(long[: limit - 3], [5, 6, 7]), (long[: limit - 1], [5, 6]), (long, [5, 6, 7])]
    pairs += [(long[:1], long[1 : limit + 1]), (long[:9], [5])]
    found = score(model, pairs)
    check(model, pairs, found)
    with pytest.raises(UsageError, match="longer than the context"):
        score(model, [(long[:1], long[: limit + 1])])


@pytest.mark.parametrize("pair", [([], [5]), ([5], []), ([5, 4096], [5]), ([5], [-1])])
def test_what_cannot_be_scored_is_refused_before_a_pass(model, pair):
    before = model.engine.scheduler.n_passes
    with pytest.raises(UsageError):
        score(model, [([5], [6]), pair])
    assert model.engine.scheduler.n_passes == before


def test_nothing_asked_is_nothing_found(model):
    assert score(model, []) == []
    assert continue_all(model, []) == []


@pytest.fixture
def tight(monkeypatch):
    """The bundled model within budgets that hold so many lanes of a length, and no more."""
    monkeypatch.setattr("jlayer.engine.alike.anonymous_bytes", lambda: 100 << 20)

    def opened(lanes, length):
        with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
            engine, shape = model.engine, RunShape(lanes, length, length, scores=True)
            machine = engine.plan.machine
            needed = make_plan(engine.weights, machine, shape, keeps_layers=False)
        return AutoModel.from_pretrained(
            BUNDLED, device="cpu", dtype="float32", device_memory=needed.device_peak_bytes
        )

    with all_shapes():
        yield opened


@pytest.mark.slow
def test_portions_are_as_large_as_the_budget_allows(model, tight, monkeypatch):
    pairs = questions(30, n_answers=3, seed=1)
    want = score(model, pairs)
    with tight(1, 64) as small:
        sizes, decode = [], scoring.Decoding

        def decoding(engine, rows, options):
            sizes.append(len(rows))
            return decode(engine, rows, options)

        monkeypatch.setattr(scoring, "Decoding", decoding)
        found = score(small, pairs)
        assert small.engine.device_peak_bytes <= small.plan.machine.device_budget
        assert sum(sizes) == 90
        assert 1 < len(sizes) < 5, "of a budget for one by itself, thanks to shared beginnings"
        passes = small.engine.scheduler.n_passes
        # Few more than what the plan's rows hold: a portion's last pass is not full.
        rows = sum(len(c) for c in {tuple(context) for context, _ in pairs}) - 29 * len(SHOTS)
        rows += sum(len(continuation) for _, continuation in pairs)
        assert passes <= len(sizes) + rows // small.plan.load.n_rows + 1
    assert [one.logprob for one in found] == pytest.approx([o.logprob for o in want], abs=1e-4)


def test_one_that_does_not_fit_is_refused_with_its_sum(tight):
    with tight(1, 20) as small, pytest.raises(DoesNotFitError):
        score(small, [(np.resize(SHOTS, 1000).tolist(), [5])])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_windows_and_states_share_nothing_and_give_the_same(kind, tmp_path):
    folder = save(tmp_path / kind, kind)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        pairs = questions(2, n_answers=2, vocab=130)
        before = model.engine.scheduler.n_passes
        found = score(model, pairs)
        assert model.engine.scheduler.n_passes == before + 1
        check(model, pairs, found)


def test_texts_with_other_options_share_their_passes(model):
    greedy = SamplingOptions(max_new_tokens=7)
    longer = SamplingOptions(max_new_tokens=11, stop=("the",))
    drawn = SamplingOptions(max_new_tokens=5, do_sample=True, seed=3, top_k=20)
    asked = [(SHOTS[:n], options) for n in (3, 20) for options in (greedy, longer, drawn)]
    before, told = model.engine.scheduler.n_passes, []
    found = continue_all(model, asked, told=lambda *counts: told.append(counts))
    passes = model.engine.scheduler.n_passes - before
    assert told[-1] == (6, 6)
    assert passes <= 11 + 2, "a run begins with the pass after that in which the one before began"
    for (ids, options), tokens in zip(asked, found, strict=True):
        given = {"max_new_tokens": options.max_new_tokens, "stop": options.stop or None}
        if options.do_sample:
            given |= {"do_sample": True, "seed": 3, "top_k": 20}
        else:
            given["temperature"] = 0
        alone = jlayer.generate(model, ids, eos_token_id=None, **given)
        assert tokens == alone.token_ids


def test_texts_that_do_not_fit_together_come_one_after_another(model, tight):
    options = [SamplingOptions(max_new_tokens=n) for n in (4, 6, 5)]
    asked = [(SHOTS[: 5 + n], options[n % 3]) for n in range(12)]
    want = continue_all(model, asked)
    with tight(1, 40) as small:
        found = continue_all(small, asked)
        assert small.engine.n_alive == 0
        assert small.engine.device_peak_bytes <= small.plan.machine.device_budget
    assert found == want
