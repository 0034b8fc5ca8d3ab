"""A terminal's screen, as far as a command writes on one: what a person sees at the end."""

import codecs
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

_SEQUENCE = re.compile(r"\x1b(?:\[([?\d;]*)([A-Za-z@])|([78D]))")
_BEGUN = re.compile(r"\x1b(?:\[[?\d;]*)?$")


class Screen:
    """Lines wrap in the last column once more comes, as on a VT100; what scrolls out is kept."""

    def __init__(self, columns=80, rows=24):
        self.columns, self.rows = columns, rows
        self._lines, self._top = [[]], 0
        self._row = self._column = 0
        self._is_full = False  # the next character begins a new line
        self._saved = (0, 0, False)
        self._rest = ""  # a sequence whose end has not come yet

    def feed(self, text):
        text, at = self._rest + text, 0
        self._rest = text[begun.start() :] if (begun := _BEGUN.search(text)) else ""
        text = text.removesuffix(self._rest)
        while at < len(text):
            match = _SEQUENCE.match(text, at)
            if match:
                self._control(*match.groups())
                at = match.end()
            else:
                self._write(text[at])
                at += 1

    def text(self):
        lines = ["".join(line).rstrip() for line in self._lines]
        return "\n".join(lines).rstrip("\n")

    def _write(self, character):
        if character == "\n":
            self._down()
        elif character == "\r":
            self._column, self._is_full = 0, False
        elif character == "\a":
            pass
        elif character == "\b":
            self._column, self._is_full = max(0, self._column - 1), False
        elif character == "\t":
            self._column = min(self.columns - 1, (self._column // 8 + 1) * 8)
        else:
            assert character.isprintable(), repr(character)
            if self._is_full:
                self._write("\r")
                self._down()
            line = self._line()
            line[self._column] = character
            self._is_full = self._column == self.columns - 1
            self._column += not self._is_full

    def _line(self):
        line = self._lines[self._row]
        line += " " * (self.columns - len(line))
        return line

    def _down(self):
        self._row, self._is_full = self._row + 1, False
        if self._row == len(self._lines):
            self._lines.append([])
        self._top = max(self._top, self._row - self.rows + 1)

    def _control(self, numbers, name, single):
        if single == "7":  # as an absolute place on the screen: scrolling does not move it
            self._saved = (self._row - self._top, self._column, self._is_full)
        elif single == "8":
            row, self._column, self._is_full = self._saved
            self._row = self._top + row
        elif single == "D":
            self._down()
        elif name == "A":
            self._row, self._is_full = max(self._top, self._row - int(numbers or 1)), False
        elif name in "CDPK@":  # a line that is edited
            self._edit(name, numbers)
        elif name == "J":
            assert not numbers
            self._line()[self._column :] = []
            del self._lines[self._row + 1 :]
        else:
            assert name in "mhl", f"a sequence that no test expects: {name}"

    def _edit(self, name, numbers):
        """Moves the cursor to the right or left; makes room, or deletes characters or the rest."""
        count, self._is_full = int(numbers or (name != "K")), False
        line = self._line()
        if name == "C":
            self._column = min(self.columns - 1, self._column + count)
        elif name == "D":
            self._column = max(0, self._column - count)
        elif name == "@":
            line[self._column : self._column] = count * " "
            del line[self.columns :]
        elif name == "P":
            del line[self._column : self._column + count]
        else:
            assert not count, "of K only the form without a number is known"
            line[self._column :] = []


def on_terminal(argv, *, columns=80, rows=24, keys=(), env=None, streams=(0, 1, 2)):
    """Runs a command with a terminal of its own: (exit code, its screen, all that it wrote).

    `keys`: (regular expression, keys): typed once the expression is found in what was written; a
    function in their place is called with that.
    `streams`: which of the command's streams are the terminal; the others are /dev/null.
    """
    main, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    # Else Ctrl-C drops what the terminal has not read yet, whoever wrote it.
    mode = termios.tcgetattr(side)
    mode[3] |= termios.NOFLSH
    termios.tcsetattr(side, termios.TCSANOW, mode)

    def take_terminal():
        ioctl(side, termios.TIOCSCTTY, 0)
        # Who runs the tests in the background ignores it, and so would the command.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        argv,
        **{
            name: side if number in streams else subprocess.DEVNULL
            for number, name in enumerate(("stdin", "stdout", "stderr"))
        },
        env={**os.environ, "TERM": "xterm", **(env or {})},
        start_new_session=True,
        preexec_fn=take_terminal,
        pass_fds=(side,),
    )
    os.close(side)
    screen, written, keys = Screen(columns, rows), "", list(keys)
    deadline = time.monotonic() + 120
    decoder = codecs.getincrementaldecoder("utf-8")()
    while time.monotonic() < deadline:
        ready, _, _ = select.select([main], [], [], 1.0)
        if ready:
            try:
                part = os.read(main, 1 << 16)
            except OSError:  # the other side is closed
                break
            text = decoder.decode(part)
            screen.feed(text)
            written += text
        while keys and re.search(keys[0][0], written):
            typed = keys.pop(0)[1]
            os.write(main, typed) if isinstance(typed, bytes) else typed(written)
    os.close(main)
    return process.wait(timeout=60), screen, written


PYTHON = sys.executable
