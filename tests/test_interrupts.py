"""Signals: held where an exception would do harm, acted on at safe points, and never lost."""

import signal
import subprocess
import sys
import threading

import pytest

from jlayer import interrupts
from jlayer.api import AutoModel
from jlayer.interrupts import Terminated, check, deferred, released, uninterrupted
from jlayer.streaming.watch import Watch
from tests.conftest import BUNDLED

STOP = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture
def held():
    # pytest may have been started with SIGINT ignored, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert interrupts.hold()
    yield
    interrupts.release()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", STOP)
def test_a_held_signal_is_acted_on_at_the_next_check_and_once(held, number):
    signal.raise_signal(number)
    with pytest.raises(STOP[number]):
        check()
    check()


def raise_and_fail(number):
    signal.raise_signal(number)
    pytest.fail("it goes on")


@pytest.mark.parametrize("number", STOP)
def test_in_a_place_that_waits_it_is_acted_on_at_once(held, number):
    with pytest.raises(STOP[number]), released():
        raise_and_fail(number)
    check()  # it was acted on


@pytest.mark.parametrize("number", STOP)
def test_where_nothing_may_end_halfway_it_waits_for_the_next_check_after_that(held, number):
    with uninterrupted():
        signal.raise_signal(number)
        check()
        with released(), deferred(), uninterrupted():
            signal.raise_signal(number)
        check()
    with pytest.raises(STOP[number]):
        check()
    check()


def test_a_second_one_where_nothing_may_end_halfway_is_told(held):
    told = []
    with uninterrupted(told.append):
        signal.raise_signal(signal.SIGINT)
        assert not told
        signal.raise_signal(signal.SIGTERM)
        assert told == [signal.SIGTERM]
    with pytest.raises(Terminated):
        check()
    signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGTERM]  # it is the first one again
    with pytest.raises(KeyboardInterrupt):
        check()


def test_a_signal_that_came_before_ends_a_wait_before_it_begins(held):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), released():
        pytest.fail("it waits")


class Dropping:
    """A finaliser that is interrupted: Python drops the exception."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_that_was_dropped_is_raised_at_the_end_of_the_wait(held):
    with pytest.raises(Terminated), released():
        assert Dropping() is not None  # dropped at the end of this statement


def test_a_second_signal_does_not_interrupt_the_clean_up(held):
    cleaned = []

    def clean_up():
        signal.raise_signal(signal.SIGINT)
        cleaned.append(True)

    def run():
        try:
            raise_and_fail(signal.SIGINT)
        finally:
            clean_up()

    with pytest.raises(KeyboardInterrupt), released():
        run()
    assert cleaned


def test_deferred_holds_again_inside_a_wait(held):
    reached = []

    def run():
        with deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of what is deferred")
        reached.append("behind it")

    with pytest.raises(KeyboardInterrupt), released():
        run()
    assert reached == ["the end of what is deferred"]


def test_a_library_s_user_keeps_the_own_handler_and_it_is_called_also_after_an_error():
    called = []

    def fail_after_signal():
        signal.raise_signal(signal.SIGTERM)
        assert not called
        raise ZeroDivisionError

    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        with pytest.raises(ZeroDivisionError), deferred():
            fail_after_signal()
        assert called == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(called) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_thread_does_not_act_on_the_main_thread_s_signal(held):
    signal.raise_signal(signal.SIGINT)
    failed = []

    def work():
        try:
            with deferred() as signals:
                signals.check()
            with released():
                check()
        except KeyboardInterrupt as stop:
            failed.append(stop)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert not failed
    with pytest.raises(KeyboardInterrupt):
        check()


def test_a_signal_that_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        check()
        interrupts.release()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


IN_A_USERS_PROGRAM = """
import os, signal, sys

class Finder:
    def find_spec(self, wanted, *_):
        if wanted == sys.argv[1]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
import jlayer
try:
    jlayer.AutoModel.from_pretrained(sys.argv[2], device="cpu")
    print("the signal was lost")
except KeyboardInterrupt:
    print(sys.modules[sys.argv[1]].__spec__._initializing)
"""


@pytest.mark.parametrize("name", ["jax", "jax._src.xla_bridge", "jaxlib.cpu_feature_guard"])
def test_a_library_s_user_interrupts_after_the_import_not_inside_it(name):
    words = [sys.executable, "-c", IN_A_USERS_PROGRAM, name, str(BUNDLED)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_library_s_user_interrupts_between_two_phases_of_opening(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    phases = []

    def on_phase(words):
        phases.append(words)
        if len(phases) == 2:
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            AutoModel.from_pretrained(BUNDLED, device="cpu", watch=Watch(on_phase=on_phase))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(phases) == 2
