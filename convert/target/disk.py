"""The few system calls that change the target, with errors in our words and with their syncs.

Nothing here knows what the files are.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from jlayer.errors import DoesNotFitError, JlayerError, StorageError
from jlayer.strict import close, is_there, resolve

# What is being written bears this until it is whole and synced.
TEMPORARY = ".jlayer-tmp"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def failure(path: str, error: OSError, doing: str) -> JlayerError:
    """What to raise for an error of the system: DoesNotFitError where room ran out, else
    StorageError."""
    if error.errno in FULL:
        return DoesNotFitError(
            f"{path}: no room to go on ({error.strerror}); make room or name a folder elsewhere"
        )
    return StorageError(f"{path}: cannot be {doing} ({error.strerror})")


def again(call: Callable, *arguments):
    """Calls until no signal comes between. Python itself does so for reads, writes, opens and
    syncs, but not for renames and the like."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            pass


def make_folders(folder: str) -> list[str]:
    """Makes the folder and those above it, so that a power cut does not unmake them.

    Returns those that were not there, outermost first.
    """
    path, missing = resolve(folder, strict=False), []
    while not is_there(path, follow=False):
        missing.append(path)
        path = os.path.dirname(path)
    made = []
    for path in reversed(missing):
        try:
            again(os.mkdir, path)
            made.append(path)
            sync_folder(os.path.dirname(path))
        except FileExistsError:
            pass  # another run was faster
        except OSError as error:
            raise failure(path, error, "made") from None
    return made


def sync_folder(folder: str) -> None:
    """Makes the folder's names durable. Raises DoesNotFitError or StorageError."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders need no sync says this
            raise failure(folder, error, "synced") from None


def remove(path: str) -> None:
    """Removes a file, which may be gone already."""
    try:
        again(os.unlink, path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise failure(path, error, "removed") from None


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[str]:
    """The name under which to write a file and sync it; at the end it gets its own, for good.

    Where anything fails, nothing is left of it.
    """
    aside = path + TEMPORARY
    try:
        yield aside
        try:
            again(os.rename, aside, path)
        except OSError as error:
            raise failure(path, error, "renamed") from None
        sync_folder(os.path.dirname(path))
    except BaseException:
        # Whatever fails here, the error that brought us here is the one to report.
        with contextlib.suppress(JlayerError):
            remove(aside)
        raise


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of it: a full disk or a signal may cut one write short without an error."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def replace_file(path: str, content: bytes) -> None:
    """A small file with this content, for good and in one step: the old one stays until then."""
    with written_aside(path) as aside:
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                write_all(fd, content, 0)
                os.fsync(fd)
            finally:
                close(fd)
        except OSError as error:
            raise failure(path, error, "written") from None
