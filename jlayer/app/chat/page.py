"""Where answers are shown: as they are in a file or a pipe, fit for a terminal on one.

On a terminal reasoning is dim, and control characters of the text are signs: what a model writes
must not move the cursor or set the clipboard. Elsewhere reasoning is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO

from jlayer.app import progress
from jlayer.app.running import write_text
from jlayer.app.status import DIM, PLAIN
from jlayer.app.streams import is_terminal
from jlayer.text.reasoning import REASONING

# U+2400 and on show the characters from 0 to 31, U+2421 is DEL, and U+FFFD stands for the others.
_SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SIGNS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Text without control characters but tabs and line breaks."""
    return text.translate(_SIGNS)


def has_colour(stream: TextIO) -> bool:
    """Whether text may be dim there. See no-color.org: an empty NO_COLOR says nothing."""
    is_able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return is_able and is_terminal(stream) and not os.environ.get("NO_COLOR")


class Page:
    """`stream`: where the text goes."""

    def __init__(self, stream: TextIO):
        self._stream, self._is_terminal = stream, is_terminal(stream)
        self._dims, self._is_dim = has_colour(stream), False
        self._kind, self._end = None, ""  # of what was written last

    @contextmanager
    def showing(self, model, view) -> Iterator[Callable[[str, str], None]]:
        """Yields a function that takes pieces: their kind and their text. Under them `view` is
        drawn, where stderr is a terminal."""
        self._kind, self._end = None, ""
        text = None if self._stream is sys.stdout else self._stream
        try:
            with progress.shown(model, self._show, view=view, text=text) as write:
                yield partial(self._take, write)
        finally:
            # In a pipe also an answer without text is a line.
            if self._end != "\n" and (self._end or not self._is_terminal):
                write_text("\n", self._stream)

    def note(self, line: str) -> None:
        """Says something about the text under it, on a terminal."""
        if self._is_terminal:
            write_text(f"{DIM}{line}{PLAIN}\n" if self._dims else f"{line}\n", self._stream)

    def _take(self, write, kind, text):
        if not text or (kind == REASONING and not self._is_terminal):
            return
        if self._kind == REASONING != kind:
            self._is_dim = False
            write("\n\n" if self._end != "\n" else "\n")
        self._kind, self._end, self._is_dim = kind, text[-1], kind == REASONING
        write(visible(text) if self._is_terminal else text)

    def _show(self, text):
        dims = self._dims and self._is_dim
        write_text(f"{DIM}{text}{PLAIN}" if dims else text, self._stream)
