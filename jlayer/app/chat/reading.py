"""What is said: lines of a terminal or of a pipe, put together to messages.

A line that ends in a backslash goes on in the next one, and lines between two of three double
quotes are one message as they are. A terminal has readline: keys, history, pasted text of several
lines. Commands are left to `commands`.
"""

from __future__ import annotations

import os
import signal
import sys
import termios
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from jlayer.app.chat.history import History
from jlayer.app.chat.page import has_colour
from jlayer.app.inputs import BYTE_ORDER_MARK
from jlayer.app.streams import is_terminal
from jlayer.errors import UsageError
from jlayer.interrupts import check, released

FENCE = '"""'
PROMPT, MORE = "> ", ". "
LOOK_AGAIN_S = 0.5
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


class Cleared(Exception):
    """Ctrl-C took back what stood there. `was_typed`: it was not only what had been put there."""

    def __init__(self, *, was_typed: bool = True):
        super().__init__()
        self.was_typed = was_typed


@dataclass(frozen=True)
class Said:
    """`is_literal`: it stood between quotes, or has several lines, so it is a message whatever it
    begins with."""

    text: str
    is_literal: bool


class Pipe:
    """Lines of stdin where nobody types."""

    is_terminal = False

    def __init__(self):
        self._n_lines = 0

    def line(self, prompt: str, *, before: str = "") -> str:
        """Raises EOFError at the end, UsageError where it is not UTF-8."""
        with released():
            raw = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        self._n_lines += 1
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"stdin: line {self._n_lines} is not UTF-8 at byte {error.start}; convert the text "
                "to UTF-8"
            ) from None
        if self._n_lines == 1:
            text = text.removeprefix(BYTE_ORDER_MARK)
        return text.removesuffix("\n").removesuffix("\r")

    def remember(self, entry: str) -> None:
        pass

    def forget(self) -> None:
        pass

    @contextmanager
    def silent(self):
        yield


class Keyboard:
    """Lines that somebody types at a terminal. `history`: of earlier sessions."""

    is_terminal = True

    def __init__(self, history: History):
        import readline

        self._readline, self._history = readline, history
        readline.set_auto_history(False)  # a message of several lines is one entry
        if "libedit" not in (readline.__doc__ or ""):
            # Python turns it off; without it each line of a text that is pasted would be sent.
            readline.parse_and_bind("set enable-bracketed-paste on")
        for entry in history.entries:
            readline.add_history(entry)

    def line(self, prompt: str, *, before: str = "") -> str:
        """`before`: stands there already, to be edited. Raises EOFError (Ctrl-D), KeyboardInterrupt
        (Ctrl-C where nothing is typed) or Cleared."""
        readline = self._readline
        with _shown_on_a_terminal() as has_codes:
            if has_codes:  # \001 and \002 enclose what takes no column
                prompt = f"\001{BOLD}\002{prompt}\001{PLAIN}\002"
            if before:
                readline.set_startup_hook(lambda: readline.insert_text(before))
            try:
                with released(), _looked_for_signals():
                    return input(prompt)
            except EOFError:
                print(flush=True)
                raise
            except KeyboardInterrupt:
                print(flush=True)
                if found := readline.get_line_buffer():
                    raise Cleared(was_typed=found != before) from None
                raise
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"what was typed is not UTF-8 at byte {error.start}; set the terminal to UTF-8"
                ) from None
            finally:
                readline.set_startup_hook(None)

    def remember(self, entry: str) -> None:
        self._readline.add_history(entry)
        self._history.add(entry)

    def forget(self) -> None:
        """Drops what was typed ahead."""
        with suppress(termios.error):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)

    @contextmanager
    def silent(self):
        """What is typed meanwhile does not show between the text; the next prompt has it."""
        try:
            before = termios.tcgetattr(sys.stdin)
        except termios.error:
            yield
            return
        mode = [*before]
        mode[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextmanager
def _shown_on_a_terminal():
    """Lets readline write to stderr's terminal while stdout is a file or a pipe: what is typed is
    no result. Yields whether text there may have codes."""
    if is_terminal(sys.stdout) or not is_terminal(sys.stderr):
        yield has_colour(sys.stdout)
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield has_colour(sys.stderr)
        sys.stdout.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _looked_for_signals():
    """Acts on signals now and then. One that comes just before readline begins to wait for a key
    would have to wait for the key too; and what is raised while its hook runs, readline drops."""
    before = signal.signal(signal.SIGALRM, lambda *_: check())
    signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_S, LOOK_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(source: Pipe | Keyboard, *, label: str = "", before: str = "") -> Said:
    """The next message or command. `label`: what the prompt says. Raises what `line` raises; with
    Ctrl-C within a message, Cleared."""
    first = source.line(label + PROMPT, before=before)
    try:
        return _fenced(source) if first.strip() == FENCE else _continued(source, first)
    except KeyboardInterrupt:
        raise Cleared from None


def _continued(source, line):
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(source.line(MORE))
        except EOFError:
            break
    text = "\n".join(lines)
    return Said(text, is_literal="\n" in text)


def _fenced(source):
    lines = []
    while True:
        try:
            line = source.line(MORE)
        except EOFError:
            raise UsageError(
                f"a message that began with {FENCE} has no end; write {FENCE} on a line of its own "
                "after it"
            ) from None
        if line.strip() == FENCE:
            return Said("\n".join(lines), is_literal=True)
        lines.append(line)
