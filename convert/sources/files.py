"""Source tensors as streams of chunks, never a whole checkpoint: the protocol, and files.

Checks nothing about the model (doors.py has done so) and knows nothing of the target.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jlayer.checkpoint.source import SourceFile, identity_of, refuse_different
from jlayer.errors import CheckpointError, StorageError
from jlayer.spec import ITEM_BYTES
from jlayer.strict import close, open_regular

# What is looked at as soon as it is read: it should still be in the processor's cache by then.
CHUNK_BYTES = 1 << 20
# What goes from a file to SHA-256 and nowhere else: the fewer, the fewer changes of thread.
WHOLE_FILE_BYTES = 4 << 20
MAX_OPEN_FILES = 16

Chunk = bytes | memoryview
# Lends memory for what comes next: at most as much as asked for, and no number is cut by its end.
Room = Callable[[int], memoryview]


@dataclass(frozen=True)
class TensorInfo:
    """What a source says of one tensor: numpy's word for its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Source(Protocol):
    """Tensors under their published names, wherever they come from."""

    tensors: Mapping[str, TensorInfo]

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        """The tensor's bytes in order (row-major, little-endian), in pieces of whole elements.

        A chunk stays as it is until the next but one is asked for, here or of another tensor. It
        may be what `room` has lent last, filled.
        """

    def where(self, name: str) -> str:
        """The file that a message about this tensor should name."""

    def places_of(self, name: str) -> tuple[Place, ...]:
        """Where the tensor lies, or its parts, or copies of it: what is read to have it."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Strided:
    """How a tensor lies among the elements of another: its shape, and steps in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Checksum:
    """CRC-32 of so many bytes."""

    n_bytes: int
    crc: int


@dataclass(frozen=True)
class Place:
    """Where a copy of a tensor lies; `name` is the one that it bears there.

    `strided` is None where its bytes lie in order; `checksum` where the file has none for it.
    """

    name: str
    file: SourceFile
    offset: int
    strided: Strided | None = None
    checksum: Checksum | None = None


