"""Prompts that begin alike share entries, and no more are planned than they take."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlayer
from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.shaping import shape_of
from tests.engine.lanes import GREEDY, PROMPT, Run, check_rows, limited
from tests.engine.test_engine import opened

STEMS = [PROMPT, [*PROMPT[:20], *range(60, 90)], [*PROMPT[:30], *range(90, 110)]]
PLAIN = {**GREEDY, "eos_token_id": None, "speculate": "off"}


@pytest.fixture(scope="module")
def model(tiny):
    with opened(tiny) as found:
        yield found


prompts = st.lists(
    st.builds(
        lambda stem, count, rest: [*STEMS[stem][:count], *rest],
        st.integers(0, 2),
        st.integers(1, 40),
        st.lists(st.integers(3, 120), max_size=3),
    ),
    min_size=2,
    max_size=7,
)
FORMS = [
    {"max_new_tokens": 0, "prompt_logprobs": 0},
    {"max_new_tokens": 0, "prompt_logprobs": 0, "prompt_logprobs_from": 25},
    {"max_new_tokens": 2},
    {"max_new_tokens": 2, "num_return_sequences": 3, "top_k": 3, "do_sample": True, "seed": 1},
]


def check(model, prompts, form, *, is_sorted, rows):
    prompts = sorted(prompts) if is_sorted else prompts
    options = {**PLAIN, **form}
    if form.get("do_sample"):
        options.pop("temperature")
    with limited(model, rows=rows), closing(Run(model, prompts, **options)) as run:
        sampling = model.sampling_options(options)
        rows_given = [Row(ids, ids) for ids in prompts]
        limits = [form["max_new_tokens"]] * len(prompts)
        shape = shape_of(model.config, rows_given, limits, sampling)
        assert run.decoding.plan.load.entries == shape.entries
        most = 0
        while any(lane.is_alive for lane in run.lanes):
            run.scheduler.advance(run.lanes, once=True)
            run.take()
            check_rows(model, run)
            listed = np.concatenate([lane.table.rows for lane in run.lanes])
            most = max(most, len(np.unique(listed)))
        tokens = [lane.token_ids for lane in run.lanes]
    assert most <= shape.entries
    return tokens, shape


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_more_entries_are_taken_than_planned(model, form):
    """Also within a few rows a pass, where those that begin alike wait for each other."""
    prompts = [PROMPT[:33], [*PROMPT[:25], 7, 7], PROMPT[:25], PROMPT[:5], [*STEMS[1][:40], 3]]
    check(model, prompts, form, is_sorted=False, rows=8)


@pytest.mark.slow
@settings(max_examples=100)
@given(prompts, st.sampled_from(FORMS), st.booleans(), st.sampled_from([8, 512]))
def test_no_more_entries_are_taken_than_planned_a_longer_campaign(
    model, prompts, form, is_sorted, rows
):
    check(model, prompts, form, is_sorted=is_sorted, rows=rows)


def test_examples_before_questions_are_planned_once(model):
    shots = PROMPT[:30]
    questions = [[*shots, *range(50 + 5 * n, 58 + 5 * n)] for n in range(6)]
    want = [jlayer.generate(model, one, max_new_tokens=2, **PLAIN).token_ids for one in questions]
    tokens, shape = check(model, questions, FORMS[2], is_sorted=True, rows=512)
    assert tokens == want
    assert shape.entries == 30 + 6 * (8 + 2)
    answers = [[*questions[0], 7], [*questions[0], 9, 9], [*questions[1], 7], [*questions[1], 5]]
    form = {"max_new_tokens": 0, "prompt_logprobs": 0, "prompt_logprobs_from": 38}
    _, shape = check(model, answers, form, is_sorted=False, rows=512)
    # The last question's token is where the first answer's logits come from: each computes it.
    assert shape.entries == 37 + 1 + 2 + 7 + 1 + 1
    assert shape.rides >= 37 + 1 + 2 + 7 + 1 + 1


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma3"])
def test_states_and_windows_share_nothing_that_a_plan_could_count_on(kind):
    from jlayer.config import model_config
    from tests.reference.dense_forms import DENSE

    raw = {**DENSE[kind].config, "model_type": DENSE[kind].model_type}
    cfg = model_config(raw, where=kind)
    rows = [Row([*PROMPT[:n]], [*PROMPT[:n]]) for n in (30, 40)]
    shape = shape_of(cfg, rows, [0, 0], SamplingOptions(max_new_tokens=0, prompt_logprobs=0))
    assert shape.entries == 29 + 39
