"""Source tensors as streams of chunks: the protocol, and tensors that lie in files.

Never holds a whole tensor. The model was checked by `open`; nothing here knows the target.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from jlayer.checkpoint.source import SourceFile, identity_of, refuse_different
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.spec import STORED_BYTES
from jlayer.strict import close, open_regular

# Weights are examined right after they are read: a chunk should still be in the processor's cache.
CHUNK_BYTES = 1 << 20
# Of a matrix whose columns lie one after another so much is read at a time, and turned in memory.
TURNED_BYTES = 32 << 20
# So many columns at once stay in the processor's cache: four times as fast as all.
TURNED_COLUMNS = 512
# Bytes that are only hashed: larger chunks switch threads less often.
WHOLE_FILE_BYTES = 4 << 20
MAX_OPEN_FILES = 16

Chunk = bytes | memoryview
# Lends memory for the next chunk: at most as many bytes as asked for, and never part of a number.
Room = Callable[[int], memoryview]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a source: the numpy name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * STORED_BYTES[self.dtype]

    def seen_as(self, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        """The same bytes as numbers of another dtype, or in another shape."""
        return TensorInfo(dtype, shape)


class Source(Protocol):
    """Tensors under their published names, in whatever form they are stored."""

    tensors: Mapping[str, TensorInfo]

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        """The tensor's bytes in order (row-major, little-endian), in chunks of whole elements.

        A chunk stays valid while the next one is in use, and is overwritten by the one after, of
        this tensor or another. It may be the memory that `room` lent last.
        """

    def where(self, name: str) -> str:
        """The path that a message about this tensor names."""

    def places_of(self, name: str) -> tuple[Place, ...]:
        """Every place that is read for this tensor: its own, its parts', its copies'."""

    def close(self) -> None:
        """Closes its files; they are opened again when they are needed."""


@dataclass(frozen=True)
class Strided:
    """A view of a stored array: its shape, and its strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Checksum:
    """The CRC-32 of the next `n_bytes` bytes."""

    n_bytes: int
    crc: int


@dataclass(frozen=True)
class Place:
    """Where a tensor, or a copy or part of it, is stored; `name` is its name there.

    `strided` is None where its bytes lie in order; `checksum` is None where the file has none.
    """

    name: str
    file: SourceFile
    offset: int
    strided: Strided | None = None
    checksum: Checksum | None = None


