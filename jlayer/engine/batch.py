"""What one forward pass carries: rows of any lanes, arranged in chunks. Plain numpy, no device.

A row has a lane, a token, a position and a parent: another row of its lane in the same pass, or
the lane's last committed token. A prompt is a chain of rows, a next token is one row, drafts are a
tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from jlayer.engine.programs import Size
from jlayer.model.cache import Rows
from jlayer.plan.shapes import CHUNK_ROWS, Pane, pack, rows_for


class Wanted(Enum):
    """The rows of a lane whose logits are wanted."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True)
class Entry:
    """What a lane brings to a forward pass.

    `tokens`: its rows, the first of them after the committed positions, whose pool rows are
    `committed`. `new`: the pool rows that they are written to. `parents`: for each row the number
    of its parent, an earlier one, or -1; None: a chain. `capacity`: of the lane's table. `after`:
    how many other entries of the pass, one after another, must have been written before.
    """

    tokens: Sequence[int]
    committed: np.ndarray
    new: np.ndarray
    capacity: int
    wanted: Wanted = Wanted.LAST
    parents: tuple[int, ...] | None = None
    after: int = 0

    @property
    def n_wanted(self) -> int:
        return {Wanted.NONE: 0, Wanted.LAST: 1, Wanted.ALL: len(self.tokens)}[self.wanted]


@dataclass(frozen=True)
class Part:
    """A chunk of a forward pass: `tokens` [R], -1 where it is padded; what attention needs; which
    rows' logits are wanted, and the places of these among all wanted rows of the pass."""

    size: Size
    tokens: np.ndarray
    rows: Rows
    wanted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def n_wanted(self) -> int:
        """The wanted rows, padded."""
        return padded_wanted(len(self.wanted))


def padded_wanted(count: int) -> int:
    return rows_for(count) if count else 0


def arrange(
    entries: Sequence[Entry],
    *,
    pool: int,
    most: int = CHUNK_ROWS[-1],
    n_rows: int | None = None,
) -> list[Part]:
    """The chunks of a forward pass, of at most `most` rows each, in the order in which they run.
    `n_rows`: the most rows of the pass, if lanes that share chunks would take more.

    The wanted rows are numbered entry by entry. Rows of a tree must be in one chunk, unless they
    are its trunk: so a pass has at most `most` rows below the first branch.
    """
    firsts = np.cumsum([0, *(entry.n_wanted for entry in entries)])
    ranks = [
        [n for n, entry in enumerate(entries) if entry.after == rank and entry.tokens]
        for rank in sorted({entry.after for entry in entries})
    ]
    lengths = [[len(entries[n].tokens) for n in numbers] for numbers in ranks]
    panes = [pack(some, most) for some in lengths]
    if n_rows is not None and sum(pane.n_rows for some in panes for pane in some) > n_rows:
        panes = [pack(some, most, shared=0) for some in lengths]
    return [
        _part(pane, [entries[n] for n in numbers], firsts[numbers], pool)
        for numbers, some in zip(ranks, panes, strict=True)
        for pane in some
    ]


def _part(pane: Pane, entries, firsts, pool):
    capacity = max(entries[member.lane].capacity for member in pane.members)
    size = Size(pane.n_rows, pane.lanes, pane.tokens, capacity, pool)
    tokens = np.full(size.rows, -1, np.int32)
    positions = np.zeros(size.rows, np.int32)
    written = np.full(size.rows, pool, np.int32)
    table = np.full((pane.lanes, capacity), pool, np.int32)
    length = np.zeros(pane.lanes, np.int32)
    seen = np.tile(np.tri(pane.tokens, dtype=bool), (pane.lanes, 1, 1))
    wanted, places = [], []
    for number, member in enumerate(pane.members):
        entry, first, end = entries[member.lane], member.first, member.first + member.count
        n_committed, at = len(entry.committed), number * pane.tokens
        own = slice(at, at + member.count)
        tokens[own] = entry.tokens[first:end]
        written[own] = entry.new[first:end]
        length[number] = n_committed + first
        table[number, :n_committed] = entry.committed
        table[number, n_committed : n_committed + first] = entry.new[:first]
        if entry.parents is None:
            positions[own] = np.arange(n_committed + first, n_committed + end)
        else:
            depth, ancestors = lineage(entry.parents)
            assert ancestors[first:end, :first].all(), "a branch of a tree began in another chunk"
            positions[own] = n_committed + depth[first:end]
            seen[number, : member.count, : member.count] = ancestors[first:end, first:end]
        if entry.wanted is Wanted.ALL:
            wanted += range(at, at + member.count)
            places += range(firsts[member.lane] + first, firsts[member.lane] + end)
        elif entry.wanted is Wanted.LAST and end == len(entry.tokens):
            wanted.append(at + member.count - 1)
            places.append(firsts[member.lane])
    rows = Rows(positions=positions, write=written, table=table, length=length, seen=seen)
    return Part(size, tokens, rows, np.array(wanted, np.int32), np.array(places, np.int32))


def lineage(parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(depth int32 [rows], bool [rows, rows] whether a row is the other's ancestor or itself)."""
    depth = np.zeros(len(parents), np.int32)
    ancestors = np.eye(len(parents), dtype=bool)
    for row, parent in enumerate(parents):
        assert parent < row, "parents come first"
        if parent >= 0:
            depth[row] = depth[parent] + 1
            ancestors[row] |= ancestors[parent]
    return depth, ancestors
