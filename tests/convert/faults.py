"""The system as it is on a bad day: calls that fail, fall short, or are the last of the process.

Wraps the functions of `os` through which a conversion reaches the disk, so that it needs neither
privileges nor other programs. What Python does itself (going on after a signal inside a read, a
write or a sync) is below this; strace, in benchmarks/convert_torture.py, is below that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Callable

# What changes the disk, and with it all that a crash can come between.
CHANGES = ("open", "pwrite", "fsync", "fdatasync", "rename", "unlink", "mkdir", "rmdir")
CALLS = (
    *CHANGES,
    *("preadv", "pread", "read", "stat", "lstat", "fstat", "listdir", "statvfs", "readlink"),
    *("ftruncate", "close", "posix_fadvise", "flock"),
)
_MODULES = {"flock": fcntl}


@contextlib.contextmanager
def watched(before: Callable, names=CALLS):
    """Takes every call of these by way of `before(number, name, arguments)`.

    It may raise, or kill, or return arguments to call with instead; None leaves them.
    """
    lock, count, real = threading.Lock(), 0, {}

    def wrap(name, function):
        def call(*arguments, **options):
            nonlocal count
            if name == "open" and names is CHANGES and not arguments[1] & os.O_CREAT:
                return function(*arguments, **options)
            with lock:
                number, count = count, count + 1
            arguments = before(number, name, arguments) or arguments
            return function(*arguments, **options)

        return call

    for name in names:
        module = _MODULES.get(name, os)
        real[name] = getattr(module, name)
        setattr(module, name, wrap(name, real[name]))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(_MODULES.get(name, os), name, function)


def counted(work: Callable, names=CALLS) -> list[str]:
    """The names of the calls that `work` makes, in order."""
    found = []
    with watched(lambda number, name, arguments: found.append(name), names):
        work()
    return found


def failing(nth: int, code: int, names=CALLS):
    """The nth call fails with this error, once."""

    def before(number, name, arguments):
        if number == nth:
            raise OSError(code, os.strerror(code))

    return watched(before, names)


def cut_short(nth: int):
    """The nth read or write takes only a part of what it was asked for."""

    def before(number, name, arguments):
        if number != nth:
            return None
        fd, data, *rest = arguments
        if name == "preadv":
            return (fd, [data[0][: max(1, len(data[0]) // 3)]], *rest)
        return (fd, data[: max(1, len(data) // 3)], *rest)

    return watched(before, ("preadv", "pwrite"))


def killed_before(nth: int, work: Callable, names=CHANGES) -> bool:
    """Runs `work` in a process of its own that is killed before its nth call; whether it was.

    The caller must have no other thread: a fork copies only one.
    """

    def before(number, name, arguments):
        if number == nth:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    child = os.fork()
    if child == 0:
        code = 1
        try:
            with watched(before, names):
                work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed before it could be killed"
    return False
