"""The kernel's page cache: what of a file lies there, and who of the readers goes by way of it.

From there a file is read ten times as fast as from a disk. It is the kernel's memory, not ours: it
counts to no budget, and goes as soon as somebody needs it.
"""

from __future__ import annotations

import os
import random
import threading
from enum import Enum

from jlayer.errors import StorageError
from jlayer.spec import ALIGNMENT

# Pages of a request that are asked for first. If a hole lies between them, the read ends there.
PROBES = 16
_PAGE = 4096
# For a file to be left in the page cache, so many times its bytes must be free beside all that the
# plan may still take: nothing else is to be pushed out for it.
FREE_FOR_FILES = 1.5


class PageCache(Enum):
    """PAST: nothing is taken from it. TAKE: what lies there is taken. FILL: and what is read once
    is left there, for the next start."""

    PAST = "past"
    TAKE = "take"
    FILL = "fill"


def page_cache_use(keeps_layers: bool, *, kept_bytes: int, free_bytes: int) -> PageCache:
    """How the page cache is used for a model of which `kept_bytes` are read once.

    `keeps_layers`: False where all shall be read from disk. `free_bytes`: of memory, beside what
    the plan may still take.
    """
    if not keeps_layers:
        return PageCache.PAST
    return PageCache.FILL if free_bytes >= FREE_FOR_FILES * kept_bytes else PageCache.TAKE


class CachedFile:
    """An open file, of which only what lies in the page cache is read."""

    def __init__(self, path: str):
        self._draw = random.Random()
        self._answers = hasattr(os, "RWF_NOWAIT")  # macOS has none
        self.fd = open_buffered(path)
        self._size = os.fstat(self.fd).st_size
        if hasattr(os, "posix_fadvise"):
            # A page that is asked for and not there is brought in by the kernel (6.18 does);
            # without this advice, so are those after it.
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, into: memoryview, offset: int) -> int:
        """Reads what lies in the page cache from `offset` on, up to the first page that does not.

        Returns the bytes: 0 for none, else a multiple of ALIGNMENT, or all up to the file's end.
        Some pages, drawn at random, are asked for first: a long request for what is not there would
        make the kernel read it (8 MiB of 16). At random, since the next start would find the pages
        that this one asked for.
        """
        n_pages = -(-min(len(into), self._size - offset) // _PAGE)
        if n_pages <= 0:
            return 0
        probe = memoryview(bytearray(1))
        for page in self._draw.sample(range(n_pages), min(PROBES, n_pages)):
            if not self._now(probe, offset + page * _PAGE):
                return 0
        count = self._now(into, offset)
        return count if offset + count == self._size else count // ALIGNMENT * ALIGNMENT

    def _now(self, into, offset):
        """Bytes that were read without waiting for a disk."""
        if not self._answers:
            return 0
        try:
            return os.preadv(self.fd, [into], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # a file system without it; or a broken disk, which the read itself finds
            self._answers = False
            return 0

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Turn:
    """A read of parts that belong together, such as a tile's. In a `with`, it has the disk from its
    first `take` on. `fills`: it reads by way of the page cache, and leaves it filled.

    `cached_bytes`: what it found in the page cache.
    """

    def __init__(self, disk: threading.Semaphore, *, fills: bool = False):
        self._disk, self._has_disk = disk, False
        self.fills, self.cached_bytes = fills, 0

    def take(self) -> None:
        """Waits for the disk, unless this turn has it."""
        if not self._has_disk:
            self._disk.acquire()
            self._has_disk = True

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_) -> None:
        if self._has_disk:
            self._disk.release()
            self._has_disk = False


def open_buffered(path: str) -> int:
    """A descriptor that reads by way of the page cache. Raises StorageError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened ({error.strerror})") from None
