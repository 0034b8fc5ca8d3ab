"""Guesses for several lanes, beside prompts of any length, to the ends of contexts: each text is
what plain decoding gives it alone."""

from contextlib import nullcontext

import numpy as np
import pytest

import jlayer
from tests.engine.guesses import PROMPT, Made, Plain, is_whole, noisy_copy, tiny_pair
from tests.engine.guessing.test_speculation import chain, hidden
from tests.engine.lanes import Run, check_rows, limited
from tests.engine.test_engine import opened
from tests.tiny import tiny_llama

SEED = {"seed": 5}


# Several lanes

PROMPTS = [[5], PROMPT[:16], PROMPT[:17], PROMPT, [*PROMPT[:18], 3, 3]]


def slow(value):
    """A parameter that compiles for itself, much like one beside it."""
    return [pytest.param(value, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*slow("draft"), "auto"])
def test_prompts_together_are_what_each_is_alone(model, plain, mode):
    options = {"max_new_tokens": 16, "temperature": 0.7, **SEED}
    want = [plain.generations(prompt, **options)[0].token_ids for prompt in PROMPTS]
    found = jlayer.generate(model, PROMPTS, speculate=mode, draft_tokens=3, **options)
    assert [one.token_ids for one in found] == want
    assert found[0].stats["sweeps"] < 16
    assert is_whole(model)


@pytest.mark.slow
def test_sequences_of_a_prompt_are_what_they_are_without_guesses(model, plain):
    for n_prompt in (1, 17):
        options = {"max_new_tokens": 12, "temperature": 1, "num_return_sequences": 3, **SEED}
        found = plain.check(PROMPT[:n_prompt], speculate="auto", draft_tokens=3, **options)
        assert len({tuple(one.token_ids) for one in found}) == 3
    assert is_whole(model)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 16])
def test_lanes_that_join_and_leave_change_no_token(model, plain, rows):
    """Some guess, one does not; with few rows to share too."""
    kinds = [
        {"temperature": 0, "speculate": "auto", "draft_tokens": 7},
        {"temperature": 0.7, "speculate": "draft", "draft_tokens": 3},
        {"temperature": 1, "speculate": "off"},
        {"temperature": 1, "speculate": "lookup", "draft_tokens": 7},
    ]

    def own(number):
        return {"max_new_tokens": 10 + number, **SEED, **kinds[number % 4]}

    def plainly(number):
        options = {k: v for k, v in own(number).items() if k not in ("speculate", "draft_tokens")}
        return plain.generations(PROMPTS[number % 5], **options)[0].token_ids

    wants = [plainly(number) for number in range(8)]
    with limited(model, rows=rows) if rows else nullcontext():
        runs, n_begun = [], 0
        while n_begun < 8 or any(run.lanes[0].is_alive for run in runs):
            if n_begun < 8:
                runs.append(Run(model, PROMPTS[n_begun % 5], **own(n_begun)))
                n_begun += 1
            if n_begun == 5:
                runs[2].close()  # leaves in the middle
                runs = [run for run in runs if run is not runs[2]]
                wants.pop(2)
            alive = [run for run in runs if run.lanes[0].is_alive]
            alive[-1].scheduler.advance([alive[-1].lanes[0]], once=True)
            for run in runs:
                run.take()
            check_rows(model, *runs)
        found = [run.lanes[0].token_ids for run in runs]
        for run in runs:
            run.close()
    assert found == wants
    assert is_whole(model)


@pytest.mark.slow
def test_handles_from_elsewhere_are_what_each_is_alone(model, plain):
    options = {"max_new_tokens": 12, "temperature": 0.7, **SEED}
    handles = [
        model.submit(prompt, speculate="auto", draft_tokens=3, **options) for prompt in PROMPTS
    ]
    found = [handle.result(timeout=60).token_ids for handle in handles]
    assert found == [plain.generations(p, **options)[0].token_ids for p in PROMPTS]
    steps = [list(handle) for handle in handles]
    assert [[t for s in each for t in s.token_ids] for each in steps] == found


# Chunks and portions


@pytest.mark.parametrize("length", [24, *slow(26), 32, 33, *slow(56), *slow(64)])
def test_a_tree_below_the_last_token_of_a_prompt_of_any_length(model, plain, length):
    """In chunks of 32 rows, in which it has room for all, some or none of it; and in portions."""
    prompt = [3 + n % 120 for n in range(length)]
    options = {"max_new_tokens": 10, "temperature": 0.7, **SEED}
    (want,) = plain.generations(prompt, **options)
    for rows, chunk in ((None, None), (128, 32), (32, 32), (16, 16)):
        with limited(model, rows=rows, chunk=chunk) if rows else nullcontext():
            plain.check(prompt, speculate="draft", draft_tokens=7, **options)
            with pytest.MonkeyPatch.context() as patch:
                made = Made(chain, {tuple(prompt): want.token_ids}).within(model, patch)
                (found,) = plain.check(prompt, speculate="lookup", draft_tokens=7, **options)
                # Beside a prompt that fills its chunk there is none, nor before the last token.
                assert 8 <= sum(made.depths) + len(made.depths) <= 10
                assert max(made.depths) >= 5
                assert found.stats["sweeps"] <= 3 + length // (rows or 64)
    assert is_whole(model)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    with tiny_pair(folder, max_position_embeddings=1024) as model:
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("length", [*slow(504), 513])
def test_a_tree_at_the_end_of_the_largest_chunk(long_model, length):
    plain = Plain(long_model)
    prompt = [3 + n * n % 120 for n in range(length)]
    options = {"max_new_tokens": 8, "temperature": 0.7, **SEED}
    (want,) = plain.generations(prompt, **options)
    with pytest.MonkeyPatch.context() as patch:
        Made(chain, {tuple(prompt): want.token_ids}).within(long_model, patch)
        (found,) = plain.check(prompt, speculate="lookup", draft_tokens=7, **options)
        assert found.stats["sweeps"] <= 2
    plain.check(prompt, speculate="auto", draft_tokens=7, **options)
    assert is_whole(long_model)


