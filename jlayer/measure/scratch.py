"""A large table of numbers in a temporary file, with its space reserved before the first write.

The table is read and written by system calls, which report a full or failing disk as an error. A
memory map of a sparse file would raise SIGBUS, which ends the process.
"""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np

from jlayer.errors import DoesNotFitError, StorageError, UsageError
from jlayer.sizes import human

# The file system cannot reserve space: compare with the free space that it reports.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Scratch:
    """float32 [n_rows, width] in an unnamed file in `folder`, deleted when it is closed.

    Default folder: the system's for temporary files. It is indexed like an array, with a
    one-dimensional array of rows and a slice of columns. Raises UsageError if the folder is missing
    or not writable.
    """

    def __init__(self, folder: str | None = None):
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        self._width = 0
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"scratch: {self.folder}: {error.strerror}; "
                "name a folder that can be written to (--scratch DIR)"
            ) from None

    def reserve(self, n_rows: int, width: int) -> None:
        """Reserves space for the table. Raises DoesNotFitError with the needed and free bytes."""
        self._width = width
        needed = n_rows * width * np.dtype(np.float32).itemsize
        try:
            os.posix_fallocate(self._file.fileno(), 0, needed)
        except OSError as error:
            if error.errno in _FULL or (error.errno in _CANNOT_RESERVE and needed > self._free()):
                raise self._does_not_fit(needed, error) from None
            if error.errno not in _CANNOT_RESERVE:
                raise self._failure("reserving space", error) from None

    def __setitem__(self, at: tuple[np.ndarray, slice], values: np.ndarray) -> None:
        """Raises StorageError."""
        rows, columns = at
        lines = np.ascontiguousarray(values, np.float32)
        for row, line in zip(rows, lines, strict=True):
            self._each("writing", os.pwrite, line, self._offset(row, columns))

    def __getitem__(self, at: tuple[np.ndarray, slice]) -> np.ndarray:
        """Raises StorageError."""
        rows, columns = at
        lines = np.empty((len(rows), columns.stop - columns.start), np.float32)
        for row, line in zip(rows, lines, strict=True):
            self._each("reading", _pread, line, self._offset(row, columns))
        return lines

    def _offset(self, row, columns):
        item_bytes = np.dtype(np.float32).itemsize
        return (int(row) * self._width + columns.start) * item_bytes

    def _each(self, doing, move, line, offset):
        """Moves all bytes of a line; one call may move fewer."""
        rest = memoryview(line).cast("B")
        while rest:
            try:
                moved = move(self._file.fileno(), rest, offset)
                if moved == 0:
                    raise OSError(errno.EIO, "the file ends here")
            except OSError as error:
                raise self._failure(f"{doing} at byte {offset}", error) from None
            rest, offset = rest[moved:], offset + moved

    def _free(self):
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def _does_not_fit(self, needed, error):
        free = self._free()
        report = {"scratch": {"folder": self.folder, "needed_bytes": needed, "free_bytes": free}}
        return DoesNotFitError(
            f"scratch: {self.folder}: the first model's logits need {human(needed)}, free "
            f"{human(free)} ({os.strerror(error.errno)}); name another folder (--scratch DIR) or "
            "use fewer tokens (--max-tokens N)",
            report=report,
        )

    def _failure(self, doing, error):
        return StorageError(
            f"scratch: {self.folder}: {doing} failed: {error.strerror}; name another folder "
            "(--scratch DIR)"
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _pread(file, into, offset):
    return os.preadv(file, [into], offset)
