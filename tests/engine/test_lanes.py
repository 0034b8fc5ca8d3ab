"""Lanes in shared passes: in any order, with prefixes in common, as trees, beside how many others
ever, each gets what it gets alone. What fails between them is in `test_lanes_faults`, threads in
`test_lanes_threads`."""

import gc
import threading
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlayer
from jlayer import DoesNotFitError
from jlayer.engine.batch import Entry, arrange, lineage
from jlayer.engine.report import anonymous_bytes
from jlayer.plan.shapes import RunShape
from tests.engine.lanes import GREEDY, PROMPT, Run, alone, check_rows, limited
from tests.engine.test_engine import opened
from tests.engine.test_submit import is_idle

pytestmark = pytest.mark.usefixtures("all_shapes")

SAMPLED = {"temperature": 0.9, "seed": 4}


@pytest.fixture(scope="module")
def tiny_model(tiny):
    with opened(tiny) as model:
        yield model


@pytest.fixture(scope="module")
def fable_model(fable):
    with opened(fable) as model:
        yield model


# Any order

PROMPTS = [[5], PROMPT[:16], PROMPT[:17], PROMPT, [*PROMPT[:20], 3, 3], [*PROMPT, 9, 8], [4] * 70]
OPTIONS = [
    GREEDY,
    SAMPLED,
    {"temperature": 0.7, "repetition_penalty": 1.4, "seed": 2},
    {**SAMPLED, "num_return_sequences": 3},
    {**SAMPLED, "eos_token_id": list(range(10, 90, 9))},
    {**SAMPLED, "stop": ["e", "th"]},
]
KINDS = ["generate", "batch", "stream", "submit", "next", "cancel", "drop", "result"]
calls = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, len(OPTIONS) - 1),
    st.integers(1, 7),
)


class Orders:
    """Calls in any order on one model; what each must give is computed once, alone."""

    def __init__(self, model):
        self.model, self.known = model, {}
        self.options = OPTIONS if model.text else OPTIONS[:-1]

    def want(self, prompt, option, n_new):
        key = (prompt, option, n_new)
        if key not in self.known:
            self.known[key] = self.generated(PROMPTS[prompt], option, n_new)
        return self.known[key]

    def generated(self, prompt, option, n_new):
        options = {"max_new_tokens": n_new, **self.options[option]}
        found = jlayer.generate(self.model, prompt, **options)
        found = found if isinstance(found, list) else [found]
        return [(one.token_ids, one.text, one.finish_reason) for one in found]

    def run(self, calls):
        model = self.model
        calls = [(k, p, o % len(self.options), n) for k, p, o, n in calls]
        wants = [self.want(*rest) for _, *rest in calls]
        live = []  # (stream or handle, the Steps so far, what it must give)
        for (kind, prompt, option, n_new), want in zip(calls, wants, strict=True):
            options = {"max_new_tokens": n_new, **self.options[option]}
            if kind == "generate" or (kind in ("stream", "submit") and len(want) > 1):
                assert self.generated(PROMPTS[prompt], option, n_new) == want
            elif kind == "batch":
                found = self.generated([PROMPTS[prompt], PROMPTS[prompt]], option, n_new)
                assert found == want * 2
            elif kind == "stream":
                live.append((jlayer.stream(model, PROMPTS[prompt], **options), [], want[0]))
            elif kind == "submit":
                live.append((model.submit(PROMPTS[prompt], **options), [], want[0]))
            elif live:
                one, steps, must = live[n_new % len(live)]
                if kind == "next":
                    steps += [step for step in [next(one, None)] if step]
                elif kind == "drop" or not hasattr(one, "cancel"):
                    live.remove((one, steps, must))
                elif kind == "cancel":
                    one.cancel()
                    found = one.result(timeout=60)
                    assert found.token_ids == must[0][: len(found.token_ids)]
                    live.remove((one, steps, must))
                else:
                    found = one.result(timeout=60)
                    assert (found.token_ids, found.text, found.finish_reason) == must
        while live:
            one, steps, (tokens, text, reason) = live.pop()
            steps += one
            assert [token for step in steps for token in step.token_ids] == tokens
            assert "".join(step.text for step in steps) == text
            assert steps[-1].finish_reason == reason
        one = steps = None
        gc.collect()
        assert is_idle(model)


@pytest.fixture(
    scope="module", params=[pytest.param("tiny_model", marks=pytest.mark.slow), "fable_model"]
)
def orders(request):
    return Orders(request.getfixturevalue(request.param))


