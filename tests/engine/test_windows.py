"""Layers with a window, or chunks: their pools hold what lanes still see, and nothing depends on
that."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlayer
from jlayer import AutoModel
from jlayer.engine.pool import NO_PLACE, Pool, Table
from jlayer.families.registry import windows_of
from jlayer.plan.shapes import PoolSizes, RunShape
from tests.campaigns import slow_but
from tests.convert.checkpoints import edit_json
from tests.engine.lanes import GREEDY, Run, check_rows
from tests.reference import dense_forms, mixture_forms

pytestmark = pytest.mark.usefixtures("all_shapes")

WINDOW = 6  # of the tiny models
RNG = np.random.default_rng(3)
PROMPT = RNG.integers(3, 133, 90).tolist()


@pytest.fixture(scope="module", params=slow_but(["gemma3", "llama4"], ("gemma3",)))
def windowed(request, tmp_path_factory):
    """A tiny Gemma 3, of whose layers two have a window; and a Llama 4 with chunks as long."""
    save = {"gemma3": dense_forms, "llama4": mixture_forms}[request.param].save
    folder = save(tmp_path_factory.mktemp("windowed") / "source", request.param)
    edit_json(folder / "config.json", max_position_embeddings=4096)
    return folder


def opened(folder, **options):
    return AutoModel.from_pretrained(folder, device="cpu", **options)


acts = st.lists(
    st.tuples(
        st.sampled_from(["write", "fail", "share", "become", "cut", "close"]),
        *[st.integers(0, 9)] * 3,
    ),
    max_size=40,
)


@given(acts)
def test_what_a_lane_sees_has_a_place_of_its_own(acts):
    """Whatever tables write, share, cut and close: see `Window`."""
    pool = Pool([WINDOW])
    tables = [Table(pool) for _ in range(3)]
    pool.grow(PoolSizes(300, (3 * WINDOW + 10,)))
    (window,) = pool.windows
    for act, one, other, number in acts:
        table, source = tables[one % 3], tables[other % 3]
        pool.keep([each.rows for each in tables])
        # Long ones come in chunks of 4, whose rows take each other's places.
        count = number * (1 + other)
        if act == "write" and pool.n_free >= count:
            table.append(pool.take(count, chunk=4))
        elif act == "fail" and pool.n_free >= count:
            pool.release(pool.take(count, chunk=4))
        elif act == "share" and not len(table) and pool.holds(source.rows[:number]):
            pool.share(source.rows[:number])
            table.append(source.rows[:number].copy())
        elif act == "become" and table is not source:
            table.become(source)
            assert table.rows.tolist() == source.rows.tolist()
        elif act == "cut":
            table.cut(0 if number < 5 else len(table))
        elif act == "close":
            table.cut(0)
        seen = {row for each in tables for row in each.rows[max(0, len(each) - 5) :].tolist()}
        places = window.places[sorted(seen)]
        assert NO_PLACE not in places
        assert len(set(places.tolist())) == len(seen)
        assert all(pool.holds(each.rows) for each in tables)
    for table in tables:
        table.close()
    assert (window.places == NO_PLACE).all()
    assert len(set(window.places[pool.take(window.n_rows)].tolist())) == window.n_rows


def test_a_long_text_takes_no_more_of_a_window_than_it_sees(windowed):
    shape = RunShape(longest=16, context=500)
    with opened(windowed, context=500) as model:
        (size,) = windows_of(model.engine.cfg)
        forward = model.engine.start(shape)
        for at in range(0, 80, 16):
            forward.sweep([PROMPT[at : at + 16]], [at])
        kinds = model.engine.sweeper.programs.cfg.layer_types
        rows = [cache.k.shape[0] for cache in model.engine.caches.layers]
        assert size == WINDOW
        assert [row == 64 for row in rows] == [kind[:4] != "full" for kind in kinds]
        assert max(rows) >= 500
        assert model.engine.caches.n_bytes == forward.plan.device.cache_bytes


@pytest.mark.slow
def test_a_long_prompt_in_one_pass_takes_no_more_of_a_window_than_a_chunk_needs(windowed):
    """Its rows take each other's places, and its logits are those of the same tokens in pieces."""
    prompt = np.resize(PROMPT, 1500).tolist()
    with opened(windowed, context=1600) as model:
        forward = model.engine.start(RunShape(longest=1500, context=1600))
        whole = forward.sweep([prompt], [0])
        plan, caches = model.engine.plan, model.engine.caches
        assert plan.load.n_rows > 2 * plan.chunk  # several chunks
        (n_rows,) = caches.sizes.windows
        assert n_rows < 2 * WINDOW + plan.chunk + 64 < caches.sizes.n_rows
        more = forward.sweep([PROMPT[:20]], [1500])
        for at in range(0, 1500, 100):
            pieces = forward.sweep([prompt[at : at + 100]], [at])
        again = forward.sweep([PROMPT[:20]], [1500])
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_allclose(again, more, rtol=0, atol=1e-5 * np.abs(more).max())