class FileSource:
    """Tensors in files that were checked. Copies of a tensor are compared while it is read."""

    def __init__(self, tensors: dict[str, TensorInfo], places: dict[str, tuple[Place, ...]]):
        self.tensors = tensors
        self._places = places
        self._fds: dict[SourceFile, int] = {}
        self._buffers = (memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES)))
        self._n_chunks = 0
        self._sums: dict[Place, tuple[int, int]] = {}  # bytes read so far, and their CRC-32
        self._turned: _Turned | None = None  # what was read last of a matrix by its columns

    def where(self, name: str) -> str:
        return self._places[name][0].file.path

    def places_of(self, name: str) -> tuple[Place, ...]:
        return self._places[name]

    def chunks(self, name: str, room: Room | None = None) -> Iterator[memoryview]:
        place, *copies = self._places[name]
        info = self.tensors[name]
        at, total, step = 0, info.n_bytes, CHUNK_BYTES
        if any(copy.strided for copy in (place, *copies)):
            step = max(1, CHUNK_BYTES // row_bytes(info)) * row_bytes(info)
            room = None  # lent memory may end within a row
        memory = room or self._next_buffer
        while at < total:
            view = memory(min(step, total - at))
            self.read_place(place, at, view, info)
            for copy in copies:
                self._compare(view, place, copy, at, info)
            yield view
            at += len(view)

    def close(self) -> None:
        for fd in self._fds.values():
            close(fd)
        self._fds, self._turned = {}, None

    def read_place(self, place: Place, at: int, view: memoryview, info: TensorInfo) -> None:
        """Fills `view` with the bytes of the tensor at `place` from byte `at` on.

        Of a strided tensor only whole rows. Raises CheckpointError (a checksum that differs, a file
        that changed) or StorageError.
        """
        if place.file not in self._fds:
            if len(self._fds) == MAX_OPEN_FILES:
                self.close()
            self._fds[place.file] = open_unchanged(place.file)
        fd = self._fds[place.file]
        if place.strided is not None:
            item = STORED_BYTES[info.dtype]
            first, rows = at // row_bytes(info), np.frombuffer(view, f"u{item}")
            if _is_turned(place.strided):
                self._read_turned(fd, place, first, rows.reshape(-1, info.shape[1]))
            else:
                _read_strided(fd, place, first, rows)
            return
        read_into(fd, view, place.offset + at, place.file.path)
        if place.checksum is not None:
            self._check_sum(place, at, view)

    def _read_turned(self, fd, place, first, rows):
        """Fills `rows` with those of a matrix from `first` on, whose columns lie one by one."""
        if self._turned is None or not self._turned.has(place, first, len(rows)):
            self._turned = None  # its memory is released before more is taken
            self._turned = _read_columns(fd, place, first, rows)
        at = first - self._turned.first
        turned = self._turned.columns[:, at : at + len(rows)].T
        for column in range(0, turned.shape[1], TURNED_COLUMNS):
            some = slice(column, column + TURNED_COLUMNS)
            rows[:, some] = turned[:, some]

    def _next_buffer(self, n_bytes):
        if n_bytes > CHUNK_BYTES:
            return memoryview(bytearray(n_bytes))
        self._n_chunks += 1
        return self._buffers[self._n_chunks % 2][:n_bytes]

    def _check_sum(self, place, at, view):
        """Adds the chunk to the CRC-32 of a tensor that is read in order; compares it at the end.

        1.9 GB/s on one core; SHA-256, which runs in its own thread, makes 1.1 GB/s.
        """
        done, crc = self._sums.pop(place, (0, 0)) if at else (0, 0)
        if done != at:
            return
        crc, done = zlib.crc32(view, crc), at + len(view)
        if done < place.checksum.n_bytes:
            self._sums[place] = (done, crc)
        elif crc != place.checksum.crc:
            raise CheckpointError(
                f"{place.file.path}: tensor {place.name} is damaged: its CRC-32 is {crc:08x}, "
                f"expected {place.checksum.crc:08x}; fetch the file again"
            )

    def _compare(self, view, place, copy, at, info):
        other = memoryview(bytearray(len(view)))
        self.read_place(copy, at, other, info)
        if not np.array_equal(np.frombuffer(view, np.uint8), np.frombuffer(other, np.uint8)):
            refuse_different(copy, place)


def rows_of(
    place: Place, info: TensorInfo, first: int, n: int, *, inputs_first: bool
) -> tuple[Place, TensorInfo]:
    """`n` rows from `first` on, of a tensor [experts, rows, ...] that is not cut within an
    expert's; what a row has is on one axis. `inputs_first`: of one [experts, columns, rows]. A
    checksum is of the whole, so that a part of it has none. Raises UnsupportedModelError for a
    strided tensor whose rows have more axes than one."""
    if place.strided and len(info.shape) > 3:
        raise UnsupportedModelError(
            f"{place.file.path}: tensor {place.name} is a view of another order, which is not "
            "supported; save it contiguous"
        )
    shape, item = info.shape, STORED_BYTES.get(info.dtype, 1)
    in_order = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = place.strided.strides if place.strided else in_order
    if inputs_first:
        shape, strides = ((of[0], of[2], of[1]) for of in (shape, strides))
    n_columns = (math.prod(shape[2:]),) if shape[2:] else ()
    expert, row = divmod(first, shape[1])
    at = place.offset + (expert * strides[0] + row * strides[1]) * item
    part = TensorInfo(info.dtype, (n, *n_columns))
    is_strided = inputs_first or place.strided
    view = Strided(part.shape, strides[1:]) if is_strided else None
    return replace(place, offset=at, strided=view, checksum=None), part


def row_bytes(info: TensorInfo) -> int:
    """Bytes of one index of a tensor's first axis."""
    return math.prod(info.shape[1:]) * STORED_BYTES[info.dtype]


def check_unchanged(file: SourceFile) -> None:
    """Raises CheckpointError where the file changed after it was checked, or StorageError where it
    is gone."""
    try:
        status = os.stat(file.real)
    except OSError as error:
        raise _gone(file, error) from None
    _check_identity(status, file)


def open_unchanged(file: SourceFile) -> int:
    """A descriptor, for reading, of a file that was checked. Raises what `check_unchanged` does."""
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
    """All bytes of a file, in chunks that stay valid as those of `Source.chunks` do."""
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
    """Fills `view` with the file's bytes from `offset` on.

    Raises StorageError, or CheckpointError where the file ends before.
    """
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


@dataclass(frozen=True)
class _Turned:
    """Some rows of a matrix, from `first` on, as they were read: [columns, rows]."""

    place: Place
    first: int
    columns: np.ndarray

    def has(self, place: Place, first: int, n_rows: int) -> bool:
        end = self.first + self.columns.shape[1]
        return self.place == place and self.first <= first and first + n_rows <= end


def _is_turned(strided):
    """Whether it is a matrix whose columns lie one after another, each in order."""
    shape, strides = strided.shape, strided.strides
    return len(shape) == 2 and strides[0] == 1 and strides[1] >= shape[0] > 1


def _read_columns(fd, place, first, rows):
    """Reads as many rows of such a matrix as TURNED_BYTES hold, at least as many as `rows`.

    A matrix is read several times then, a part of each column every time: the system is asked to
    have all of it at hand first, since it would take it for scattered reads.
    """
    (n_rows, n_columns), (_, step) = place.strided.shape, place.strided.strides
    item = rows.itemsize
    count = max(len(rows), TURNED_BYTES // (n_columns * item))
    columns = np.empty((n_columns, min(count, n_rows - first)), rows.dtype)
    if first == 0:
        with contextlib.suppress(OSError):  # a hint that some file systems refuse
            n_bytes = ((n_columns - 1) * step + n_rows) * item
            os.posix_fadvise(fd, place.offset, n_bytes, os.POSIX_FADV_WILLNEED)
    for number, column in enumerate(columns):
        offset = place.offset + (number * step + first) * item
        read_into(fd, memoryview(column).cast("B"), offset, place.file.path)
    return _Turned(place, first, columns)


def _read_strided(fd, place, first_row, rows):
    """Fills `rows` with the elements of a strided tensor's rows from `first_row` on.

    Reads runs along the axis with the smaller stride and keeps every n-th element of them, which
    costs one read a run, not one a number.
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


def are_same(one: Iterable[Chunk], other: Iterable[Chunk]) -> bool:
    """Whether two streams in chunks of the same sizes hold the same bytes; ends where they
    differ."""
    return all(
        np.array_equal(np.frombuffer(chunk, np.uint8), np.frombuffer(again, np.uint8))
        for chunk, again in zip(one, other, strict=True)
    )


def hash_stream(
    chunks: Iterable[Chunk], sink: Callable[[Chunk], None] | None = None
) -> tuple[int, str]:
    """Hashes every chunk and hands it to `sink`; returns the number of bytes and their SHA-256.

    Hashing is the slowest part of a conversion, so a second thread does it while this one hands the
    chunk on and asks for the next. That is why a source keeps two chunks valid.
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
            f"{file.path}: changed while it was being converted; convert again with --overwrite"
        )


def _gone(file, error):
    return StorageError(f"{file.path}: gone while it was being read ({error.strerror})")
