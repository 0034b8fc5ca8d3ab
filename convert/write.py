"""The target folder: whether it may be written, and files that appear in it whole or not at all.

A file is written aside, synced, renamed, and its folder synced, so that after a power cut a name in
the folder stands for complete bytes. Where the bytes come from is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Sequence

from convert.read import Chunk, hash_stream
from jlayer.errors import DoesNotFitError, JlayerError, StorageError, UsageError
from jlayer.weights.layout import EMBED_FILE, INDEX, MANIFEST, SIDE_FILES, is_weight_file

TEMPORARY = ".jlayer-tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(target: str, *, source: str) -> list[str]:
    """The names that lie in the target folder, which are all of a layered checkpoint.

    Raises UsageError (the source or inside it, no folder, holding anything else) or StorageError
    (not writable).
    """
    _refuse_inside(target, source)
    if not os.path.lexists(target):
        _check_writable(_existing_parent(target))
        return []
    if not os.path.isdir(target):
        raise UsageError(f"{target}: not a folder; name a new one, or an empty one")
    try:
        names = sorted(os.listdir(target))
    except OSError as error:
        raise _failure(target, error, "read") from None
    begun = EMBED_FILE in names or MANIFEST in names
    foreign = [repr(name) for name in names if not _is_ours(name, begun)]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UsageError(
            f"{target}: holds what is no layered checkpoint ({', '.join(foreign[:5])}{more}); "
            f"name another folder for {source}"
        )
    _check_writable(target)
    return names


def check_space(target: str, sizes: Sequence[int], *, replaced: Iterable[str] = ()) -> None:
    """Raises DoesNotFitError where files of these sizes do not fit, once `replaced` are gone."""
    try:
        status = os.statvfs(_existing_parent(target))
        gone = [os.lstat(os.path.join(target, name)).st_blocks * 512 for name in replaced]
    except OSError as error:
        raise _failure(target, error, "looked at") from None
    block = status.f_frsize
    need = sum(-(-size // block) * block for size in sizes)
    have = status.f_bavail * block + sum(gone)
    if need > have:
        raise DoesNotFitError(
            f"{target}: need {need:,} bytes, have {have:,} free on its file system; "
            f"free {need - have:,} more, or name a folder elsewhere"
        )
    if status.f_files and len(sizes) > status.f_favail + len(gone):
        raise DoesNotFitError(
            f"{target}: need {len(sizes)} files, have room for {status.f_favail + len(gone)} "
            "(inodes) on its file system; name a folder elsewhere"
        )


def remove_temporaries(target: str, names: Iterable[str]) -> list[str]:
    """Removes what an interrupted run has left half-written; returns the other names."""
    for name in names:
        if name.endswith(TEMPORARY):
            _remove(os.path.join(target, name))
    return [name for name in names if not name.endswith(TEMPORARY)]


class TargetWriter:
    """Writes files into a folder; used as a context, an error takes back all that was written."""

    def __init__(self, folder: str):
        self.folder = folder
        self._written: list[str] = []
        self._made: list[str] = []

    def __enter__(self) -> TargetWriter:
        existing = _existing_parent(self.folder)
        below = os.path.relpath(os.path.realpath(self.folder), existing)
        path = existing
        try:
            for name in [] if below == os.curdir else below.split(os.sep):
                path = os.path.join(path, name)
                os.mkdir(path)
                self._made.append(path)
                _sync_folder(os.path.dirname(path))
        except OSError as error:
            self._take_back()
            raise _failure(path, error, "made") from None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self._take_back()

    def clear(self, names: Iterable[str]) -> None:
        """Removes files of an earlier run: the manifest first, so that none outlives its files."""
        names = list(names)
        if MANIFEST in names:
            _remove(os.path.join(self.folder, MANIFEST))
            self._sync()
        for name in names:
            if name != MANIFEST:
                _remove(os.path.join(self.folder, name))

    def write(self, name: str, chunks: Iterable[Chunk], *, n_bytes: int) -> str:
        """Writes one file of `n_bytes` bytes and returns their SHA-256.

        Raises DoesNotFitError or StorageError, and whatever `chunks` raises.
        """
        path = os.path.join(self.folder, name)
        aside = path + TEMPORARY
        try:
            found, digest = _write_synced(aside, chunks)
            assert found == n_bytes, (name, found, n_bytes)
            self._written.append(name)
            os.rename(aside, path)
            self._sync()
        except OSError as error:
            raise _failure(path, error, "written") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(aside)
        return digest

    def _sync(self):
        try:
            _sync_folder(self.folder)
        except OSError as error:
            raise _failure(self.folder, error, "synced") from None

    def _take_back(self):
        # Whatever fails here, the error that brought us here is the one to report.
        with contextlib.suppress(OSError, JlayerError):
            self.clear(reversed(self._written))
            for folder in reversed(self._made):
                os.rmdir(folder)


def _write_synced(path, chunks):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        found = hash_stream(chunks, lambda chunk: _write_all(fd, chunk))
        os.fsync(fd)
    finally:
        os.close(fd)
    return found


def _write_all(fd, chunk):
    """One write may take only part: a full disk or a signal cuts it short without an error."""
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]
    # Dirty pages are sent to the disk now, which leaves little to the sync at the end: 1 GB took
    # 0.6 s instead of 0.9 (medians of 3).
    with contextlib.suppress(OSError):  # a hint, which not every file system takes
        end = os.lseek(fd, 0, os.SEEK_CUR)
        os.posix_fadvise(fd, end - len(chunk), len(chunk), os.POSIX_FADV_DONTNEED)


def _sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders need no sync says this
            raise
    finally:
        os.close(fd)


def _remove(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _failure(path, error, "removed") from None


def _is_ours(name, begun):
    """A folder of nothing but config and tokenizer is a download cut short, not a run of ours."""
    if name.endswith(TEMPORARY) or is_weight_file(name):
        return True
    return begun and (name in SIDE_FILES or name in (MANIFEST, INDEX))


def _refuse_inside(target, source):
    try:
        origin = os.stat(source)
    except OSError:
        return  # the source's own door says what is wrong with it
    path = os.path.realpath(target)
    while True:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), origin):
                word = (
                    "is the source" if path == os.path.realpath(target) else "is inside the source"
                )
                raise UsageError(f"{target}: {word} {source}; name a folder elsewhere")
        if path == os.path.dirname(path):
            return
        path = os.path.dirname(path)


def _existing_parent(path):
    path = os.path.realpath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _check_writable(folder):
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise UsageError(f"{folder}: not a folder; the target cannot lie in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: not writable (or read-only); name a folder elsewhere")


def _failure(path, error, doing):
    if error.errno in _FULL:
        return DoesNotFitError(
            f"{path}: no room to go on ({error.strerror}); free some, and convert again"
        )
    return StorageError(f"{path}: cannot be {doing} ({error.strerror})")