@pytest.mark.slow
@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_many_lanes_far_beyond_the_window_are_what_each_is_alone(windowed, speculate):
    """Prompts that begin alike share entries; guesses ride or not."""
    prompts = [PROMPT, PROMPT[:70], [*PROMPT[:40], *PROMPT[:9]], PROMPT[:3]]
    options = {**GREEDY, "max_new_tokens": 40, "eos_token_id": None}
    with opened(windowed) as model:
        alone = [
            jlayer.generate(model, prompt, speculate="off", **options).token_ids
            for prompt in prompts
        ]
        more = {} if speculate == "off" else {"draft_tokens": 7}
        beside = jlayer.generate(model, prompts, speculate=speculate, **more, **options)
    assert [one.token_ids for one in beside] == alone
    if speculate == "lookup":
        assert beside[0].stats["drafted"]


@pytest.mark.slow
def test_sequences_of_one_prompt_begin_where_it_ends_however_late(windowed):
    options = {"max_new_tokens": 30, "seed": 4, "temperature": 0.9, "eos_token_id": None}
    with opened(windowed) as model:
        together = model.generate([PROMPT], do_sample=True, num_return_sequences=3, **options)
        again = model.generate([PROMPT], do_sample=True, num_return_sequences=3, **options)
    assert together == again
    assert len({tuple(row) for row in together}) == 3


def test_a_run_does_not_go_back_to_what_a_window_has_passed(windowed):
    with opened(windowed) as model:
        forward = model.engine.start(RunShape(longest=16, context=200, all_logits=True))
        first = forward.sweep([PROMPT[:40]], [0], all_logits=True)
        forward.sweep([PROMPT[40:60]], [40])
        with pytest.raises(jlayer.errors.StorageError, match="first token"):
            forward.sweep([PROMPT[30:40]], [30])
        again = forward.sweep([PROMPT[:40]], [0], all_logits=True)
    np.testing.assert_array_equal(again, first)


def test_a_prompt_that_begins_like_one_before_sees_its_window(windowed):
    """Also where the window of the one before has moved on since: what is shared is kept until the
    pass that shares it."""
    other = [*PROMPT[:30], *(3 + token % 100 for token in PROMPT[30:40])]
    options = {**GREEDY, "max_new_tokens": 2, "speculate": "off", "logprobs": 0}
    with opened(windowed) as model:
        want = [one["logprob"] for one in jlayer.generate(model, other, **options).logprobs]
        runs = [Run(model, PROMPT, **options)]
        runs[0].advance()
        runs.append(Run(model, other, **options))
        for run in runs:
            run.tokens()
        found = [choice.logprob for choice in runs[1].lanes[0].choices]
        n_rows = runs[1].decoding.stats.as_dict()["rows"]
        check_rows(model, *runs)
        for run in runs:
            run.close()
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert n_rows < len(other), "what both begin with is computed once"
