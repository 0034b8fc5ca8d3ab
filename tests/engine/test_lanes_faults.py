"""Lanes beside others that pause, fail, are interrupted or lose their entries: each still gets the
tokens that it gets alone."""

from contextlib import suppress

import jax
import numpy as np
import pytest

import jlayer
from jlayer import StorageError
from jlayer.engine import scheduler
from tests.engine.lanes import (
    GREEDY,
    PROMPT,
    Run,
    alone,
    check_rows,
    limited,
    loses_pools,
    raises_at,
    watched,
    within,
)
from tests.engine.test_engine import opened
from tests.streaming.conftest import set_tile_bytes

pytestmark = pytest.mark.usefixtures("all_shapes")


@pytest.fixture(scope="module")
def model(tiny):
    with opened(tiny) as model:
        yield model
        assert model.engine.n_alive == 0


def test_a_text_that_begins_as_a_paused_stream_does_not_wait_for_it(model):
    """It waited for the stream's next token, which nobody asked for."""
    longer = PROMPT + alone(model, PROMPT, max_new_tokens=5, **GREEDY)
    want = alone(model, longer, max_new_tokens=3, **GREEDY)
    stream = jlayer.stream(model, PROMPT, max_new_tokens=5, **GREEDY)
    next(stream)
    alone(model, [3], max_new_tokens=1, beside=1, **GREEDY)  # it rides along, and is one ahead
    found = within(30, lambda: jlayer.generate(model, longer, max_new_tokens=3, **GREEDY))
    stream.close()
    assert found.token_ids == want


@pytest.mark.slow
def test_an_entry_that_another_lane_writes_in_this_pass_is_written_before(model):
    """All three begin alike. After the pools were lost, the second lists entries of the first and
    the third those of the second, which the first writes in the same pass."""
    options = {"max_new_tokens": 12, **GREEDY}
    prompts = [[*PROMPT[:30], 3, 5], [*PROMPT, 60], PROMPT[:20] + [4] * 90]
    want = [alone(model, prompt, **options) for prompt in prompts]
    middle, first, last = runs = [Run(model, prompt, **options) for prompt in prompts]
    wide = Run(model, [2] * 400, **options)  # the rows of a pass have room for all of them
    first.advance()
    first.lanes[0].unread.append(None)  # it does not ride in the next pass: it is the oldest then
    middle.take(), last.take(), wide.take()
    last.advance()
    for run in runs:
        run.take()
    assert first.lanes[0].last_pass < middle.lanes[0].last_pass
    with model.engine.turn():
        loses_pools(model)
        model.engine.caches.give_up()
    assert not any(len(run.lanes[0].table) for run in runs)
    found = [run.tokens()[0] for run in runs]
    check_rows(model, *runs, wide)
    for run in (*runs, wide):
        run.close()
    assert found == want


def test_a_pass_keeps_to_the_rows_of_its_plan(model, monkeypatch):
    """Prompts that each begin as another, one token longer, are written one after another: chunks
    of a single row, which are padded."""
    rows, arranged = [], scheduler.arrange

    def counted(entries, **limits):
        parts = arranged(entries, **limits)
        rows.append((sum(part.size.rows for part in parts), limits["n_rows"]))
        return parts

    prompts = [PROMPT[: 17 + n] for n in range(16)]
    want = [alone(model, prompt, max_new_tokens=2, **GREEDY) for prompt in prompts]
    monkeypatch.setattr(scheduler, "arrange", counted)
    runs = [Run(model, prompt, max_new_tokens=2, **GREEDY) for prompt in prompts]
    found = [run.tokens()[0] for run in runs]
    for run in runs:
        run.close()
    assert found == want
    assert all(n_rows <= limit for n_rows, limit in rows), rows