@pytest.mark.slow
@settings(max_examples=5, derandomize=True)
@given(st.lists(calls, min_size=3, max_size=9))
def test_in_any_order_each_is_what_it_is_alone(orders, calls):
    orders.run(calls)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(calls, min_size=3, max_size=16))
def test_in_any_order_each_is_what_it_is_alone_a_longer_campaign(orders, calls):
    orders.run(calls)


# Prefixes

LENGTHS = [14, 15, 16, 17, 18, 33, 40]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("arriving", ["together", "one by one", "source leaves"])
def test_prefixes_in_common_change_no_token(tiny_model, rows, arriving):
    """Of all lengths around that from which lanes share, within a few rows a pass too."""
    model, options = tiny_model, {"max_new_tokens": 3, **SAMPLED}
    prompts = [[*PROMPT[:n], 3 + n] for n in LENGTHS] + [PROMPT[:n] for n in LENGTHS]
    want = [alone(model, prompt, **options) for prompt in prompts]

    def go():
        source = Run(model, PROMPT, max_new_tokens=9, **GREEDY)
        if arriving != "together":
            source.advance()
        runs = []
        for number, prompt in enumerate(prompts):
            runs.append(Run(model, prompt, **options))
            if arriving == "one by one":
                source.scheduler.advance([source.lanes[0]], once=True)
                for run in (source, *runs):
                    run.take()
            if arriving == "source leaves" and number == 3:
                source.close()
        while any(run.lanes[0].is_alive for run in runs):
            check_rows(model, source, *runs)
            before = model.engine.scheduler.n_passes
            source.scheduler.advance([run.lanes[0] for run in runs], once=True)
            for run in runs:
                run.take()
            assert model.engine.scheduler.n_passes > before
        found = [run.lanes[0].token_ids for run in runs]
        for run in (source, *runs):
            run.close()
        return found

    with limited(model, rows=rows) if rows else nullcontext():
        assert go() == want
    assert is_idle(model)


@pytest.mark.parametrize("rows", [None, 8])
def test_sequences_of_a_prompt_are_within_their_promise_after_pools_are_lost(tiny_model, rows):
    model = tiny_model
    options = {"max_new_tokens": 6, "num_return_sequences": 4, **SAMPLED}
    want = [one.token_ids for one in jlayer.generate(model, PROMPT, **options)]

    def go():
        run = Run(model, PROMPT, **options)
        entries = run.decoding.plan.load.entries
        while any(lane.is_alive for lane in run.lanes):
            run.advance()
            listed = np.concatenate([lane.table.rows for lane in run.lanes])
            assert len(np.unique(listed)) <= entries < len(PROMPT) * 2
            if model.engine.scheduler.n_passes % 3 == 0:
                with model.engine.turn():
                    for leaf in jax.tree.leaves(model.engine.caches.layers):
                        leaf.delete()
                    model.engine.caches.give_up()
        found = [lane.token_ids for lane in run.lanes]
        run.close()
        return found

    with limited(model, rows=rows) if rows else nullcontext():
        assert go() == want


# Trees


def logits_of(model, table, entries):
    """The logits of all rows of one pass, in the order of the entries."""
    engine = model.engine
    with engine.turn() as executor:
        parts = arrange(entries, pool=engine.caches.pool.n_rows, most=engine.plan.chunk)
        found = np.zeros((sum(entry.wanted for entry in entries), engine.cfg.vocab_size))

        def take(output, places, row):
            found[places, row : row + output.shape[1]] = output

        engine.sweeper.run(executor, parts, take)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n_trunk", [0, 1, 5, 600])
def test_a_tree_is_its_branches_one_by_one(tmp_path_factory, fable, n_trunk):
    """Behind committed tokens, and with a trunk that fills chunks before the first branch."""
    context, rng = 1024, np.random.default_rng(n_trunk)
    below = [-1, 0, 0, 1, 1, 2, -1, 6]
    parents = [*range(-1, n_trunk - 1), *(n_trunk + p if p >= 0 else n_trunk - 1 for p in below)]
    tokens = rng.integers(3, 200, len(parents)).tolist()
    _, ancestors = lineage(parents)
    with opened(fable) as model:
        ticket = model.engine.admit(RunShape(2, 640, context))
        table, pool = ticket.table(), model.engine.caches.pool
        table.append(pool.take(9))
        first = rng.integers(3, 200, 9).tolist()
        none = np.zeros(0, np.int32)
        logits_of(model, table, [Entry(first, none, table.rows, context)])

        def entry(tokens, parents=None):
            new = pool.take(len(tokens))
            pool.release(new)  # the next pass may write there again
            return Entry(tokens, table.rows, new, context, len(tokens), parents)

        found = logits_of(model, table, [entry(tokens, tuple(parents))])
        leaves = sorted(set(range(len(parents))) - set(parents))
        assert len(leaves) == 4
        for leaf in leaves:
            branch = np.flatnonzero(ancestors[leaf])
            chain = logits_of(model, table, [entry([tokens[row] for row in branch])])
            np.testing.assert_allclose(found[branch], chain, rtol=0, atol=2e-4)
        ticket.close()