# Ends of contexts


@pytest.fixture(scope="module")
def short_draft(tmp_path_factory):
    """A target with 64 positions, and drafts with fewer."""
    folder = tmp_path_factory.mktemp("short")
    return tiny_llama(folder / "source", max_position_embeddings=64, eos_token_id=None), folder


@pytest.mark.parametrize("positions", [20, *slow(21), 33, *slow(64)])
def test_a_draft_whose_context_is_shorter_stops_guessing_there(short_draft, positions):
    source, folder = short_draft
    draft = noisy_copy(source, folder / f"draft {positions}", scale=0.02)
    config = (draft / "config.json").read_text()
    name = '"max_position_embeddings": '
    config = config.replace(f"{name}64", f"{name}{positions}")
    (draft / "config.json").write_text(config)
    with opened(source, draft=draft) as model:
        plain = Plain(model)
        positions_seen = []
        guess = model.engine.draft.guess

        def watched(parts):
            positions_seen.extend(part.rows.positions.max() for part in parts)
            return guess(parts)

        model.engine.draft.guess = watched
        for mode in ("draft", "auto"):
            for temperature in (0, 1):
                options = {"max_new_tokens": 44, "temperature": temperature, **SEED}
                (found,) = plain.check(PROMPT, speculate=mode, draft_tokens=7, **options)
                assert len(found.token_ids) == 44
        assert max(positions_seen, default=0) < positions
        assert bool(positions_seen) == (positions > 20)
        assert is_whole(model)


def test_texts_end_at_the_end_of_the_context(short_draft):
    source, folder = short_draft
    with opened(source, draft=noisy_copy(source, folder / "same"), context=40) as model:
        plain = Plain(model)
        for n_prompt in (20, 37, 38, 39, 40):
            prompt = [3 + n for n in range(n_prompt)]
            for mode in ("draft", "lookup"):
                options = {"max_length": 40, "temperature": 0}
                if n_prompt == 40:
                    options = {"max_new_tokens": 1, "temperature": 0}
                try:
                    (want,) = plain.generations(prompt, **options)
                except jlayer.JlayerError as error:
                    with pytest.raises(type(error)):
                        jlayer.generate(model, prompt, speculate=mode, draft_tokens=7, **options)
                    continue
                (found,) = plain.check(prompt, speculate=mode, draft_tokens=7, **options)
                assert found.finish_reason == want.finish_reason == "length"
                assert len(found.token_ids) == max(40 - n_prompt, 0)
        assert is_whole(model)


# As transformers does


@pytest.mark.reference
def test_padded_rows_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    with tiny_pair(tmp_path, eos_token_id=None, bos_token_id=None) as model:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        ids = torch.tensor([[1, 1, 1, 9, 8, 7], [5, 6, 7, 8, 9, 10], [1, 5, 5, 5, 5, 5]])
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
        for extra in ({}, {"repetition_penalty": 1.3}, {"eos_token_id": [3, 30, 60, 90, 120]}):
            options = {"attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 1, **extra}
            want = theirs.generate(ids, do_sample=False, **options).tolist()
            for mode in ("draft", "lookup"):
                found = model.generate(ids, speculate=mode, draft_tokens=3, **options)
                assert found.tolist() == want


# What was learnt


def test_what_was_learnt_and_answered_before_is_in_no_token(model, plain):
    rng = np.random.default_rng(1)
    for _ in range(12):
        prompt = PROMPTS[rng.integers(5)]
        width = int(rng.choice([3, 7]))
        mode = str(rng.choice(["auto", "draft", "lookup"]))
        temperature = float(rng.choice([0, 0.7, 1]))
        options = {"max_new_tokens": 16, "temperature": temperature, **SEED}
        plain.check(prompt, speculate=mode, draft_tokens=width, **options)
    speculation = model.engine.speculation
    assert len(speculation.others) > 16 * 10
    assert 0.05 < speculation.sharpness < 3
    assert is_whole(model)


@pytest.mark.slow
def test_hidden_trees_of_lanes_of_all_kinds(model, plain, monkeypatch):
    rng = np.random.default_rng(2)
    options = {"max_new_tokens": 12, "temperature": 1, **SEED}
    each = [plain.generations(prompt, **options)[0].token_ids for prompt in PROMPTS]
    wants = dict(zip(map(tuple, PROMPTS), each, strict=True))
    Made(hidden(rng), wants).within(model, monkeypatch)
    for rows in (None, 16, 32):
        with limited(model, rows=rows) if rows else nullcontext():
            found = jlayer.generate(model, PROMPTS, speculate="draft", draft_tokens=7, **options)
            assert [one.token_ids for one in found] == each
    assert is_whole(model)
