"""A table of text: columns aligned by the cells that a terminal gives to characters.

Where stdout is a terminal that is too narrow, a row takes two lines: its first and last cell, then
the others. What is still too long is cut: the first cell at its front, since the ends of paths tell
them apart.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jlayer.app.streams import is_terminal

GAP = "  "
CUT = "…"
LEAST = 12  # cells of a column that is cut


def width() -> int | None:
    """The columns of the terminal that stdout is; None where it is none."""
    if not is_terminal(sys.stdout):
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):  # a stream without a descriptor
        return 80


def lines(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    columns: int | None = None,
) -> list[str]:
    """The lines of a table. `right`: the columns that are aligned to the right. `columns`: the
    cells of a line at most; None: as many as it takes."""
    rows = [head, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    if columns is None or _whole(widths) <= columns:
        return [_line(row, widths, right) for row in rows]
    ends = [widths[0], widths[-1]]
    if _whole(ends) > columns:
        ends[0] = min(ends[0], max(LEAST, columns * 2 // 3, columns - ends[1] - len(GAP)))
        ends[1] = max(LEAST, columns - ends[0] - len(GAP))
    middle = [at - 1 for at in right]
    return [
        cut(line, columns)
        for row in rows
        for line in (
            _line((row[0], row[-1]), ends),
            GAP + _line(row[1:-1], widths[1:-1], middle),
        )
    ]


def printable(text: str) -> str:
    """Text from outside on one line: what a terminal would act on, or cannot show, is escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, room: int, *, at_front: bool = False) -> str:
    """A text in at most `room` cells; what is left out is marked."""
    if cells(text) <= room:
        return text
    kept, used = [], cells(CUT)
    for one in reversed(text) if at_front else text:
        used += cells(one)
        if used > room:
            break
        kept.append(one)
    kept = "".join(reversed(kept) if at_front else kept)
    return CUT + kept if at_front else kept + CUT


def _whole(widths):
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _line(row, widths, right=()):
    padded = []
    for at, (cell, room) in enumerate(zip(row, widths, strict=True)):
        cell = cut(cell, room, at_front=at == 0)
        blank = " " * (room - cells(cell))
        padded.append(blank + cell if at in right else cell + blank)
    return GAP.join(padded).rstrip()
