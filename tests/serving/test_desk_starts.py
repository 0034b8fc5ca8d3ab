"""What outlives the server begins once that is on disk, and nobody else waits for it."""

import threading
import time
from itertools import count

import pytest

from jlayer.serving.desk import Desk
from jlayer.serving.job import CANCELLED, DONE, FAILED, QUEUED, RUNNING
from jlayer.serving.starts import NotNoted, Start
from tests.serving.test_desk import ENDLESS, PATIENCE_S, order, slowed, until


class Disk:
    """Writes a start down when the test says so. `open`: names without an answer."""

    def __init__(self):
        self.asked, self.open = [], set()
        self._numbers = count()

    def start(self, *, is_last=False):
        name = str(next(self._numbers))
        return Start(name, self.asked.append, is_last, lambda: name in self.open)

    def write(self, error=None):
        until(lambda: self.asked)
        self.asked.pop(0)(error)


@pytest.fixture
def disk():
    return Disk()


def test_nothing_of_it_runs_before_it_is_written_down(model, desk, disk):
    n_before = desk.status().passes_total
    job = desk.submit(order(model, "Once upon a time", start=disk.start()))
    until(lambda: disk.asked)
    job_state, progress = job.state, job.progress()
    assert (job_state, progress.place, job.n_tokens) == (QUEUED, None, 0)
    assert desk.status().passes_total == n_before
    disk.write()
    assert job.wait(PATIENCE_S).state == DONE
    plain = desk.submit(order(model, "Once upon a time")).wait(PATIENCE_S)
    assert job.sequences[0].text == plain.sequences[0].text


def test_others_go_on_meanwhile(model, desk, disk):
    """Also those who come later, and whether somebody runs or not."""
    job = desk.submit(order(model, "Once upon a time", start=disk.start()))
    until(lambda: disk.asked)
    assert desk.submit(order(model, "There was")).wait(PATIENCE_S).state == DONE
    long = desk.submit(order(model, "Once", options=ENDLESS))
    until(lambda: long.n_tokens > 20)
    assert desk.submit(order(model, "There was")).wait(PATIENCE_S).state == DONE
    assert job.n_tokens == 0
    disk.write()
    job.wait(PATIENCE_S)
    assert long.state == RUNNING
    long.cancel()
    long.wait(PATIENCE_S)


def test_one_that_is_written_down_does_not_wait_for_another(model, desk, disk):
    first = desk.submit(order(model, "Once upon a time", start=disk.start()))
    second = desk.submit(order(model, "There was", start=disk.start()))
    until(lambda: len(disk.asked) == 2)
    disk.asked.reverse()
    disk.write()
    assert second.wait(PATIENCE_S).state == DONE
    assert first.n_tokens == 0
    disk.write()
    assert first.wait(PATIENCE_S).state == DONE


def test_a_pass_waits_a_little_for_who_would_else_miss_it(model, disk, monkeypatch):
    """A start that takes a small part of a pass rides in the next one."""

    def later(done):
        threading.Timer(0.01, done, [None]).start()

    monkeypatch.setattr("jlayer.serving.desk.START_SHARE", 0.5)
    desk = Desk(model)
    desk.start()
    try:
        with slowed(model, 0.2):
            long = desk.submit(order(model, "Once", options=ENDLESS))
            until(lambda: long.n_tokens > 3)
            quick = Start("a", later, is_last=False, is_open=lambda: False)
            job = desk.submit(order(model, "There was", start=quick))
            n_then = long.n_tokens
            until(lambda: job.n_tokens)
            assert long.n_tokens - n_then <= 2, "the pass under way, and its own"
    finally:
        desk.stop()


def test_one_that_cannot_be_written_down_ends_with_that(model, desk, disk):
    job = desk.submit(order(model, "Once upon a time", start=disk.start()))
    disk.write(NotNoted("the disk is full"))
    assert job.wait(PATIENCE_S).state == FAILED
    assert isinstance(job.error, NotNoted)
    assert desk.submit(order(model, "There was")).wait(PATIENCE_S).state == DONE


def test_one_that_is_cancelled_before_it_begins_gives_its_room_back(model, desk, disk):
    job = desk.submit(order(model, "Once upon a time", start=disk.start()))
    until(lambda: disk.asked)
    job.cancel()
    assert job.wait(PATIENCE_S).state == CANCELLED
    disk.write()  # too late
    assert desk.submit(order(model, "There was")).wait(PATIENCE_S).state == DONE
    until(lambda: model.engine.n_alive == len(model.engine.kept))  # texts of tests before stay


def test_a_desk_that_stops_ends_those_that_have_not_begun(model, disk):
    desk = Desk(model)
    desk.start()
    job = desk.submit(order(model, "Once upon a time", start=disk.start()))
    until(lambda: disk.asked)
    desk.stop()
    assert job.wait(PATIENCE_S).state == FAILED
    disk.write()
    assert job.state == FAILED


def test_of_those_that_may_be_at_fault_one_runs_at_a_time(model, desk, disk):
    """Beside all others."""
    options = {"max_new_tokens": 8, "eos_token_id": None}
    suspects = [
        desk.submit(order(model, "Once", options=options, start=disk.start(is_last=True)))
        for _ in range(3)
    ]
    others = [
        desk.submit(order(model, "There was", options=options, start=disk.start()))
        for _ in range(2)
    ]
    until(lambda: len(disk.asked) == 3)  # one of them, and the others
    assert [job.decoding is not None for job in suspects] == [True, False, False]
    for _ in range(3):
        disk.write()
    for job in others:
        assert job.wait(PATIENCE_S).state == DONE
    for number, job in enumerate(suspects):
        if number:
            disk.write()
        job.wait(PATIENCE_S)
        assert [each.is_over for each in suspects] == [True] * (number + 1) + [False] * (2 - number)


def test_the_next_last_try_begins_once_the_one_before_is_answered(model, desk, disk, monkeypatch):
    """On disk: a crash between would be blamed on it, too."""
    first, second = disk.start(is_last=True), disk.start(is_last=True)
    disk.open |= {first.name, second.name}
    jobs = [desk.submit(order(model, "Once", start=start)) for start in (first, second)]
    disk.write()
    jobs[0].wait(PATIENCE_S)
    assert desk.submit(order(model, "There was")).wait(PATIENCE_S).state == DONE
    time.sleep(0.2)
    assert not disk.asked
    disk.open.remove(first.name)
    disk.write()
    jobs[1].wait(PATIENCE_S)
    third = desk.submit(order(model, "Once", start=disk.start(is_last=True)))
    time.sleep(0.2)
    assert not disk.asked
    monkeypatch.setattr("jlayer.serving.desk.ANSWER_S", 0.1)  # a disk may take for ever
    disk.write()
    assert third.wait(PATIENCE_S).state == DONE
