"""Log-probabilities of a prompt's tokens: those of Transformers, whatever rides beside them, and no
row computed twice."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlayer
from jlayer import AutoModel, UsageError
from jlayer.app.cli import main
from jlayer.engine.scores import Scores
from tests.conftest import BUNDLED
from tests.engine.lanes import GREEDY, Run, check_rows, limited, raises_at
from tests.reference.dense_forms import reference_logits, save

KINDS = ("llama", "gemma3", "qwen3_5")  # attention, windows, states
PROMPT = np.random.default_rng(3).integers(3, 133, 90).tolist()
PLAIN = {**GREEDY, "eos_token_id": None, "speculate": "off"}
SCORED = {**PLAIN, "max_new_tokens": 0}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]]


@pytest.fixture(scope="module", params=[KINDS[0], *SLOW])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param) / "source", request.param)


@pytest.fixture(scope="module")
def model(folder):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as opened:
        yield opened


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("llama") / "source", "llama")
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as opened:
        yield opened


def score(model, prompts, n_top=2, **options):
    return jlayer.generate(model, prompts, **{**SCORED, "prompt_logprobs": n_top, **options})


def logprobs(found):
    """Of the tokens that were scored, in order."""
    return [one["logprob"] for one in found.prompt_logprobs if one is not None]


def own(model, prompt):
    """The same, of the logits of a call."""
    logits = model.logits([prompt])[0].astype(np.float64)
    totals = np.log(np.exp(logits).sum(1))
    return logits[np.arange(len(prompt) - 1), prompt[1:]] - totals[:-1]


def close(expected, tolerance=1e-5):
    return pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_they_are_those_of_transformers(folder, model):
    torch = pytest.importorskip("torch")
    expected = reference_logits(folder, [PROMPT], torch.float32)[0].log_softmax(-1).numpy()
    found = score(model, PROMPT, 5)
    assert found.token_ids == []
    assert (found.prompt_tokens, found.finish_reason) == (len(PROMPT), "length")
    assert found.prompt_logprobs[0] is None
    # Divisions by lengths that nearly cancel cost digits: see test_states.
    tolerance = 1e-4 if model.config.model_type.startswith("qwen3_5") else 1e-5
    for place, one in enumerate(found.prompt_logprobs[1:], 1):
        row, token = expected[place - 1], PROMPT[place]
        assert one["token_id"] == token
        assert one["logprob"] == close(row[token], tolerance)
        ids, values = zip(*one["top"], strict=True)
        assert list(values) == sorted(values, reverse=True)
        assert values == close(np.sort(row)[:-6:-1].tolist(), tolerance)
        assert list(values) == close(row[list(ids)].tolist(), tolerance)
        assert dict(one["top"]).get(token, one["logprob"]) == one["logprob"], "the same float"


@pytest.mark.parametrize("rows", [None, 32, pytest.param(8, marks=pytest.mark.slow)])
def test_a_prompt_in_pieces_is_scored_as_in_one(model, rows):
    if rows is None:
        found = score(model, PROMPT)
    else:
        with limited(model, rows=rows):
            found = score(model, PROMPT)
    assert found.stats["sweeps"] == (1 if rows is None else math.ceil((len(PROMPT) - 1) / rows))
    assert found.stats["rows"] == len(PROMPT) - 1, "nothing follows the last token"
    assert logprobs(found) == close(own(model, PROMPT), 1e-4)


@pytest.mark.slow
def test_together_is_alone(model):
    prompts = [PROMPT[:n] for n in (2, 17, 60)] + [PROMPT[20:41]]
    first = {"prompt_logprobs_from": 9}
    want = [score(model, prompt) for prompt in prompts]
    want_late = [score(model, prompt, 0, **first) for prompt in prompts]
    text = jlayer.generate(model, PROMPT[:30], max_new_tokens=6, **PLAIN)
    handle = model.submit(PROMPT[:30], max_new_tokens=6, **PLAIN)
    later = [model.submit(prompt, prompt_logprobs=0, **first, **SCORED) for prompt in prompts]
    found = score(model, prompts)
    assert handle.result(timeout=60).token_ids == text.token_ids
    for one, other in zip(found, want, strict=True):
        assert logprobs(one) == close(logprobs(other))
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert [token for token, _ in a["top"]] == [token for token, _ in b["top"]]
    for handle, other, prompt in zip(later, want_late, prompts, strict=True):
        steps = [step.finish_reason for step in handle]
        assert steps == ["length"][: len(prompt) - 9 + 1 > 1]
        one = handle.result(timeout=60)
        assert one.prompt_logprobs[:9] == [None] * min(9, len(prompt))
        assert logprobs(one) == close(logprobs(other))
        assert logprobs(one) == close(own(model, prompt)[8:], 1e-4)
    assert model.engine.n_alive == 0


def test_each_is_told_as_many_of_the_likeliest_as_it_asked_for(llama):
    runs = [Run(llama, PROMPT[:30], **SCORED, prompt_logprobs=n_top) for n_top in (3, 0, 1)]
    runs[0].advance()
    assert not any(lane.is_alive for run in runs for lane in run.lanes), "one pass for all"
    found = [run.decoding.generations()[0].prompt_logprobs[1:] for run in runs]
    for run in runs:
        run.close()
    assert {len(one["top"]) for one in found[0]} == {3}
    for n_top, some in ((0, found[1]), (1, found[2])):
        assert [one["top"] for one in some] == [one["top"][:n_top] for one in found[0]]


@pytest.mark.parametrize("n_new", [0, 3])
def test_new_tokens_follow_a_scored_prompt_as_any_other(model, n_new):
    want = jlayer.generate(model, PROMPT[:40], max_new_tokens=3, logprobs=1, **PLAIN)
    options = {**PLAIN, "max_new_tokens": n_new, "logprobs": 1}
    found = score(model, PROMPT[:40], **options)
    assert found.token_ids == want.token_ids[:n_new]
    assert [one["token_id"] for one in found.logprobs] == found.token_ids
    assert logprobs(found) == close(logprobs(score(model, PROMPT[:40])))
    assert want.prompt_logprobs is None


def test_sequences_of_a_prompt_score_it_once(llama):
    options = {"max_new_tokens": 2, "num_return_sequences": 3, "temperature": 0.9, "seed": 1}
    want = jlayer.generate(llama, PROMPT, **options)
    found = score(llama, PROMPT, do_sample=True, **options)
    assert [one.token_ids for one in found] == [one.token_ids for one in want]
    assert found[0].stats["rows"] == want[0].stats["rows"]
    for one in found:
        assert one.prompt_logprobs == found[0].prompt_logprobs
        assert logprobs(one) == close(own(llama, PROMPT))
    found = score(llama, PROMPT, do_sample=True, **options | {"max_new_tokens": 0})
    assert [one.stats["rows"] for one in found] == [len(PROMPT) - 1] * 3
    assert logprobs(found[2]) == close(own(llama, PROMPT))


def test_what_is_scored_later_shares_what_is_before(llama):
    """Answers to one question: of each but the first only its own rows ride."""
    begin, answers = PROMPT[:60], [[5, 9], [7], [5, 9, 11, 30], [8, 8]]
    prompts = [begin + answer for answer in answers]
    found = score(llama, prompts, prompt_logprobs_from=len(begin))
    n_rows = len(begin) - 1 + sum(map(len, answers))
    assert found[0].stats["rows"] == n_rows
    assert found[0].stats["sweeps"] == 1
    for one, prompt in zip(found, prompts, strict=True):
        assert one.prompt_logprobs[: len(begin)] == [None] * len(begin)
        assert logprobs(one) == close(own(llama, prompt)[len(begin) - 1 :])
    whole = score(llama, prompts)
    assert whole[0].stats["rows"] == sum(len(prompt) - 1 for prompt in prompts)
    assert [logprobs(one) for one in whole] == [close(own(llama, prompt)) for prompt in prompts]


def test_entries_that_were_kept_are_taken_as_far_as_nothing_is_scored(llama):
    kept = llama.engine.kept
    kept.most = 2
    try:
        for first in (1, 50):
            run = Run(llama, PROMPT, **{**PLAIN, "max_new_tokens": 2})
            run.tokens()
            run.decoding.keep()
            found = score(llama, PROMPT, prompt_logprobs_from=first)
            assert found.stats["kept_tokens"] == first - 1
            assert found.stats["rows"] == len(PROMPT) - first
            assert logprobs(found) == close(own(llama, PROMPT)[first - 1 :])
            kept.clear()
    finally:
        kept.most = 0


def test_only_the_head_is_compiled_anew(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu", dtype="float32") as model:
        jlayer.generate(model, PROMPT, max_new_tokens=2, **PLAIN)
        found = score(model, PROMPT, max_new_tokens=2)
        assert found.stats["compiles"]
        assert all(label.startswith("head") for label in found.stats["compiles"])
        again = score(model, PROMPT[1:], 5, max_new_tokens=2)
        assert not again.stats["compiles"]
        assert not score(model, PROMPT).stats["compiles"]


@pytest.mark.slow
@pytest.mark.parametrize("n_lanes", [1, 7])
def test_what_they_take_was_planned(fable, n_lanes):
    prompts = [[10 + (7 * n + lane) % 900 for n in range(200)] for lane in range(n_lanes)]
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        found = score(model, prompts)[0]
        assert found.stats["rows"] == 199 * n_lanes
        held, plan = model.engine.sweeper.most_activation_bytes, model.plan
        assert held <= plan.device.activation_bytes
        assert model.engine.device_peak_bytes <= plan.device_peak_bytes
        decoding, _ = model.decoding(prompts, options={**PLAIN, "max_new_tokens": 1})
        assert held > decoding.plan.device.activation_bytes, "without scores less is planned"
        decoding.close()


def test_a_long_prompt_comes_in_parts_where_memory_is_short(fable):
    """Scoring needs no more than a chunk's logits at a time."""
    prompt = [10 + (7 * n) % 900 for n in range(500)]
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        want = score(model, prompt)
        needed = model.plan.device_peak_bytes
    with AutoModel.from_pretrained(
        fable, device="cpu", dtype="float32", device_memory=needed // 2
    ) as model:
        found = score(model, prompt)
        assert model.engine.device_peak_bytes <= needed // 2
    assert logprobs(found) == close(logprobs(want), 1e-4)


