"""Handles, streams and texts from many threads: whoever waits gets on, whoever leaves leaves
nothing."""

import gc
import random
import threading
import time

import pytest

import jlayer
from jlayer import JlayerError, UsageError
from jlayer.text.stream import TextStream
from tests.engine.lanes import GREEDY, PROMPT, Run, alone, check_rows, raises_at, watched, within
from tests.engine.test_engine import opened
from tests.engine.test_submit import is_idle


@pytest.fixture(scope="module")
def model(fable):
    with opened(fable) as model:
        yield model


def no_thread_left():
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        if not [t for t in threading.enumerate() if t.name == "jlayer-background"]:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_was_stopped_is_followed_by_another(model):
    """Its place stayed taken: what was submitted afterwards was never begun."""
    want = alone(model, PROMPT, max_new_tokens=3, **GREEDY)
    with raises_at(model, 5, KeyboardInterrupt()) as raised:
        handle = model.submit(PROMPT, max_new_tokens=30, **GREEDY)
        with pytest.raises(JlayerError, match="KeyboardInterrupt"):
            handle.result(timeout=30)
    assert raised
    later = model.submit(PROMPT, max_new_tokens=3, **GREEDY)
    assert later.result(timeout=30).token_ids == want
    assert is_idle(model)


def test_threads_may_read_one_handle_together(model):
    """One that found its step taken by another ended the text."""
    want = alone(model, PROMPT, max_new_tokens=60, **GREEDY)
    handle, found = model.submit(PROMPT, max_new_tokens=60, **GREEDY), []
    threads = [threading.Thread(target=lambda: found.extend(handle)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert sum(len(step.token_ids) for step in found) == 60
    assert handle.result().token_ids == want


def test_the_last_step_and_its_text_come_with_the_end(model, monkeypatch):
    """A text that had ended was taken for complete before its last piece was there."""
    inside, finish = threading.Event(), TextStream.finish
    want = jlayer.generate(model, PROMPT, max_new_tokens=4, **GREEDY)

    def slowly(stream):
        inside.set()
        time.sleep(0.3)
        return finish(stream) + "."

    monkeypatch.setattr(TextStream, "finish", slowly)
    handle = model.submit(PROMPT, max_new_tokens=4, **GREEDY)
    assert inside.wait(30)
    found = handle.result(timeout=30)
    assert found.text == want.text + "."
    assert found.stats["sweeps"] == 4
    steps = list(handle)
    assert [token for step in steps for token in step.token_ids] == want.token_ids
    assert steps[-1].finish_reason == "length"


def test_what_is_cancelled_while_it_is_admitted_gives_its_room_back(fable, monkeypatch, room_for):
    with opened(fable, **room_for(1, 5 + 460)) as model:
        held, _ = model.decoding(PROMPT[:5], options={"max_new_tokens": 460, **GREEDY})
        handle = model.submit(PROMPT[:5], max_new_tokens=450, **GREEDY)
        assert model.engine.n_alive == 1
        admit, admitted = model.engine.admit, threading.Event()

        def cancelled(shape):
            ticket = admit(shape)
            handle.cancel()
            admitted.set()
            return ticket

        monkeypatch.setattr(model.engine, "admit", cancelled)
        held.close()
        assert admitted.wait(30)
        assert is_idle(model)


@pytest.mark.slow
def test_who_waits_goes_on_when_the_thread_that_drives_is_interrupted(model):
    want = alone(model, PROMPT, max_new_tokens=20, **GREEDY)
    driver = Run(model, [3, 4], max_new_tokens=400, **GREEDY)
    inside, go, found, errors = threading.Event(), threading.Event(), [], []

    def on_step(number, *_):
        if threading.current_thread() is drives and number > 20:
            inside.set()
            go.wait(30)
            raise KeyboardInterrupt

    def drive():
        try:
            driver.tokens()
        except KeyboardInterrupt as error:
            errors.append(error)

    drives = threading.Thread(target=drive)
    waits = threading.Thread(
        target=lambda: found.append(
            jlayer.generate(model, PROMPT, max_new_tokens=20, **GREEDY).token_ids
        )
    )
    with watched(model, on_step):
        drives.start()
        assert inside.wait(30)
        waits.start()
        go.set()
        drives.join(30)
        waits.join(30)
    assert errors
    assert found == [want]
    check_rows(model, driver)
    driver.close()
    assert is_idle(model)


def test_what_leaves_in_a_pass_that_fails_gives_its_entries_back_at_once(model):
    one, other = (Run(model, PROMPT[:n], max_new_tokens=9, **GREEDY) for n in (5, 9))
    one.advance()

    def on_step(number, *_):
        if number == 3:
            other.close()
        if number == 4:
            raise KeyboardInterrupt

    with watched(model, on_step), pytest.raises(KeyboardInterrupt):
        one.advance()
    check_rows(model, one)
    one.close()


ENDINGS = ["exhausted", "closed", "dropped", "error", "cancelled", "handle dropped"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_of_what_ends_beside_others(model, ending):
    want = alone(model, PROMPT, max_new_tokens=12, **GREEDY)
    other = model.submit(PROMPT, max_new_tokens=12, **GREEDY)
    options = {"max_new_tokens": 6, **GREEDY}
    if ending in ("cancelled", "handle dropped"):
        own = model.submit(PROMPT[:20], **options)
        next(own)
        if ending == "cancelled":
            own.cancel()
    else:
        own = jlayer.stream(model, PROMPT[:20], **options)
        next(own)
        if ending == "exhausted":
            list(own)
        elif ending == "closed":
            own.close()
        elif ending == "error":
            with pytest.raises(ZeroDivisionError):
                own.throw(ZeroDivisionError)
    del own
    gc.collect()
    assert other.result(timeout=30).token_ids == want
    assert is_idle(model)
    assert no_thread_left()


def random_calls(model, seed, stop):
    """Calls of all kinds until `stop`; a closed model ends them."""
    rng = random.Random(seed)
    while not stop.is_set():
        prompt = [*PROMPT[: rng.randint(1, 40)], rng.randint(3, 200)]
        options = {"max_new_tokens": rng.randint(1, 12), "temperature": rng.choice([0, 0.9])}
        try:
            kind = rng.choice(["generate", "stream", "submit", "leave", "cancel", "drop"])
            if kind == "generate":
                jlayer.generate(model, [prompt, prompt[:3]], **options)
            elif kind in ("stream", "leave"):
                for n, _ in enumerate(jlayer.stream(model, prompt, **options)):
                    if kind == "leave" and n == rng.randint(0, 5):
                        break
            else:
                handle = model.submit(prompt, **options)
                if kind == "submit":
                    handle.result(timeout=60)
                elif kind == "cancel":
                    time.sleep(rng.random() / 50)
                    handle.cancel()
                    handle.result(timeout=60)
        except UsageError as error:
            if "closed" in str(error):
                return
            raise


@pytest.mark.slow
@pytest.mark.parametrize("closes", [True, False], ids=["closed meanwhile", "left idle"])
def test_eight_threads_at_random(fable, closes):
    model = opened(fable)
    stop, errors = threading.Event(), []

    def calls(seed):
        try:
            random_calls(model, seed, stop)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    if closes:
        within(30, model.close)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    gc.collect()
    assert is_idle(model)
    within(30, model.close)
    assert no_thread_left()
