"""Source tensors as streams of chunks, never a whole checkpoint: the protocol, and safetensors.

Checks nothing about the model (doors.py has done so) and knows nothing of the target.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jlayer.errors import CheckpointError, StorageError
from jlayer.spec import ITEM_BYTES
from jlayer.strict import open_regular

# Two of these are in use at a time. Measured: from 1 MiB on the size hardly matters, and a chunk
# that is still in the processor's cache is checked and hashed faster.
CHUNK_BYTES = 4 << 20
MAX_OPEN_FILES = 16

Chunk = bytes | memoryview


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

    def chunks(self, name: str) -> Iterator[Chunk]:
        """The tensor's bytes in order (row-major, little-endian), in pieces of whole elements.

        A chunk stays as it is until the next but one is asked for, here or of another tensor.
        """

    def where(self, name: str) -> str:
        """The file that a message about this tensor should name."""

    def check_unchanged(self) -> None:
        """Raises CheckpointError where the source is no longer what was checked."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class SourceFile:
    """A file of a folder as it was when it was checked: as the user knows it, and without links."""

    name: str
    path: str
    real: str
    n_bytes: int
    identity: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a copy of a tensor lies; `name` is the one that it bears there."""

    name: str
    file: SourceFile
    offset: int


class SafetensorsSource:
    """Tensors of checked safetensors files. Copies of one tensor are compared while it is read."""

    def __init__(self, tensors: dict[str, TensorInfo], places: dict[str, tuple[Place, ...]]):
        self.tensors = tensors
        self._places = places
        self._fds: dict[SourceFile, int] = {}
        self._buffers = (memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES)))
        self._n_chunks = 0

    def where(self, name: str) -> str:
        return self._places[name][0].file.path

    def chunks(self, name: str) -> Iterator[memoryview]:
        place, *copies = self._places[name]
        total = self.tensors[name].n_bytes
        for at in range(0, total, CHUNK_BYTES):
            view = self._next_buffer()[: min(CHUNK_BYTES, total - at)]
            self._read(place, at, view)
            for copy in copies:
                self._compare(view, place, copy, at)
            yield view

    def check_unchanged(self) -> None:
        for file in {place.file for places in self._places.values() for place in places}:
            check_unchanged(file)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def _next_buffer(self):
        self._n_chunks += 1
        return self._buffers[self._n_chunks % 2]

    def _read(self, place, at, view):
        if place.file not in self._fds:
            if len(self._fds) == MAX_OPEN_FILES:
                self.close()
            self._fds[place.file] = open_unchanged(place.file)
        read_into(self._fds[place.file], view, place.offset + at, place.file.path)

    def _compare(self, view, place, copy, at):
        found = memoryview(bytearray(len(view)))
        self._read(copy, at, found)
        if not np.array_equal(np.frombuffer(view, np.uint8), np.frombuffer(found, np.uint8)):
            raise CheckpointError(
                f"{copy.file.path}: tensor {copy.name} differs from {place.name} in "
                f"{place.file.path}, expected the same bytes, since one of them is to be left out; "
                "fetch the model again"
            )


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells that a file is still the same: device, inode, size, time of the last change."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


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
    except BaseException:
        os.close(fd)
        raise
    return fd


def file_chunks(file: SourceFile) -> Iterator[memoryview]:
    """All bytes of a file, in chunks that stay until the next but one, as `Source.chunks` does."""
    fd = open_unchanged(file)
    size = min(CHUNK_BYTES, file.n_bytes)
    buffers = (memoryview(bytearray(size)), memoryview(bytearray(size)))
    try:
        for n, at in enumerate(range(0, file.n_bytes, CHUNK_BYTES)):
            view = buffers[n % 2][: min(CHUNK_BYTES, file.n_bytes - at)]
            read_into(fd, view, at, file.path)
            yield view
    finally:
        os.close(fd)


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
        raise CheckpointError(f"{file.path}: changed while it was being converted; start again")


def _gone(file, error):
    return StorageError(f"{file.path}: gone while it was being read ({error.strerror})")
