"""Reads bytes of files into existing memory: with O_DIRECT if the file system supports it, else
buffered.

Direct reads bypass the page cache: they need no core for the kernel's copy and do not evict useful
pages. They need aligned offset, length and address, so a segment is read with the blocks around it.
If it then begins at an address at which JAX would copy it, it is moved down by a few bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jlayer.checkpoint.source import Identity, identity_of
from jlayer.checkpoint.store import Segment
from jlayer.errors import CheckpointError, StorageError
from jlayer.spec import ALIGNMENT
from jlayer.streaming.place import VIEW_ALIGNMENT

# One request: long enough for the full speed of a disk, short enough to stop within a moment.
REQUEST_BYTES = 16 << 20
TABLE_REQUEST_BYTES = 4 << 20  # for reading a whole table, which is not urgent


def disk_speed(paths, *, most_bytes: int = 256 << 20) -> float | None:
    """Measures bytes/s of reading parts of these files past the page cache, two requests in flight.

    None if there are fewer than four requests' worth, or the file system has no direct reads.
    """
    places = [
        Segment(path, offset, REQUEST_BYTES)
        for path in paths
        for offset in range(
            0, os.path.getsize(path) // REQUEST_BYTES * REQUEST_BYTES, REQUEST_BYTES
        )
    ][: most_bytes // REQUEST_BYTES]
    if len(places) < 4:
        return None
    reader = Reader({place.file for place in places})
    buffers = [aligned_buffer(REQUEST_BYTES) for _ in range(2)]

    def read_every_other(first):
        for place in places[first::2]:
            reader.read(place, buffers[first])

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read_every_other, range(2)))
    seconds = time.perf_counter() - began
    direct = reader.reads_directly
    reader.close()
    return len(places) * REQUEST_BYTES / seconds if direct else None


def aligned_span(segment: Segment) -> tuple[int, int]:
    """(first byte, length) of the aligned blocks around a segment."""
    first = segment.offset // ALIGNMENT * ALIGNMENT
    last = -(-(segment.offset + segment.n_bytes) // ALIGNMENT) * ALIGNMENT
    return first, last - first


def is_moved(segment: Segment, unit: int = VIEW_ALIGNMENT) -> bool:
    """Whether a segment must be moved after reading, since it does not begin at a multiple of
    `unit`."""
    return segment.offset % unit != 0


class Reader:
    """Open files, and reading from them. Every file is opened once, when the reader is made.

    `identities`: of each file when it was checked. Raises CheckpointError if one has changed.
    """

    def __init__(self, paths: Iterable[str], identities: Mapping[str, Identity] | None = None):
        self._identities = identities or {}
        self._files: dict[str, tuple[int, bool]] = {}
        self._open_fds: list[int] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._movers = ThreadPoolExecutor(2, thread_name_prefix="jlayer-reader-moves")
        try:
            for path in paths:
                self._files[path] = _open(path)
                self._open_fds.append(self._files[path][0])
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    @property
    def reads_directly(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(direct for _, direct in self._files.values())

    def check_unchanged(self):
        """Raises CheckpointError if a file has changed since it was checked."""
        for path, (fd, _) in self._files.items():
            _check_identity(fd, path, self._identities.get(path))

    def read(self, segment: Segment, into: np.ndarray, unit: int = VIEW_ALIGNMENT) -> int:
        """Fills `into` (uint8, page-aligned) with the blocks around a segment.

        Returns the offset in `into` at which the segment begins: a multiple of `unit`, which
        divides ALIGNMENT. Moving inside the slot takes 0.08 s of a core for 1 GB, through a second
        buffer 0.14 s; another thread does it during the next request. Raises CheckpointError if the
        file ends early, StorageError if the system cannot read or `stop` was called.
        """
        first, length = aligned_span(segment)
        needed = segment.offset + segment.n_bytes - first
        down = (segment.offset - first) % unit
        view = memoryview(into)
        done, moving = 0, None
        try:
            while done < needed:
                if self._stopped.is_set():
                    raise StorageError(f"{segment.file}: reading was stopped")
                count = self._request(
                    segment.file, view[done : min(done + REQUEST_BYTES, length)], first + done
                )
                if count == 0:
                    raise CheckpointError(
                        f"{segment.file}: ends at byte {first + done}, expected {first + needed}; "
                        "it was cut off"
                    )
                begin = max(done, down)
                if down and begin < done + count:  # a short read may end before the segment begins
                    if moving:
                        moving.result()
                    moving = self._movers.submit(_move, into, begin, done + count, down)
                done += count
        finally:
            if moving:
                moving.result()  # nothing may write to the slot after this returns
        return segment.offset - first - down

    def _request(self, path, view, offset):
        fd, direct = self._files[path]
        try:
            return os.preadv(fd, [view], offset)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                # A file system may accept O_DIRECT at open and refuse it here. The direct
                # descriptor stays open until `close`: another thread may be using it.
                with self._lock:
                    if self._files[path][1]:
                        self._files[path] = (_open_buffered(path), False)
                        self._open_fds.append(self._files[path][0])
                return self._request(path, view, offset)
            raise StorageError(
                f"{path}: cannot be read at byte {offset} ({error.strerror})"
            ) from None

    def stop(self):
        """Makes running reads fail at their next request, until `resume`."""
        self._stopped.set()

    def resume(self):
        self._stopped.clear()

    def close(self):
        self.stop()
        self._movers.shutdown(wait=True)
        for fd in self._open_fds:
            os.close(fd)
        self._files, self._open_fds = {}, []


class RowReader:
    """Reads single rows of a table by number, through the page cache."""

    def __init__(self, segment: Segment, *, n_rows: int, identity: Identity | None = None):
        self._segment, self._identity = segment, identity
        self._row_bytes = segment.n_bytes // n_rows
        self._fd = _open_buffered(segment.file)
        self._whole: Future | None = None
        self._pool = self._reader = None

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, integers [n] -> uint8 [n, row bytes]. Raises as `Reader.read` does."""
        n_bytes = self._row_bytes
        output = np.empty((len(rows), n_bytes), np.uint8)
        whole = memoryview(output).cast("B")
        for i, row in enumerate(rows.tolist()):
            offset = self._segment.offset + row * n_bytes
            try:
                count = os.preadv(self._fd, [whole[i * n_bytes : (i + 1) * n_bytes]], offset)
            except OSError as error:
                raise StorageError(
                    f"{self._segment.file}: cannot be read at byte {offset} ({error.strerror})"
                ) from None
            if count != n_bytes:
                raise CheckpointError(
                    f"{self._segment.file}: ends before row {row}; it was cut off"
                )
        _check_identity(self._fd, self._segment.file, self._identity)
        return output

    def begin_whole(self, take: Callable[..., None]) -> None:
        """Starts reading the whole table once in the background, past the page cache.

        `take(rows, n_rows=..., first_row=...)` is called with the bytes of some rows at a time.
        """
        self._reader = Reader([self._segment.file])
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jlayer-table")
        self._whole = self._pool.submit(self._read_whole, take)

    def settle(self) -> None:
        """Waits for `begin_whole`, if it was called; raises its error."""
        if self._whole is not None:
            self._whole.result()

    def _read_whole(self, take):
        n_rows = self._segment.n_bytes // self._row_bytes
        at_once = max(1, TABLE_REQUEST_BYTES // self._row_bytes)
        buffer = aligned_buffer(at_once * self._row_bytes + 2 * ALIGNMENT)
        for row in range(0, n_rows, at_once):
            count = min(at_once, n_rows - row)
            offset = self._segment.offset + row * self._row_bytes
            piece = Segment(self._segment.file, offset, count * self._row_bytes)
            shift = self._reader.read(piece, buffer[: aligned_span(piece)[1]])
            take(buffer[shift : shift + piece.n_bytes], n_rows=count, first_row=row)

    def close(self):
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._whole is not None:
            self._reader.stop()
            self._pool.shutdown(wait=True)
            self._reader.close()
            self._whole = None


def aligned_buffer(n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes] at an address that is a multiple of ALIGNMENT."""
    buffer = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    return buffer[-buffer.ctypes.data % ALIGNMENT :][:n_bytes]


def _move(memory, begin, end, by):
    """Moves bytes down by `by` within memory. numpy would make a temporary copy."""
    address = memory.ctypes.data
    ctypes.memmove(address + begin - by, address + begin, end - begin)


def _check_identity(fd, path, identity):
    if identity is not None and identity_of(os.fstat(fd)) != identity:
        raise CheckpointError(f"{path}: changed since the model was opened; open it again")


def _open(path):
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise StorageError(f"{path}: cannot be opened ({error.strerror})") from None
    return _open_buffered(path), False


def _open_buffered(path):
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened ({error.strerror})") from None
