"""Layers with a window: their pools hold what lanes still see, and nothing depends on that."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlayer
from jlayer import AutoModel
from jlayer.engine.pool import NO_PLACE, Pool, Table
from jlayer.families.registry import windows_of
from jlayer.plan.shapes import PoolSizes, RunShape
from tests.engine.lanes import GREEDY
from tests.reference.dense_forms import save

WINDOW = 6  # of the tiny models
RNG = np.random.default_rng(3)
PROMPT = RNG.integers(3, 133, 90).tolist()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny Gemma 3, of whose layers two have a window."""
    return save(tmp_path_factory.mktemp("gemma") / "source", "gemma3")


def opened(folder, **options):
    return AutoModel.from_pretrained(folder, device="cpu", **options)


acts = st.lists(
    st.tuples(
        st.sampled_from(["write", "fail", "share", "cut", "close"]), *[st.integers(0, 9)] * 3
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
        if act == "write" and pool.n_free >= number:
            table.append(pool.take(number))
        elif act == "fail" and pool.n_free >= number:
            pool.release(pool.take(number))
        elif act == "share" and not len(table) and pool.holds(source.rows[:number]):
            pool.share(source.rows[:number])
            table.append(source.rows[:number].copy())
        elif act == "cut":
            table.cut(0 if number < 5 else len(table))
        elif act == "close":
            table.cut(0)
        for each in tables:
            seen = window.places[each.rows[max(0, len(each) - window.n_behind) :]]
            assert NO_PLACE not in seen
            assert len(set(seen.tolist())) == len(seen)
        held = window.places[window.places != NO_PLACE]
        assert len(set(held.tolist())) == len(held) <= window.n_rows
    for table in tables:
        table.close()
    assert (window.places == NO_PLACE).all()


def test_a_long_text_takes_no_more_of_a_window_than_it_sees(gemma):
    shape = RunShape(longest=16, context=500)
    with opened(gemma, context=500) as model:
        (size,) = windows_of(model.engine.cfg)
        forward = model.engine.start(shape)
        for at in range(0, 80, 16):
            forward.sweep([PROMPT[at : at + 16]], [at])
        kinds = model.engine.sweeper.programs.cfg.layer_types
        rows = [cache.k.shape[0] for cache in model.engine.caches.layers]
        assert size == WINDOW
        assert [row == 64 for row in rows] == [kind == "sliding_attention" for kind in kinds]
        assert min(rows[2:]) >= 500
        assert model.engine.caches.n_bytes == forward.plan.device.cache_bytes


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_many_lanes_far_beyond_the_window_are_what_each_is_alone(gemma, speculate):
    """Prompts that begin alike share entries; guesses ride or not."""
    prompts = [PROMPT, PROMPT[:70], [*PROMPT[:40], *PROMPT[:9]], PROMPT[:3]]
    options = {**GREEDY, "max_new_tokens": 40, "eos_token_id": None}
    with opened(gemma) as model:
        alone = [
            jlayer.generate(model, prompt, speculate="off", **options).token_ids
            for prompt in prompts
        ]
        more = {} if speculate == "off" else {"draft_tokens": 7}
        beside = jlayer.generate(model, prompts, speculate=speculate, **more, **options)
    assert [one.token_ids for one in beside] == alone
    if speculate == "lookup":
        assert beside[0].stats["drafted"]


def test_sequences_of_one_prompt_begin_where_it_ends_however_late(gemma):
    options = {"max_new_tokens": 30, "seed": 4, "temperature": 0.9, "eos_token_id": None}
    with opened(gemma) as model:
        together = model.generate([PROMPT], do_sample=True, num_return_sequences=3, **options)
        again = model.generate([PROMPT], do_sample=True, num_return_sequences=3, **options)
    assert together == again
    assert len({tuple(row) for row in together}) == 3


def test_a_run_does_not_go_back_to_what_a_window_has_passed(gemma):
    with opened(gemma) as model:
        forward = model.engine.start(RunShape(longest=16, context=200, all_logits=True))
        first = forward.sweep([PROMPT[:40]], [0], all_logits=True)
        forward.sweep([PROMPT[40:60]], [40])
        with pytest.raises(jlayer.errors.StorageError, match="first token"):
            forward.sweep([PROMPT[30:40]], [30])
        again = forward.sweep([PROMPT[:40]], [0], all_logits=True)
    np.testing.assert_array_equal(again, first)