@pytest.mark.slow
def test_sequences_of_a_prompt_share_among_themselves_first(model):
    """Another run drew just this prompt while the first of them was on its way through it. Its
    entries are not in what was promised to them, once it has ended."""
    drawn = PROMPT[:20] + alone(model, PROMPT[:20], max_new_tokens=200, **GREEDY)
    prompt, n_rows = drawn[:120], 2
    want = alone(model, prompt, max_new_tokens=4, **GREEDY)
    options = {"num_return_sequences": 2, "max_new_tokens": 4, "top_k": 1, "do_sample": True}
    other = Run(model, PROMPT[:20], max_new_tokens=200, **GREEDY)
    other.advance()
    with limited(model, rows=n_rows):
        both = Run(model, prompt, **options)
        entries = both.decoding.plan.load.entries - 220
        while not both.lanes[0].token_ids:
            other.advance()
        found = both.tokens()
    listed = np.unique(np.concatenate([lane.table.rows for lane in both.lanes]))
    other.close(), both.close()
    assert found == [want] * 2
    assert len(listed) <= entries


@pytest.mark.slow
def test_a_prompt_that_waits_begins_once_there_is_room(fable, room_for):
    """It waited until no other run could ride: with others that come and go, for ever. Here the
    first text of a list is ended, and makes room for the second."""
    with opened(fable, **room_for(3, 252)) as model:
        options = {"max_new_tokens": 250, **GREEDY}
        held, _ = model.decoding([5, 9], options=options)  # it holds room, and does not ride
        begin, _ = model.prepared([7, 9], options=options)
        long = begin(most_unread=None)  # it rides in every pass
        model.engine.scheduler.join(long.lanes)
        generated, _ = model.decoding([[50, 9], [60, 9]], options=options)
        steps = iter(generated)
        next(steps)
        generated.lanes[0].interrupt()
        assert generated.is_waiting
        within(60, lambda: next(steps))
        assert not generated.is_waiting
        assert long.lanes[0].is_alive
        long.close()
        held.close()
        steps.close()


@pytest.fixture
def bad_token(model, monkeypatch):
    """A token whose row of the embedding is damaged."""
    read = model.engine.embedding.read

    def damaged(ids):
        return {
            name: np.where((ids == 99)[:, None], np.nan, rows).astype(rows.dtype)
            for name, rows in read(ids).items()
        }

    monkeypatch.setattr(model.engine.embedding, "read", damaged)
    return 99


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_a_lane_without_numbers_fails_alone(model, bad_token, first):
    """Its entries, and rows of padding that have its token, are seen with a weight of 0."""
    prompts = [PROMPT[:5], PROMPT[:7] + [98] * 30]
    want = [alone(model, prompt, max_new_tokens=4, **GREEDY) for prompt in prompts]
    bad = Run(model, [bad_token, 3, 4], max_new_tokens=4, **GREEDY) if first else None
    runs = [Run(model, prompt, max_new_tokens=4, **GREEDY) for prompt in prompts]
    bad = bad or Run(model, [bad_token, 3, 4], max_new_tokens=4, **GREEDY)
    bad.advance()
    assert "not finite" in str(bad.lanes[0].error)
    found = [run.tokens()[0] for run in runs]
    bad.close()  # others take its rows of the pool
    later = [alone(model, p, max_new_tokens=4, beside=2, **GREEDY) for p in prompts]
    for run in runs:
        run.close()
    assert found == later == want


def test_an_interrupt_of_the_search_for_what_is_not_finite_changes_nothing(model, bad_token):
    """The others had got their entries, but never a token: they waited for ever."""
    want = alone(model, PROMPT[:9], max_new_tokens=4, **GREEDY)
    good = Run(model, PROMPT[:9], max_new_tokens=4, **GREEDY)
    bad = Run(model, [bad_token], max_new_tokens=4, **GREEDY)
    before = model.engine.totals.sweeps

    def on_step(*_):
        if model.engine.totals.sweeps == before + 1:
            raise KeyboardInterrupt

    with watched(model, on_step), pytest.raises(KeyboardInterrupt):
        good.advance()
    check_rows(model, good, bad)
    assert not good.lanes[0].table.rows.size
    found = within(30, good.tokens)
    assert bad.lanes[0].error
    good.close(), bad.close()
    assert found == [want]


def test_an_interrupt_after_the_tokens_are_drawn_changes_nothing(model, monkeypatch):
    """It left the entries of the pass to nobody."""
    want = alone(model, PROMPT[:9], max_new_tokens=4, **GREEDY)
    run = Run(model, PROMPT[:9], max_new_tokens=4, **GREEDY)

    def note_peaks():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.engine, "note_peaks", note_peaks)
        with pytest.raises(KeyboardInterrupt):
            run.advance()
    check_rows(model, run)
    assert not run.lanes[0].table.rows.size
    assert within(30, run.tokens) == [want]
    run.close()


