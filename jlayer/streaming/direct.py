"""Reads bytes of files into existing memory: from the page cache what lies there, the rest with
O_DIRECT if the file system supports it.

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
from jlayer.streaming.cached import CachedFile, PageCache, Turn, open_buffered
from jlayer.streaming.place import VIEW_ALIGNMENT

# One request: long enough for the full speed of a disk, short enough to stop within a moment.
REQUEST_BYTES = 16 << 20
ON_DISK = 2  # reads from a disk at a time: with one, it is idle between two requests
# Threads that read. Those that do not have the disk copy from the page cache, make and pin memory
# for what comes next, and check what has come.
LEAST_READERS, MOST_READERS = 4, 8
TABLE_REQUEST_BYTES = 4 << 20  # for reading a whole table, which is not urgent
# What is decoded as it is read takes as much memory more, in each thread that reads.
CODES_REQUEST_BYTES = 1 << 20


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
    reader = Reader({place.file for place in places}, page_cache=PageCache.PAST)
    buffers = [aligned_buffer(REQUEST_BYTES) for _ in range(ON_DISK)]

    def read_every_other(first):
        for place in places[first::ON_DISK]:
            reader.read(place, buffers[first])

    began = time.perf_counter()
    with ThreadPoolExecutor(ON_DISK) as pool:
        list(pool.map(read_every_other, range(ON_DISK)))
    seconds = time.perf_counter() - began
    direct = reader.reads_directly
    reader.close()
    return len(places) * REQUEST_BYTES / seconds if direct else None


def n_readers() -> int:
    """The number of threads that read, by the cores of this process."""
    return max(LEAST_READERS, min(MOST_READERS, len(os.sched_getaffinity(0))))


def aligned_span(segment: Segment) -> tuple[int, int]:
    """(first byte, length) of the aligned blocks around a segment."""
    first = segment.offset // ALIGNMENT * ALIGNMENT
    last = -(-(segment.offset + segment.n_bytes) // ALIGNMENT) * ALIGNMENT
    return first, last - first


def is_moved(segment: Segment, unit: int = VIEW_ALIGNMENT) -> bool:
    """Whether a segment must be moved after reading, since it does not begin at a multiple of
    `unit`. What is decoded is put where it belongs."""
    return segment.nested is None and segment.offset % unit != 0


class Reader:
    """Open files, and reading from them. Every file is opened once, when the reader is made.

    `identities`: of each file when it was checked. Raises CheckpointError if one has changed.
    """

    def __init__(
        self,
        paths: Iterable[str],
        identities: Mapping[str, Identity] | None = None,
        *,
        page_cache: PageCache = PageCache.TAKE,
    ):
        self._identities = identities or {}
        self._files: dict[str, tuple[int, bool]] = {}
        self._cached: dict[str, CachedFile] = {}
        self._filling: dict[str, int] = {}  # by way of the page cache, with the kernel's read-ahead
        self._open_fds: list[int] = []
        self._lock = threading.Lock()
        self._disk = threading.Semaphore(ON_DISK)
        self._stopped = threading.Event()
        self._movers = ThreadPoolExecutor(2, thread_name_prefix="jlayer-reader-moves")
        try:
            for path in paths:
                self._open(path, page_cache)
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def _open(self, path, page_cache):
        self._files[path] = _open(path)
        self._open_fds.append(self._files[path][0])
        if not self._files[path][1] or page_cache is PageCache.PAST:
            return
        self._cached[path] = CachedFile(path)
        found = [self._cached[path].fd]
        if page_cache is PageCache.FILL:
            self._filling[path] = open_buffered(path)
            self._open_fds.append(self._filling[path])
            found.append(self._filling[path])
        for fd in found:
            _check_same(fd, self._files[path][0], path)

    @property
    def reads_directly(self) -> bool:
        """Whether every file is read past the page cache, but for what lies there."""
        return all(direct for _, direct in self._files.values())

    def check_unchanged(self):
        """Raises CheckpointError if a file has changed since it was checked."""
        for path, (fd, _) in self._files.items():
            _check_identity(fd, path, self._identities.get(path))

    def turn(self, *, fills: bool = False) -> Turn:
        """For reads that belong together. `fills`: what comes from the disk stays in the page
        cache, if the reader was made so."""
        return Turn(self._disk, fills=fills)

    def read(
        self,
        segment: Segment,
        into: np.ndarray,
        unit: int = VIEW_ALIGNMENT,
        turn: Turn | None = None,
    ) -> int:
        """Fills `into` (uint8, page-aligned) with the blocks around a segment.

        Returns the offset in `into` at which the segment begins: a multiple of `unit`, which
        divides ALIGNMENT; 0, if it is decoded. Moving inside the slot takes 0.08 s of a core for
        1 GB, through a second buffer 0.14 s; another thread does it during the next request. Raises
        CheckpointError if the file ends early, StorageError if the system cannot read or `stop` was
        called.
        """
        if turn is None:
            with self.turn() as turn:
                return self.read(segment, into, unit, turn)
        if segment.nested is not None:
            return self._read_decoded(segment, into, turn)
        first, length = aligned_span(segment)
        needed = segment.offset + segment.n_bytes - first
        down = (segment.offset - first) % unit
        view = memoryview(into)
        done, moving = 0, None
        try:
            while done < needed:
                if self._stopped.is_set():
                    raise StorageError(f"{segment.file}: reading was stopped")
                request = view[done : min(done + REQUEST_BYTES, length)]
                count = self._request(segment.file, request, first + done, turn)
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

    def _read_decoded(self, segment, into, turn):
        """Fills `into` with what is made of the stored bytes, some of them at a time."""
        stored = segment.stored
        found = into[: segment.n_bytes].view(np.float32)
        buffer = aligned_buffer(min(stored.n_bytes, CODES_REQUEST_BYTES) + 2 * ALIGNMENT)
        for at in range(0, stored.n_bytes, CODES_REQUEST_BYTES):
            count = min(CODES_REQUEST_BYTES, stored.n_bytes - at)
            part = Segment(stored.file, stored.offset + at, count)
            begin = self.read(part, buffer[: aligned_span(part)[1]], turn=turn)
            codes, first = buffer[begin : begin + count], segment.first_code + at
            segment.nested.decode(codes, found[at : at + count], first=first)
        return 0

    def _request(self, path, view, offset, turn):
        cached = self._cached.get(path)
        if cached and (count := cached.read(view, offset)):
            turn.cached_bytes += count
            return count
        try:
            if turn.fills and path in self._filling:
                return os.preadv(self._filling[path], [view], offset)
            turn.take()
            if self._stopped.is_set():  # while it waited
                raise StorageError(f"{path}: reading was stopped")
            return self._from_disk(path, view, offset)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be read at byte {offset} ({error.strerror})"
            ) from None

    def _from_disk(self, path, view, offset):
        fd, direct = self._files[path]
        try:
            return os.preadv(fd, [view], offset)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
        # A file system may accept O_DIRECT at open and refuse it here. The direct descriptor stays
        # open until `close`: another thread may be using it.
        with self._lock:
            if self._files[path][1]:
                self._files[path] = (open_buffered(path), False)
                self._open_fds.append(self._files[path][0])
        return os.preadv(self._files[path][0], [view], offset)

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
        for file in self._cached.values():
            file.close()
        self._files, self._open_fds, self._cached, self._filling = {}, [], {}, {}


class RowReader:
    """Reads single rows of a table by number, through the page cache."""

    def __init__(self, segment: Segment, *, n_rows: int, identity: Identity | None = None):
        self._segment, self._identity = segment, identity
        self._row_bytes = segment.n_bytes // n_rows
        self._fd = open_buffered(segment.file)
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

    def begin_whole(
        self, take: Callable[..., None], page_cache: PageCache = PageCache.TAKE
    ) -> None:
        """Starts reading the whole table once in the background, as a `Reader` does.

        `take(rows, n_rows=..., first_row=...)` is called with the bytes of some rows at a time.
        """
        self._reader = Reader([self._segment.file], page_cache=page_cache)
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
            with self._reader.turn(fills=True) as turn:
                shift = self._reader.read(piece, buffer[: aligned_span(piece)[1]], turn=turn)
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


def _check_same(fd, direct_fd, path):
    """Raises CheckpointError if a file was replaced between two openings of it."""
    if identity_of(os.fstat(fd)) != identity_of(os.fstat(direct_fd)):
        raise CheckpointError(f"{path}: changed while it was opened; open it again")


def _open(path):
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise StorageError(f"{path}: cannot be opened ({error.strerror})") from None
    return open_buffered(path), False
