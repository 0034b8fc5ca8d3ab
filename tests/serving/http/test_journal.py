"""The journal of accepted requests: what it says is on disk, whatever interrupts it."""

import errno
import json
import os

import pytest

from jlayer.errors import CheckpointError, LockedError, StorageError
from jlayer.serving.http.journal import FILE, Journal


def entry(name, **more):
    return {"id": name, "raw": "{}", **more}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def read(folder):
    journal = Journal(folder)
    try:
        return {name: request.get("ended") for name, request in journal.requests.items()}
    finally:
        journal.close()


def test_what_was_accepted_and_ended_is_there_again(folder):
    journal = Journal(folder)
    for name in "abc":
        journal.accept(entry(name))
    journal.end("b", {"status": 200})
    journal.forget("c")
    journal.forget("never known")
    journal.close()
    assert read(folder) == {"a": None, "b": {"status": 200}}
    assert read(folder) == {"a": None, "b": {"status": 200}}, "also of the file written anew"


def test_each_line_is_synced_before_it_counts(folder, monkeypatch):
    journal, synced = Journal(folder), []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (synced.append(fd), real(fd)))
    for act in (
        lambda: journal.accept(entry("a")),
        lambda: journal.end("a", {}),
        lambda: journal.forget("a"),
    ):
        n_before = len(synced)
        act()
        assert len(synced) > n_before
    journal.close()


def test_a_torn_last_line_is_dropped_at_any_byte(folder):
    journal = Journal(folder)
    journal.accept(entry("a"))
    journal.accept(entry("b"))
    journal.close()
    whole = (folder / FILE).read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        (folder / FILE).write_bytes(whole[:length])
        assert read(folder) == {"a": None}
        # What comes next does not end up behind the torn line.
        journal = Journal(folder)
        journal.accept(entry("c"))
        journal.close()
        assert read(folder) == {"a": None, "c": None}


def test_a_line_that_is_damaged_elsewhere_is_named(folder):
    journal = Journal(folder)
    journal.accept(entry("a"))
    journal.close()
    whole = (folder / FILE).read_bytes()
    for damaged in (b"{\n", b"[]\n", b'{"end": "x", "ended": {}}\n', b"\x00\n"):
        (folder / FILE).write_bytes(damaged + whole)
        with pytest.raises(CheckpointError, match="line 1"):
            Journal(folder)
    (folder / FILE).write_bytes(whole)
    assert read(folder) == {"a": None}


def test_two_servers_do_not_share_a_folder(folder):
    journal = Journal(folder)
    with pytest.raises(LockedError, match=f"process {os.getpid()}"):
        Journal(folder)
    journal.close()
    Journal(folder).close()


def test_a_write_that_fails_leaves_no_half_line(folder, monkeypatch):
    journal, real = Journal(folder), os.pwrite
    journal.accept(entry("a"))

    def full(fd, raw, offset):
        if len(raw) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, raw[:-10], offset)

    with monkeypatch.context() as disk:
        disk.setattr("os.pwrite", full)
        with pytest.raises(StorageError, match="free some space"):
            journal.accept(entry("b"))
    assert "b" not in journal.requests
    journal.accept(entry("c"))
    journal.close()
    assert read(folder) == {"a": None, "c": None}


def test_a_write_that_a_signal_shortens_goes_on(folder, monkeypatch):
    journal, real = Journal(folder), os.pwrite
    with monkeypatch.context() as disk:
        disk.setattr("os.pwrite", lambda fd, raw, offset: real(fd, raw[:5], offset))
        journal.accept(entry("a"))
    journal.close()
    assert read(folder) == {"a": None}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        Journal(tmp_path / "file" / "state")


def test_nobody_else_may_read_it_and_it_does_not_grow_for_ever(folder, monkeypatch):
    monkeypatch.setattr("jlayer.serving.http.journal.MOST_DEAD", 10)
    journal = Journal(folder)
    for name in map(str, range(200)):
        journal.accept(entry(name))
        journal.end(name, {"status": 200})
        journal.forget(name)
    journal.accept(entry("last"))
    journal.close()
    lines = (folder / FILE).read_text().splitlines()
    assert len(lines) < 40
    assert json.loads(lines[-1])["accept"]["id"] == "last"
    assert (folder / FILE).stat().st_mode & 0o77 == 0
    assert folder.stat().st_mode & 0o77 == 0
