"""Lines under the text of a terminal: drawn again a few times a second, gone when more text comes.

The text itself is written as it is, and the lines below it, with the cursor put back to the text's
end. So no line of text is ever drawn again, and what the terminal keeps is the text.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from jlayer.app.streams import is_terminal

REFRESH_S = 0.2
TAB = 8
# Control sequences of ECMA-48 and the VT100.
WIPE = "\x1b[J"  # from the cursor to the end of the screen
DOWN = "\x1bD"  # one line down in the same column; scrolls at the bottom
UP = "\x1b[{}A"
SAVE, RESTORE = "\x1b7", "\x1b8"  # the cursor
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Status:
    """Draws what `lines()` gives on stderr while it is entered, every `refresh_s` seconds.

    `text`: the stream that text is written to; stdout where none is given.
    """

    def __init__(
        self,
        lines: Callable[[], list[str]],
        *,
        refresh_s: float = REFRESH_S,
        text: TextIO | None = None,
    ):
        self._lines, self._drawn, self._refresh_s = lines, [], refresh_s
        self._text = text
        self._column = 0  # where the text ends
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="jlayer-status", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()
        self._wipe()

    def write(self, show: Callable[[str], None], piece: str) -> None:
        """Has `show` write text, with nothing drawn below it. What was there is drawn anew at once,
        if there is still something to say: else it would flicker with every token."""
        with self._lock:
            was_drawn = bool(self._drawn)
            self._wipe()
            if is_terminal(sys.stdout if self._text is None else self._text):
                self._column = column_after(self._column, piece, size().columns)
            show(piece)
            if was_drawn:
                self._draw()

    def draw(self) -> None:
        """Draws now what the lines are now."""
        with self._lock:
            self._draw()

    def _draw(self):
        lines, (columns, rows) = self._lines(), size()
        # At the last column a terminal waits with its line's end for the next character;
        # moving away and back, some forget it. A text that ends there is a short moment.
        if self._column >= columns or len(lines) >= rows:
            lines = []
        if lines == self._drawn:
            return
        self._wipe()
        self._drawn = lines
        if lines:
            room = DOWN * len(lines) + UP.format(len(lines))
            below = "".join(f"\r\n{DIM}{line[: columns - 1]}{PLAIN}" for line in lines)
            _put(f"{room}{SAVE}{below}{RESTORE}")

    def _wipe(self):
        if self._drawn:
            self._drawn = []
            _put(WIPE)

    def _refresh(self):
        while not self._is_over.wait(self._refresh_s):
            self.draw()


def size() -> os.terminal_size:
    """Columns and rows of the terminal that stderr is."""
    try:
        found = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):  # the tests' own streams have no descriptor
        return os.terminal_size((80, 24))
    return found if found.columns and found.lines else os.terminal_size((80, 24))


def column_after(column: int, text: str, columns: int) -> int:
    """Where the cursor of a terminal is after `text`: from 0; `columns` where the line is full."""
    from rich.cells import cell_len

    for character in text:
        if character in "\n\r":
            column = 0
        elif character == "\t":
            column = min(columns - 1, (column // TAB + 1) * TAB)
        else:
            width = cell_len(character)
            column = width if column + width > columns else column + width
    return column


def _put(sequence):
    sys.stderr.write(sequence)
    sys.stderr.flush()