SAMPLED = {"max_new_tokens": 3, "temperature": 0.9, "seed": 5}
SOME = [PROMPT, [*PROMPT[:30], 3], [4, 4]]


@pytest.fixture
def small_tiles(tiny, monkeypatch):
    """A model of many tiles, all of which are read in every pass; (it, what SOME give alone)."""
    set_tile_bytes(monkeypatch, 6_000)
    with opened(tiny, keeps_layers=False) as model:
        yield model, [alone(model, prompt, **SAMPLED) for prompt in SOME]
        assert model.engine.n_alive == 0
        assert model.engine.caches.n_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1], ids=["of prompts", "of next tokens"])
def test_an_interrupt_at_any_step_of_a_pass_changes_nothing(small_tiles, after):
    model, want = small_tiles
    number = n_stopped = 0
    while n_stopped == number:
        runs = [Run(model, prompt, **SAMPLED) for prompt in SOME]
        for _ in range(after):
            runs[0].advance()
            runs[1].take(), runs[2].take()
        before = [(lane.table.rows.tolist(), lane.token_ids) for run in runs for lane in run.lanes]
        with raises_at(model, number, KeyboardInterrupt()) as raised, suppress(KeyboardInterrupt):
            runs[number % 3].advance()
        if raised:
            n_stopped += 1
            assert before == [
                (lane.table.rows.tolist(), lane.token_ids) for run in runs for lane in run.lanes
            ]
        number += 1
        check_rows(model, *runs)
        assert [run.tokens()[0] for run in runs] == want
        check_rows(model, *runs)
        for run in runs:
            run.close()
    assert n_stopped > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reader", "lost", "poisoned"])
def test_lanes_go_on_after_an_error_in_a_pass(small_tiles, monkeypatch, kind):
    """Of the disk; or of the device, when the memory of pools that were to be reused is gone, or
    holds what a program left there that failed."""
    model, want = small_tiles
    runs = [Run(model, prompt, **SAMPLED) for prompt in SOME]
    runs[0].advance()
    other = Run(model, [9, 9], max_new_tokens=3, **GREEDY)

    def on_step(number, step, tile):
        if number < 20:
            return
        if kind == "reader":
            raise StorageError("layer 1: could not be read")
        if kind == "poisoned":
            model.engine.caches.layers[1] = [Poisoned()]
            raise StorageError("layer 1: the device failed")
        raise StorageError(str(loses_pools(model)))

    with watched(model, on_step), pytest.raises(StorageError):
        other.advance()
    check_rows(model, *runs, other)
    assert kind == "reader" or not any(len(run.lanes[0].table) for run in runs)
    other.close()
    for run in runs:
        run.take()
    assert [run.tokens()[0] for run in runs] == want
    for run in runs:
        run.close()


class Poisoned:
    """An array of a program that failed: whoever waits for it gets the error."""

    nbytes = 0

    def is_deleted(self):
        return False

    def block_until_ready(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: the program failed")


@pytest.mark.slow
def test_pools_that_cannot_grow_are_lost_and_the_lanes_go_on(small_tiles, monkeypatch):
    """The device refuses in the middle: some layers have grown, and one is neither."""
    model, want = small_tiles
    runs = [Run(model, prompt, **SAMPLED) for prompt in SOME]
    runs[0].advance()
    programs, calls = model.engine.programs, []
    grown = programs.pools.grown

    def refused(kind, **sizes):
        def grow(cache):
            calls.append(1)
            if len(calls) == 2:
                jax.tree.map(lambda leaf: leaf.delete(), cache)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return grown(kind, **sizes)(cache)

        return grow

    monkeypatch.setattr(programs.pools, "grown", refused)
    other = Run(model, [9, 9], max_new_tokens=300, **GREEDY)
    with pytest.raises(StorageError, match="cache"):
        other.advance()
    assert len(calls) == 2
    check_rows(model, *runs, other)
    other.close()
    for run in runs:
        run.take()
    assert [run.tokens()[0] for run in runs] == want
    for run in runs:
        run.close()