# Limits


@pytest.mark.parametrize("rows", [2, 8])
def test_no_lane_waits_longer_than_its_turn(tiny_model, rows):
    model, n_lanes = tiny_model, 19
    with limited(model, rows=rows):
        runs = [Run(model, [3 + n], max_new_tokens=12, **GREEDY) for n in range(n_lanes)]
        waited, before = [0] * n_lanes, [0] * n_lanes
        while any(run.lanes[0].is_alive for run in runs):
            runs[0].scheduler.advance([run.lanes[0] for run in runs], once=True)
            for number, run in enumerate(runs):
                run.take()
                now = len(run.lanes[0].token_ids)
                stands = now == before[number] and run.lanes[0].is_alive
                waited[number], before[number] = (waited[number] + 1 if stands else 0), now
                assert waited[number] <= -(-n_lanes // rows) + 1
        for run in runs:
            run.close()


def test_prompts_ride_along_in_portions(tiny_model):
    """However long a prompt is, those that decode get a token in every pass."""
    model = tiny_model
    decodes = Run(model, [3], max_new_tokens=60, **GREEDY)
    prompt = Run(model, [4] * 200, max_new_tokens=2, **GREEDY)
    with limited(model, rows=136, chunk=64):
        n_before = []
        decodes.advance()
        while not prompt.lanes[0].token_ids:
            n_before.append(len(prompt.lanes[0].table))
            n_tokens = len(decodes.lanes[0].token_ids)
            decodes.advance()
            assert len(decodes.lanes[0].token_ids) == n_tokens + 1
        gained = np.diff(n_before)
        assert gained.max() <= 136 - 2  # what a pass has memory for, beside a chunk of next tokens
        assert gained.min() > 0
    decodes.close(), prompt.close()


@pytest.mark.slow
def test_every_budget_in_which_a_run_fits_has_room_for_lists_of_it(fable):
    """Down to the smallest: what does not fit at once comes in portions."""
    prompts = [[*PROMPT[:20], n] for n in range(3, 7)]
    options = {"max_new_tokens": 40, **SAMPLED}
    with opened(fable) as model:
        want = [alone(model, prompt, **options) for prompt in prompts]
    n_fit = 0
    for budget in range(24, 57, 8):
        try:
            with opened(fable, device_memory=budget << 17) as model:
                handles = [model.submit(prompt, **options) for prompt in prompts]
                found = [one.token_ids for one in jlayer.generate(model, prompts, **options)]
                assert [handle.result(timeout=60).token_ids for handle in handles] == want
                assert found == want
                assert model.engine.memory()["device_peak_bytes"] <= budget << 17
                n_fit += 1
        except DoesNotFitError:
            assert n_fit == 0, "a larger budget holds what a smaller one did"
    assert n_fit >= 2


@pytest.mark.slow
def test_thousands_of_requests_leave_nothing(tiny_model):
    model, n_requests = tiny_model, 10_000
    seen = []
    for number in range(n_requests):
        prompt = [3 + number % 100, *PROMPT[: number % 20]]
        if number % 2:
            jlayer.generate(model, prompt, max_new_tokens=1, **GREEDY)
        else:
            model.submit(prompt, max_new_tokens=1, **GREEDY).result(timeout=60)
        if number % 1000 == 999:
            gc.collect()
            assert is_idle(model)
            seen.append((len(jax.live_arrays()), threading.active_count(), anonymous_bytes()))
    arrays, threads, n_bytes = (np.array(column) for column in zip(*seen, strict=True))
    assert arrays[-1] <= arrays[2]
    assert threads[-1] <= threads[2] + 1
    assert n_bytes[-1] - n_bytes[2] < 8 << 20