def test_a_prompt_without_numbers_fails_alone(llama, monkeypatch):
    read = llama.engine.embedding.read

    def damaged(ids):
        return {
            name: np.where((ids == 99)[:, None], np.nan, rows).astype(rows.dtype)
            for name, rows in read(ids).items()
        }

    monkeypatch.setattr(llama.engine.embedding, "read", damaged)
    good_prompt = [token for token in PROMPT if token != 99][:30]
    scored = {**SCORED, "prompt_logprobs": 3}
    with limited(llama, rows=16):
        good = Run(llama, good_prompt, **scored)
        bad = Run(llama, [3, 4, 99, *PROMPT[:30]], **scored)
        unseen = Run(llama, [*good_prompt, 99], **scored)  # nothing follows its last token
        bad.advance()
        good.tokens(), unseen.tokens()
        assert "not finite" in str(bad.lanes[0].error)
        assert bad.lanes[0].is_alive is False
        check_rows(llama, good, bad, unseen)
        found = [run.decoding.generations()[0] for run in (good, unseen)]
    for run in (good, bad, unseen):
        run.close()
    assert logprobs(found[0]) == close(own(llama, good_prompt))
    assert logprobs(found[1])[:-1] == close(own(llama, good_prompt))


def test_a_pass_that_fails_has_scored_nothing(llama):
    want = logprobs(score(llama, PROMPT))
    with limited(llama, rows=32):
        run = Run(llama, PROMPT, **{**SCORED, "prompt_logprobs": 0})
        run.scheduler.advance(run.lanes, once=True)
        n_scored = run.lanes[0].scores.next
        assert n_scored == 32
        with (
            raises_at(model=llama, number=1, error=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run.scheduler.advance(run.lanes, once=True)
        assert run.lanes[0].scores.next == n_scored
        run.tokens()
    (found,) = run.decoding.generations()
    run.close()
    assert logprobs(found) == close(want)


@pytest.mark.parametrize("n_new", [0, 4])
def test_a_run_that_gave_its_entries_back_scores_the_rest(llama, n_new):
    """Rows whose logits are known ride once more, but for their entries alone."""
    want = score(llama, PROMPT, max_new_tokens=n_new)
    for n_passes in (1, 2, 4)[: 2 + (n_new > 0)]:
        with limited(llama, rows=32):
            run = Run(llama, PROMPT, **{**PLAIN, "max_new_tokens": n_new, "prompt_logprobs": 2})
            for _ in range(n_passes):
                run.scheduler.advance(run.lanes, once=True)
                run.take()
            before = run.lanes[0].scores.next
            run.decoding.suspend()
            run.decoding.admit_waiting()
            assert run.lanes[0].scores.next == before
            run.tokens()
        (found,) = run.decoding.generations()
        run.close()
        assert found.token_ids == want.token_ids
        assert logprobs(found) == close(logprobs(want))


def test_a_prompt_may_be_a_token_longer_than_the_context(llama):
    limit = llama.context_limit
    prompt = np.resize(PROMPT, limit + 2).tolist()
    found = score(llama, prompt[: limit + 1])
    assert len(logprobs(found)) == limit
    assert logprobs(found)[:-1] == close(own(llama, prompt[:limit]), 1e-4)
    with pytest.raises(UsageError, match="longer than the context"):
        score(llama, prompt)
    with pytest.raises(UsageError, match="longer than the context"):
        score(llama, prompt[: limit + 1], max_new_tokens=1)


@pytest.mark.parametrize("first", [1, 3, 4, 10])
@pytest.mark.parametrize("n_new", [0, 2])
def test_where_there_is_little_or_nothing_to_score(llama, first, n_new):
    for n_prompt in (1, 2, 3):
        found = score(llama, PROMPT[:n_prompt], prompt_logprobs_from=first, max_new_tokens=n_new)
        assert len(found.prompt_logprobs) == n_prompt
        assert len(logprobs(found)) == max(0, n_prompt - first)
        assert len(found.token_ids) == n_new
        assert found.finish_reason == "length"


def test_the_command_line_prints_them(capsys):
    args = ["generate", str(BUNDLED), "Once upon a time", "--json", "--device", "cpu"]
    assert main([*args, "-n", "1", "--prompt-logprobs", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["prompt_logprobs"]) == found["prompt_tokens"]
    assert found["prompt_logprobs"][0] is None
    assert all(len(one["top"]) == 2 for one in found["prompt_logprobs"][1:])
    assert main([*args[:3], "--prompt-logprobs", "2"]) == 2
    assert "--prompt-logprobs" in capsys.readouterr().err


# The reduction

VOCAB = 23
numbers = st.sampled_from([-3.0, -0.0, 0.0, 1.5, 1.5000001, 40.0]) | st.floats(-90, 90, width=32)


@given(
    st.lists(st.lists(numbers, min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=4),
    st.lists(st.integers(1, VOCAB - 1), max_size=4),
    st.integers(1, VOCAB),
    st.randoms(use_true_random=False),
)
def test_slices_in_any_order_give_what_all_give(rows, cuts, n_likeliest, random):
    logits = np.array(rows, np.float32)
    targets = np.array([random.randrange(-1, VOCAB) for _ in rows])
    scores = Scores(targets, n_likeliest=n_likeliest)
    bounds = sorted({0, VOCAB, *cuts})
    slices = list(pairwise(bounds))
    random.shuffle(slices)
    places = np.arange(len(rows))
    for begin, end in slices:
        scores.add(logits[:, begin:end], places, begin)
    assert scores.are_finite
    totals = np.log(np.exp(logits.astype(np.float64)).sum(1))
    for place in np.flatnonzero(targets >= 0):
        (found,) = scores.choices(slice(place, place + 1), n_likeliest)
        order = sorted(range(VOCAB), key=lambda token: (-logits[place, token], token))
        assert [token for token, _ in found.top] == order[:n_likeliest]
        assert found.token_id == targets[place]
        expected = logits[place].astype(np.float64) - totals[place]
        assert found.logprob == close(expected[targets[place]], 1e-4)
        for token, value in found.top:
            assert value == close(expected[token], 1e-4)
            assert token != found.token_id or value == found.logprob
    assert scores.best.tolist() == logits[targets >= 0].argmax(1).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_told_from_the_others(bad):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 7] = bad
    scores = Scores(np.zeros(3, np.int64), n_likeliest=2)
    scores.add(logits, np.arange(3), 0)
    assert scores.finite.tolist() == [True, False, True]
    assert not scores.are_finite
