"""Bytes that go to the disk in blocks: all of them, in order, hashed, synced, whatever the disk
takes at a time."""

import errno
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.convert import convert_checkpoint
from jlayer.convert.sources import files as read
from jlayer.convert.target import blocks
from jlayer.convert.target.blocks import BlockWriter
from jlayer.convert.target.write import TargetWriter
from jlayer.errors import DoesNotFitError, StorageError
from jlayer.spec import ALIGNMENT
from tests.convert.checkpoints import (
    edit_tensors,
    files_of,
    numbers,
    random_checkpoint,
    read_tensors,
    tensor_of,
)

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
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 3 * SMALL), max_size=6))
    def check(lengths):
        written(writer, tmp_path / "file", [os.urandom(length) for length in lengths])

    check()


def test_chunks_that_are_filled_where_they_are_to_be(writer, tmp_path):
    """Lent memory, used whole, in part, or not at all, and chunks of the giver's own in between."""

    @settings(max_examples=20, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(1, 3 * SMALL), st.sampled_from(["whole", "part", "none"])),
            max_size=6,
        )
    )
    def check(wanted):
        content = bytearray()

        def chunks():
            for n_bytes, use in wanted:
                lent = writer.room(n_bytes)
                assert 1 <= len(lent) <= n_bytes
                chunk = {"whole": lent, "part": lent[: n_bytes // 2], "none": bytearray(n_bytes)}[
                    use
                ]
                chunk[:] = os.urandom(len(chunk))
                content.extend(chunk)
                yield chunk

        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        n_bytes, digest = writer.write(str(path), chunks(), called="name")
        assert path.read_bytes() == content
        assert (n_bytes, digest) == (len(content), hashlib.sha256(content).hexdigest())

    check()


def test_weights_that_keep_their_dtype_are_read_to_where_they_are_written_from(
    tmp_path, monkeypatch
):
    """A byte that is copied into a block is lent to the copy, and one that is read there to its
    source: so the bytes that are lent tell which are copied, and that none is lent twice."""
    lent = {BlockWriter: 0, TargetWriter: 0}

    def counting(kind):
        real = kind.room

        def room(self, n_bytes):
            view = real(self, n_bytes)
            lent[kind] += len(view)
            return view

        return room

    for kind in lent:
        monkeypatch.setattr(kind, "room", counting(kind))
    source = random_checkpoint(tmp_path / "source", hidden_size=256, num_hidden_layers=2)
    convert_checkpoint(source, tmp_path / "target")
    files = {path.name: path.stat().st_size for path in (tmp_path / "target").iterdir()}
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    assert lent[TargetWriter] == weights - 4 * ALIGNMENT  # all but the four headers
    assert lent[BlockWriter] == sum(files.values())


def test_numbers_are_never_cut_by_the_end_of_a_block(tmp_path, monkeypatch):
    """Nor by that of a chunk, although bfloat16 matrices of odd size stand between float32."""
    source = random_checkpoint(tmp_path / "source", hidden_size=25, intermediate_size=901)

    def widen(tensors):
        for name in tensors:
            if "self_attn" in name:
                tensors[name] = tensor_of(numbers(tensors[name]).astype(np.float32))

    for path in source.glob("*.safetensors"):
        edit_tensors(path, widen)
    convert_checkpoint(source, tmp_path / "whole")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", ALIGNMENT)
    monkeypatch.setattr(read, "CHUNK_BYTES", 1000)
    convert_checkpoint(source, tmp_path / "cut")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert read_tensors(tmp_path / "cut") == read_tensors(source)


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
    monkeypatch.setattr(os, "fdatasync", lambda fd: (syncs.append(fd), real(fd)))

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    written(writer, tmp_path / "file", [os.urandom(8 * SMALL)])
    assert len(syncs) == 4
