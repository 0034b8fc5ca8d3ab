"""Starts without an end: counted over servers that crash, not over those that are stopped."""

import errno
import json
import os
import threading

import pytest

from jlayer.errors import CheckpointError
from jlayer.serving import starts as module
from jlayer.serving.starts import FILE, GivenUp, NotNoted, PartStarts, Starts

PATIENCE_S = 20

MOST = 3


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "MOST", MOST)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / FILE)


def begin(starts, *names):
    """Begins them together; -> the errors."""
    found, all_done = [], threading.Semaphore(0)
    for name in names:
        starts.of(name).note(lambda error: (found.append(error), all_done.release()))
    for _ in names:
        assert all_done.acquire(timeout=PATIENCE_S)
    return found


def crash(path, *names):
    """A server that begins them, and ends in no order."""
    starts = Starts(path)
    assert begin(starts, *names) == [None] * len(names)
    starts.close()


def is_given_up(path, name):
    starts = Starts(path)
    try:
        starts.check(name)
        return False
    except GivenUp:
        return True
    finally:
        starts.close()


def is_last(path, name):
    starts = Starts(path)
    starts.close()
    return starts.of(name).is_last


def test_what_was_begun_three_times_without_an_end_is_given_up(path):
    for number in range(MOST):
        assert not is_given_up(path, "a")
        assert is_last(path, "a") == (number == MOST - 1)
        crash(path, "a", "b" if number else "c")
    assert is_given_up(path, "a")
    assert not is_given_up(path, "b")
    starts = Starts(path)
    with pytest.raises(GivenUp, match=rf"begun {MOST} times.*send it anew") as caught:
        starts.check("a")
    assert "\n" not in str(caught.value)
    starts.close()


def test_a_server_that_is_stopped_in_order_does_not_count(path):
    for _ in range(MOST - 1):
        crash(path, "a")
    for _ in range(5):
        starts = Starts(path)
        begin(starts, "a", "b")
        starts.stop(in_order=True)
        starts.close()
        assert not is_given_up(path, "a")
    starts = Starts(path)
    begin(starts, "a")
    starts.stop(in_order=False)  # the engine has failed
    starts.close()
    assert is_given_up(path, "a")


def test_nothing_begins_once_the_server_is_to_stop(path):
    starts, begun = Starts(path), []
    starts.stop(in_order=True)
    starts.of("a").note(begun.append)
    starts.close()
    starts.of("a").note(begun.append)  # nor later
    assert not begun
    assert os.path.getsize(path) == 0


def test_what_has_ended_is_forgotten(path):
    for _ in range(MOST):
        crash(path, "a", "batch 1", "batch 2", "batch2 1")
    starts = Starts(path)
    starts.end({"a"})
    starts.end_of({"batch"})
    starts.close()
    assert [is_given_up(path, name) for name in ("a", "batch 1", "batch 2")] == [False] * 3
    assert is_given_up(path, "batch2 1")


def test_a_run_that_ends_in_order_is_put_back(path):
    for _ in range(MOST):
        starts = Starts(path)
        begin(starts, "batch 1", "other 1")
        starts.put_back("batch")
        starts.close()
    assert not is_given_up(path, "batch 1")
    assert is_given_up(path, "other 1")


def test_a_start_counts_once_a_server(path):
    starts = Starts(path)
    for _ in range(MOST):
        begin(starts, "a", "a")
    starts.close()
    assert not is_given_up(path, "a")


def test_a_start_is_on_disk_before_it_is_told(path, monkeypatch):
    starts, real, told = Starts(path), os.fsync, []
    monkeypatch.setattr("os.fsync", lambda fd: (real(fd), told.append("synced"))[0])
    assert starts.of("a").note(lambda error: told.append(error)) is None
    starts.close()
    assert told == ["synced", None]
    with open(path) as file:
        assert json.load(file) == {"begun": {"a": 1}}


def test_starts_that_come_together_are_synced_together(path, monkeypatch):
    starts, real, gate, n_synced = Starts(path), os.fsync, threading.Event(), []

    def slow(fd):
        n_synced.append(fd)
        gate.wait(PATIENCE_S)
        real(fd)

    monkeypatch.setattr("os.fsync", slow)
    done = threading.Semaphore(0)
    for number in range(200):
        starts.of(f"batch {number}").note(lambda error: done.release())
    gate.set()
    for _ in range(200):
        assert done.acquire(timeout=PATIENCE_S)
    assert len(n_synced) <= 2
    starts.close()


def test_a_full_disk_is_told_and_spoils_nothing(path, monkeypatch):
    crash(path, "a")
    starts = Starts(path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr("os.pwrite", full)
        (error,) = begin(starts, "a")
        assert isinstance(error, NotNoted)
        assert "free some space" in str(error)
        with starts.reading("b"):
            pass
        starts.end({"a"})
        starts.stop(in_order=True)
    starts.close()
    assert not is_last(path, "a")


def test_what_is_read_counts_as_begun_meanwhile(path):
    for _ in range(MOST):
        starts = Starts(path)
        with starts.reading("fine"):
            pass
        with starts.reading("fatal"), open(path, "rb") as file:
            as_killed = file.read()
        starts.close()
        with open(path, "wb") as file:
            file.write(as_killed)
    assert is_given_up(path, "fatal")
    assert not is_given_up(path, "fine")
    assert not is_last(path, "fine")


def test_what_begins_while_it_is_read_by_another_stays_begun(path):
    starts = Starts(path)
    begin(starts, "a")
    with starts.reading("a"):
        pass
    starts.close()
    crash(path, "a")
    assert is_last(path, "a")


def test_a_torn_line_is_dropped_and_a_damaged_one_named(path):
    crash(path, "a")
    crash(path, "b")
    with open(path, "rb") as file:
        whole = file.read()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:length])
        assert not is_given_up(path, "a")
    for damaged in (b"{\n", b"[]\n", b'{"begun": {"a": "x"}}\n', b'{"begun": 1}\n'):
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(CheckpointError, match="line 1"):
            Starts(path)


def test_the_file_does_not_grow_for_ever(path, monkeypatch):
    monkeypatch.setattr("jlayer.serving.starts.MOST_DEAD", 20)
    starts = Starts(path)
    for number in range(300):
        begin(starts, f"batch {number}")
        starts.end({f"batch {number}"})
    begin(starts, "last")
    starts.close()
    with open(path) as file:
        assert len(file.readlines()) < 50
    assert os.stat(path).st_mode & 0o77 == 0
    crash(path, "last")
    assert is_last(path, "last")


def test_parts_without_a_file_are_never_written(path):
    parts = PartStarts()
    parts.check(1)
    with parts.reading(1):
        assert parts.of(1) is None
    parts.end([1])
