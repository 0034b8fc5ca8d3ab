"""Texts that go on by themselves: handles from any thread, which share every forward pass."""

import gc
import threading
import time

import pytest

import jlayer
from jlayer import DoesNotFitError, UsageError
from jlayer.engine import riders
from tests.engine.test_engine import IDS, OPTIONS, PROMPTS, alone, opened


@pytest.fixture(scope="module")
def model(tiny):
    with opened(tiny) as model:
        yield model


@pytest.fixture(scope="module")
def expected(tiny):
    return [alone(tiny, prompt) for prompt in PROMPTS]


def is_idle(model):
    """Whether nothing is left, once the pass under way has ended."""
    engine = model.engine
    engine.scheduler.wait_until(
        lambda: engine.n_alive == 0 and engine.caches.n_bytes == 0, timeout=30
    )
    return True


def tokens_of(handle):
    return [token for step in handle for token in step.token_ids]


def test_a_handle_gives_the_steps_and_the_text_of_generate(model, expected):
    handle = model.submit(PROMPTS[0], **OPTIONS)
    assert tokens_of(handle) == expected[0]
    found = handle.result()
    assert found.token_ids == expected[0]
    assert found.finish_reason == "length"
    assert handle.done
    assert list(handle) == []
    assert is_idle(model)


def test_submitted_texts_share_forward_passes_and_are_what_each_is_alone(model, expected):
    before = model.engine.scheduler.n_passes
    handles = [model.submit(prompt, **OPTIONS) for prompt in PROMPTS for _ in range(5)]
    found = [handle.result().token_ids for handle in handles]
    assert found == [want for want in expected for _ in range(5)]
    assert model.engine.scheduler.n_passes - before < 15 * 8 / 2
    assert max(handle.result().stats["lanes"] for handle in handles) > 5
    assert is_idle(model)


def test_threads_submit_and_one_that_generates_meanwhile_rides_along(model, expected):
    found = {}

    def submits(number):
        found[number] = model.submit(PROMPTS[number], **OPTIONS).result().token_ids

    threads = [threading.Thread(target=submits, args=(n,)) for n in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    mine = jlayer.generate(model, PROMPTS[1], **OPTIONS).token_ids
    for thread in threads:
        thread.join(60)
    assert mine == expected[1]
    assert found == dict(enumerate(expected))


def test_nobody_needs_to_wait_for_it_to_go_on(model, expected):
    handle = model.submit(PROMPTS[2], **OPTIONS)
    ends = time.monotonic() + 60
    while not handle.done and time.monotonic() < ends:
        time.sleep(0.01)
    assert handle.result(timeout=0).token_ids == expected[2]


def test_a_cancelled_text_ends_and_leaves_nothing_behind(model):
    handle = model.submit(IDS, max_new_tokens=400, temperature=0)
    next(handle)
    handle.cancel()
    found = handle.result(timeout=60)
    assert found.finish_reason == "interrupted"
    assert 1 <= len(found.token_ids) < 400
    assert is_idle(model)


def test_a_handle_that_is_dropped_ends_its_text(model):
    handle = model.submit(IDS, max_new_tokens=400, temperature=0)
    next(handle)
    del handle
    gc.collect()
    assert is_idle(model)


def test_a_pass_whose_lanes_have_all_left_ends_within_a_tile(tiny, cuts_small):
    """A cancelled request of a large model must not stream 140 GB for nobody."""
    with opened(tiny) as model:
        handle = model.submit(IDS, max_new_tokens=400, temperature=0)
        next(handle)
        n_tiles, runs = len(model.plan.tiles), []
        assert n_tiles > 20
        inside, go = threading.Event(), threading.Event()

        def watch(step, tile):
            if type(step).__name__ == "Run":
                runs.append(tile)
                if len(runs) == 3:
                    inside.set()
                    go.wait(30)

        model.engine.watch.on_step = watch
        assert inside.wait(30)
        handle.cancel()
        go.set()
        assert is_idle(model)
        assert len(runs) <= 5


@pytest.fixture
def cuts_small(monkeypatch):
    from tests.streaming.conftest import set_tile_bytes

    set_tile_bytes(monkeypatch, 3_000)


@pytest.mark.slow
def test_what_does_not_fit_beside_the_others_begins_as_they_end(fable, room_for):
    room = room_for(2, 105)
    with opened(fable, **room) as model:
        want = jlayer.generate(model, IDS, max_new_tokens=100, temperature=0).token_ids
        handles = [model.submit(IDS, max_new_tokens=100, temperature=0) for _ in range(5)]
        assert model.engine.n_alive < 5
        assert [handle.result(timeout=300).token_ids for handle in handles] == [want] * 5
        assert model.engine.memory()["device_peak_bytes"] <= room["device_memory"]
        with pytest.raises(DoesNotFitError):
            model.submit([5] * 500, max_new_tokens=500, temperature=0)


@pytest.mark.slow
def test_a_list_that_does_not_fit_at_once_is_generated_in_portions(fable, room_for):
    prompts = [[5 + n, 9, 12] for n in range(8)]
    options = {"max_new_tokens": 60, "temperature": 0}
    with opened(fable, **room_for(3, 63)) as model:
        found = jlayer.generate(model, prompts, **options)
        assert 2 <= found[0].stats["lanes"] < 8
    with opened(fable) as model:
        want = jlayer.generate(model, prompts, **options)
        assert want[0].stats["lanes"] == 8
    assert [one.token_ids for one in found] == [one.token_ids for one in want]


def test_a_text_that_cannot_be_drawn_fails_alone(model, expected):
    bad = {**OPTIONS, "repetition_penalty": 1e-44}  # a score beyond float32
    one, other = model.submit(IDS, **bad), model.submit(PROMPTS[0], **OPTIONS)
    with pytest.raises(UsageError):
        one.result(timeout=60)
    assert other.result(timeout=60).token_ids == expected[0]
    assert is_idle(model)


def test_a_closed_model_says_so_to_its_handles(tiny):
    model = opened(tiny)
    handle = model.submit(IDS, max_new_tokens=400, temperature=0)
    next(handle)
    model.close()
    with pytest.raises(UsageError, match="closed"):
        handle.result(timeout=60)
    assert not [t for t in threading.enumerate() if t.name == "jlayer-background"]


def test_what_is_wrong_with_the_arguments_is_said_at_once(model):
    for options, word in (
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(UsageError, match=word):
            model.submit(IDS, **options)
    with pytest.raises(UsageError, match="one prompt"):
        model.submit([IDS, IDS], **OPTIONS)
    assert is_idle(model)


@pytest.mark.slow
def test_lanes_that_begin_alike_share_their_entries(tiny, monkeypatch):
    """Ten texts of one prompt take its entries once, in memory and in arithmetic."""
    prompt = [7 + n for n in range(40)]
    options = OPTIONS | {"num_return_sequences": 10}
    with opened(tiny) as model:
        found = jlayer.generate(model, prompt, **options)
        rows = found[0].stats["rows"]
        cache = found[0].plan["device"]["cache_bytes"]
    monkeypatch.setattr(riders, "LEAST_SHARED", 1 << 20)
    with opened(tiny) as model:
        want = jlayer.generate(model, prompt, **OPTIONS)
        each = want.plan["device"]["cache_bytes"]
        other = jlayer.generate(model, [prompt] * 10, **OPTIONS)
        assert rows < other[0].stats["rows"] - 9 * 38
    assert found[0].token_ids == want.token_ids
    assert cache < 4 * each
