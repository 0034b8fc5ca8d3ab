"""Bytes that go to the disk in blocks: all of them, in order, hashed, synced, whatever the disk
takes at a time."""

import errno
import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import blocks
from convert.blocks import BlockWriter
from jlayer.errors import DoesNotFitError, StorageError
from jlayer.weights.layout import ALIGNMENT

SMALL = 4 * ALIGNMENT  # a block, so that a test's file has many


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", SMALL)
    found = BlockWriter()
    yield found
    found.close()


def written(writer, path, chunks):
    path.unlink(missing_ok=True)
    n_bytes, digest = writer.write(str(path), iter(chunks), called="name")
    content = b"".join(chunks)
    assert path.read_bytes() == content
    assert n_bytes == len(content)
    assert digest == hashlib.sha256(content).hexdigest()


SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, SMALL - 1, SMALL, SMALL + 1, 9 * SMALL + 77]


@pytest.mark.parametrize("size", SIZES)
def test_files_of_every_kind_of_length(writer, tmp_path, size):
    written(writer, tmp_path / "file", [os.urandom(size)])


def test_chunks_of_any_length(writer, tmp_path):
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 3 * SMALL), max_size=6))
    def check(lengths):
        written(writer, tmp_path / "file", [os.urandom(length) for length in lengths])

    check()


def test_a_file_system_without_direct_writes(writer, tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    written(writer, tmp_path / "file", [os.urandom(5 * SMALL + 9)])


@pytest.mark.parametrize("taken", [1, ALIGNMENT - 1, ALIGNMENT, SMALL - 512])
def test_writes_that_take_only_a_part(writer, tmp_path, monkeypatch, taken):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:taken], at))
    written(writer, tmp_path / "file", [os.urandom(3 * SMALL + 9)])


def test_direct_writes_that_are_refused_midway(writer, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def pwrite(fd, data, at):
        calls.append(at)
        if len(calls) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    written(writer, tmp_path / "file", [os.urandom(3 * SMALL + 9)])


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, StorageError), (errno.ENOSPC, DoesNotFitError)]
)
def test_an_error_names_the_file_and_leaves_the_writer_usable(
    writer, tmp_path, monkeypatch, code, kind
):
    real = os.pwrite

    def pwrite(fd, data, at):
        if at >= SMALL:
            raise OSError(code, os.strerror(code))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(kind, match="name: ") as error:
        writer.write(str(tmp_path / "file"), iter([bytes(9 * SMALL)]), called="name")
    assert code != errno.EIO or f"byte {SMALL} " in str(error.value)
    monkeypatch.undo()
    written(writer, tmp_path / "other", [os.urandom(SMALL)])


def test_what_waits_for_the_disk_is_bounded_where_writes_are_buffered(
    writer, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "UNSYNCED_BYTES", 2 * SMALL)
    syncs, real, opened = [], os.fdatasync, os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: opened(path, flags & ~os.O_DIRECT))
    monkeypatch.setattr(blocks._File, "_write_direct", None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: (syncs.append(fd), real(fd)))

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    written(writer, tmp_path / "file", [os.urandom(8 * SMALL)])
    assert len(syncs) == 4
