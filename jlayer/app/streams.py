"""The process's own stdin, stdout and stderr, as a shell may hand them over: closed, full, without
a reader, or in an encoding that lacks characters.

Results go to stdout, so what cannot be written there ends the program: exit code 6, or quietly
where the reader has left. Progress on stderr is not worth a run: what cannot be written there is
dropped. The command line calls `prepare` first; a program that imports jlayer keeps its streams.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import stat
import sys
from contextlib import contextmanager

from jlayer.errors import StorageError

_is_quiet = False
ESCAPED = "jlayer-escaped"  # the name of our error handler
_NAMES = ("stdin", "stdout", "stderr")


class OutputError(StorageError):
    """Stdout cannot be written."""


class ReaderLeft(Exception):
    """The program that read our stdout has ended."""


def prepare() -> None:
    """Makes the standard streams fit to use; see the module's docstring.

    Each closed descriptor is opened on the null device, so that no other file gets its number: what
    a library writes to descriptor 2 would go into that file. `sys.stdin` stays None where it was
    closed.
    """
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None and not _is_open(number):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    codecs.register_error(ESCAPED, _Escapes())
    # Whatever PYTHONUNBUFFERED says: what is to be seen at once on stdout is flushed, and a verb
    # that prints a result is not broken off in its middle.
    by_line = is_terminal(sys.stdout)
    sys.stdout = _replaced(sys.stdout, _Results(1, "wb", closefd=False), ESCAPED, by_line)
    sys.stderr = _replaced(sys.stderr, _Messages(2, "wb", closefd=False), "backslashreplace", True)


@contextmanager
def quiet(is_on: bool = True):
    """Holds back what `tell` would say, and what is drawn, while it is entered (--quiet)."""
    global _is_quiet
    before, _is_quiet = _is_quiet, is_on
    try:
        yield
    finally:
        _is_quiet = before


def tell(line: str) -> None:
    """Says on stderr how a run goes: a line that is no result and no error."""
    if not _is_quiet:
        print(f"jlayer: {line}", file=sys.stderr)


def draws() -> bool:
    """Whether stderr is a terminal on which progress may be drawn and drawn over."""
    is_able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return is_able and not _is_quiet and is_terminal(sys.stderr)


def is_terminal(stream) -> bool:
    """Whether a person is at the other end. `stream` may be None: closed."""
    return stream is not None and stream.isatty()


def is_pipe() -> bool:
    """Whether another program reads stdout."""
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode
    except (OSError, ValueError):  # a stream without a descriptor
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def conversion_progress():
    """What a conversion, an export or a verification reports to."""
    from jlayer.convert.progress import Progress, StderrProgress

    return Progress() if _is_quiet else StderrProgress()


def takes_utf8(stream) -> bool:
    """Whether `stream` can write every character. One of our tests' own has no encoding."""
    return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"


def read_all() -> bytes | None:
    """All of stdin; None where it is closed. Raises StorageError."""
    if sys.stdin is None:
        return None
    parts = []
    try:
        while (part := sys.stdin.buffer.read()) != b"":
            if part is None:  # another program has set it to return at once
                select.select([sys.stdin], [], [])
            else:
                parts.append(part)
    except (OSError, ValueError) as error:
        raise StorageError(f"stdin: {_reason(error)}; give the prompt in another way") from None
    return b"".join(parts)


def _is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _replaced(stream, raw, errors, by_line):
    """A text stream over `raw` in the encoding of `stream`."""
    encoding = "utf-8" if stream is None else stream.encoding
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=by_line)


class _Output(io.FileIO):
    """A descriptor that waits where another program has set it to return at once."""

    is_lost = False  # what comes after a failure is dropped: Python flushes again at its end

    def write(self, data):
        if self.is_lost:
            return len(data)
        try:
            while (n_bytes := super().write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            self.is_lost = True
            self.fail(error)
            return len(data)
        return n_bytes


class _Results(_Output):
    def fail(self, error):
        if isinstance(error, BrokenPipeError):
            raise ReaderLeft from None
        raise OutputError(f"stdout: {_reason(error)}; the output is not complete") from None


class _Messages(_Output):
    def fail(self, error):
        pass


class _Escapes:
    """Writes what stdout's encoding lacks as Python escapes it, and says so once."""

    def __init__(self):
        self._is_told = False

    def __call__(self, error):
        if not (self._is_told or error.encoding == "utf-8"):  # which lacks only what is no text
            self._is_told = True
            print(
                f"jlayer: stdout is in {error.encoding}: characters that it lacks are written as "
                r"escapes such as \u20ac; set PYTHONIOENCODING=utf-8 for the text itself",
                file=sys.stderr,
            )
        return codecs.backslashreplace_errors(error)


def _reason(error):
    return getattr(error, "strerror", None) or str(error)