class FileSource:
    """Tensors of checked files. Copies of one tensor are compared while it is read."""

    def __init__(self, tensors: dict[str, TensorInfo], places: dict[str, tuple[Place, ...]]):
        self.tensors = tensors
        self._places = places
        self._fds: dict[SourceFile, int] = {}
        self._buffers = (memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES)))
        self._n_chunks = 0
        self._sums: dict[Place, tuple[int, int]] = {}  # up to which byte, and the sum so far

    def where(self, name: str) -> str:
        return self._places[name][0].file.path

    def places_of(self, name: str) -> tuple[Place, ...]:
        return self._places[name]

    def chunks(self, name: str, room: Room | None = None) -> Iterator[memoryview]:
        place, *copies = self._places[name]
        info = self.tensors[name]
        at, total, step = 0, info.n_bytes, CHUNK_BYTES
        if any(found.strided for found in (place, *copies)):
            step = max(1, CHUNK_BYTES // row_bytes(info)) * row_bytes(info)
            room = None  # it may end in the middle of a row
        memory = room or self._next_buffer
        while at < total:
            view = memory(min(step, total - at))
            self._read(place, at, view, info)
            for copy in copies:
                self._compare(view, place, copy, at, info)
            yield view
            at += len(view)

    def close(self) -> None:
        for fd in self._fds.values():
            close(fd)
        self._fds = {}

    def _next_buffer(self, n_bytes):
        if n_bytes > CHUNK_BYTES:
            return memoryview(bytearray(n_bytes))
        self._n_chunks += 1
        return self._buffers[self._n_chunks % 2][:n_bytes]

    def _read(self, place, at, view, info):
        """Fills `view` with a tensor's bytes from `at` on: whole rows of it where it is strided."""
        if place.file not in self._fds:
            if len(self._fds) == MAX_OPEN_FILES:
                self.close()
            self._fds[place.file] = open_unchanged(place.file)
        fd = self._fds[place.file]
        if place.strided is not None:
            rows = np.frombuffer(view, f"u{ITEM_BYTES[info.dtype]}")
            _read_strided(fd, place, at // row_bytes(info), rows)
            return
        read_into(fd, view, place.offset + at, place.file.path)
        if place.checksum is not None:
            self._check_sum(place, at, view)

    def _check_sum(self, place, at, view):
        """Takes the sum as far as a tensor is read from its start on, and compares it at its end.

        1.9 GB/s on one core, where SHA-256, in a thread of its own, takes 1.1 GB/s.
        """
        done, so_far = self._sums.pop(place, (0, 0)) if at else (0, 0)
        if done != at:
            return
        so_far, done = zlib.crc32(view, so_far), at + len(view)
        if done < place.checksum.n_bytes:
            self._sums[place] = (done, so_far)
        elif so_far != place.checksum.crc:
            raise CheckpointError(
                f"{place.file.path}: tensor {place.name} is damaged: its CRC-32 is {so_far:08x}, "
                f"expected {place.checksum.crc:08x}; fetch the file again"
            )

    def _compare(self, view, place, copy, at, info):
        found = memoryview(bytearray(len(view)))
        self._read(copy, at, found, info)
        if not np.array_equal(np.frombuffer(view, np.uint8), np.frombuffer(found, np.uint8)):
            refuse_different(copy, place)


def row_bytes(info: TensorInfo) -> int:
    """Bytes of what stands together at one index of a tensor's first axis."""
    return math.prod(info.shape[1:]) * ITEM_BYTES[info.dtype]


def check_unchanged(file: SourceFile) -> None:
    """Raises CheckpointError where the file is no longer the one that was checked."""
    try:
        status = os.stat(file.real)
    except OSError as error:
        raise _gone(file, error) from None
    _check_identity(status, file)


def open_unchanged(file: SourceFile) -> int:
    """A descriptor of a file that was checked before; raises where it is gone or another one."""
    try:
        fd = open_regular(file.real)
    except CheckpointError as error:
        raise StorageError(f"{file.path}: gone while it was being read ({error})") from None
    try:
        _check_identity(os.fstat(fd), file)
    except OSError as error:
        close(fd)
        raise StorageError(f"{file.path}: cannot be read ({error.strerror})") from None
    except BaseException:
        close(fd)
        raise
    return fd


def file_chunks(file: SourceFile) -> Iterator[memoryview]:
    """All bytes of a file, in chunks that stay until the next but one, as `Source.chunks` does."""
    fd = open_unchanged(file)
    size = min(WHOLE_FILE_BYTES, file.n_bytes)
    buffers = (memoryview(bytearray(size)), memoryview(bytearray(size)))
    try:
        for n, at in enumerate(range(0, file.n_bytes, WHOLE_FILE_BYTES)):
            view = buffers[n % 2][: min(WHOLE_FILE_BYTES, file.n_bytes - at)]
            read_into(fd, view, at, file.path)
            yield view
    finally:
        close(fd)


def read_into(fd: int, view: memoryview, offset: int, path: str) -> None:
    """Fills `view` from `offset` on. Raises StorageError, or CheckpointError at the file's end."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be read at byte {offset + done} ({error.strerror})"
            ) from None
        if count == 0:
            raise CheckpointError(
                f"{path}: changed while it was being read: {os.fstat(fd).st_size} bytes, expected "
                f"at least {offset + len(view)}"
            )
        done += count


def read_bytes(fd: int, offset: int, n_bytes: int, path: str) -> bytes:
    """So many bytes from `offset` on. Raises what `read_into` raises."""
    raw = bytearray(n_bytes)
    read_into(fd, memoryview(raw), offset, path)
    return bytes(raw)


def _read_strided(fd, place, first_row, rows):
    """Fills the elements `rows` with a tensor's rows from `first_row` on.

    Along the axis that lies denser in the file runs are read whole and thinned out in memory, so
    that a transposed matrix costs a read for each of its columns, not for each number.
    """
    shape, strides = place.strided.shape, place.strided.strides
    width = math.prod(shape[1:])
    out = rows.reshape(-1, width)
    outer, inner = strides if len(strides) == 2 else (*strides, 0)
    if width == 1 or (len(out) > 1 and outer < inner):
        out, outer, inner = out.T, inner, outer
    start = place.offset + first_row * strides[0] * rows.itemsize
    longest = max(1, CHUNK_BYTES // rows.itemsize // max(1, inner))
    for n, line in enumerate(out):
        for at in range(0, len(line), longest):
            piece = line[at : at + longest]
            run = np.empty((len(piece) - 1) * inner + 1, rows.dtype)
            offset = start + (n * outer + at * inner) * rows.itemsize
            read_into(fd, memoryview(run).cast("B"), offset, place.file.path)
            piece[:] = run[::inner] if inner else run


def hash_stream(
    chunks: Iterable[Chunk], sink: Callable[[Chunk], None] | None = None
) -> tuple[int, str]:
    """Takes every chunk through SHA-256 and `sink`; returns the bytes' number and hex digest.

    Hashing is the slowest part of a conversion, so a second thread does it while this one goes on
    to the sink and to the next chunk; hence the two chunks that a source keeps valid.
    """
    digest, n_bytes, pending = hashlib.sha256(), 0, None
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        for chunk in chunks:
            if pending is not None:
                pending.result()
            pending = pool.submit(digest.update, chunk)
            if sink is not None:
                sink(chunk)
            n_bytes += len(chunk)
    return n_bytes, digest.hexdigest()


def _check_identity(status, file):
    if identity_of(status) != file.identity:
        raise CheckpointError(
            f"{file.path}: changed while it was being converted; convert anew with --overwrite"
        )


def _gone(file, error):
    return StorageError(f"{file.path}: gone while it was being read ({error.strerror})")
