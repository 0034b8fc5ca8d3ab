"""What one forward pass carries: rows of any lanes, arranged in chunks. Plain numpy, no device.

A row has a lane, a token, a position and a parent: another row of its lane in the same pass, or
the lane's last committed token. A prompt is a chain of rows, a next token is one row, drafts are a
tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jlayer.engine.pool import Window
from jlayer.engine.size import Size
from jlayer.model.cache import Rows, View
from jlayer.pieces import DELTA_BLOCK
from jlayer.plan.shapes import (
    CHUNK_ROWS,
    Pane,
    pack,
    power_of_two,
    rows_for,
    window_capacity,
)

NONE = -1  # the number of no adapter
PADDING = -1  # the token of a row that is none
VECTOR = -2  # and of one that is an embedding in place of a token


@dataclass(frozen=True)
class Entry:
    """What a lane brings to a forward pass.

    `tokens`: its rows, the first of them after the committed positions, whose pool rows are
    `committed`. `new`: the pool rows that they are written to. `parents`: for each row the number
    of its parent, an earlier one, or -1; None: a chain. `capacity`: of the lane's table. `after`:
    how many other entries of the pass, one after another, must have been written before. `wanted`:
    of so many of its last rows the logits are wanted; `hidden`: of so many what the head's norm
    makes of them. `is_long`: whether its text is longer than
    the length at which the model's rotary embedding switches. `source`, `target`: the slots of its
    state before and after its rows that are no guesses, of which there are `n_kept`. `adapter`: the
    number of the one that it is computed with; -1: none. `without`: the layers that it passes
    over. `vectors` [some, D]: embeddings in place of its first tokens, whose numbers are below -1.
    """

    tokens: Sequence[int]
    committed: np.ndarray
    new: np.ndarray
    capacity: int
    wanted: int = 1
    parents: tuple[int, ...] | None = None
    after: int = 0
    is_long: bool = False
    source: int = 0
    target: int = 0
    n_kept: int = 0
    adapter: int = NONE
    hidden: int = 0
    vectors: np.ndarray | None = None
    without: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Part:
    """A chunk of a forward pass: `tokens` [R], PADDING where it is padded, and VECTOR where
    `vectors` [R, D] has an embedding instead; `adapters` [R], of `Entry`; what attention needs;
    which rows' logits are wanted, and the places of these among all wanted rows of the pass; which
    rows' final hidden states are, with their places; and the layers that all of its rows pass
    over."""

    size: Size
    tokens: np.ndarray
    adapters: np.ndarray
    rows: Rows
    wanted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    hidden: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    hidden_places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    vectors: np.ndarray | None = None
    without: frozenset[int] = frozenset()

    @cached_property
    def real(self) -> np.ndarray:
        """The rows that are not padding."""
        return np.flatnonzero(self.tokens != PADDING)

    @property
    def n_wanted(self) -> int:
        """The wanted rows, padded."""
        return padded_wanted(len(self.wanted))

    @property
    def n_hidden(self) -> int:
        """The rows whose hidden states are wanted, padded."""
        return padded_wanted(len(self.hidden))


def padded_wanted(count: int) -> int:
    return rows_for(count) if count else 0


def arrange(
    entries: Sequence[Entry],
    *,
    pool: int,
    most: int = CHUNK_ROWS[-1],
    n_rows: int | None = None,
    windows: Sequence[Window] = (),
    switches: bool = False,
    slots: int = 0,
) -> list[Part]:
    """The chunks of a forward pass, of at most `most` rows each, in the order in which they run.
    `n_rows`: the most rows of the pass, if lanes that share chunks would take more. `pool`: the
    rows of the pools; `windows`: of layers with a window. `switches`: whether the rotary embedding
    does for long texts. `slots`: of layers with a state.

    The wanted rows are numbered entry by entry, and so are those whose hidden states are wanted.
    Rows of a tree must be in one chunk, unless they are its trunk: so a pass has at most `most`
    rows below the first branch.
    """
    firsts = np.cumsum([[0, 0], *((entry.wanted, entry.hidden) for entry in entries)], axis=0)
    of_rank: dict[tuple, list[int]] = {}  # those that may share chunks
    for n, entry in enumerate(entries):
        if entry.tokens:
            of_rank.setdefault((entry.after, *sorted(entry.without)), []).append(n)
    ranks = [of_rank[key] for key in sorted(of_rank)]
    lengths = [[len(entries[n].tokens) for n in numbers] for numbers in ranks]
    whole = [whole_lanes([entries[n] for n in numbers], most) for numbers in ranks]
    pairs = list(zip(lengths, whole, strict=True))
    panes = [pack(some, most, whole=trees) for some, trees in pairs]
    if n_rows is not None and sum(pane.n_rows for some in panes for pane in some) > n_rows:
        panes = [pack(some, most, shared=0, whole=trees) for some, trees in pairs]
    return [
        _part(pane, [entries[n] for n in numbers], firsts[numbers], pool, windows, switches, slots)
        for numbers, some in zip(ranks, panes, strict=True)
        for pane in some
    ]


def whole_lanes(entries: Sequence[Entry], most: int) -> list[int]:
    """Which entries are never split: trees that have room in a chunk of `most` rows, trunk and
    all."""
    return [
        n
        for n, entry in enumerate(entries)
        if entry.parents is not None and len(entry.tokens) <= most
    ]


def _part(pane: Pane, entries, firsts, pool, windows, switches, slots):
    capacity = max(entries[member.lane].capacity for member in pane.members)
    size = Size(
        *(pane.n_rows, pane.lanes, pane.tokens, capacity, pool),
        windows=tuple(
            (window.size, window_capacity(window.size, capacity), window.n_rows)
            for window in windows
        ),
        switches=switches,
        slots=slots,
        # Shorter ones are one block either way: not two programs for them.
        is_chain=slots > 0
        and pane.tokens > DELTA_BLOCK
        and all(entries[member.lane].parents is None for member in pane.members),
    )
    is_long = np.zeros(size.rows, bool)
    adapters = np.full(size.rows, NONE, np.int32)
    tokens, vectors = np.full(size.rows, PADDING, np.int32), None
    positions = np.zeros(size.rows, np.int32)
    written = np.full(size.rows, pool, np.int32)
    table = np.full((pane.lanes, capacity), pool, np.int32)
    length = np.zeros(pane.lanes, np.int32)
    seen = np.tile(np.tri(pane.tokens, dtype=bool), (pane.lanes, 1, 1))
    told = ([], []), ([], [])  # (rows, places) of the logits and of the hidden states
    for number, member in enumerate(pane.members):
        entry, first, end = entries[member.lane], member.first, member.first + member.count
        n_committed, at = len(entry.committed), number * pane.tokens
        own = slice(at, at + member.count)
        tokens[own], adapters[own] = np.maximum(entry.tokens[first:end], VECTOR), entry.adapter
        vectors = _with_vectors(vectors, entry, slice(first, end), at, size.rows)
        written[own], is_long[own] = entry.new[first:end], entry.is_long
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
        for (chosen, places), n_last, place in zip(
            told, (entry.wanted, entry.hidden), firsts[member.lane], strict=True
        ):
            begin = len(entry.tokens) - n_last
            from_row = max(first, begin)
            chosen += range(at + from_row - first, at + member.count)
            places += range(place + from_row - begin, place + end - begin)
    rows = Rows(
        positions=positions,
        write=written,
        table=table,
        length=length,
        seen=seen,
        windows={window.size: _view(pane, entries, size, window) for window in windows},
        is_long=is_long if switches else None,
        **(_states(pane, entries, size) if slots else {}),
    )
    numbers = (np.array(each, np.int32) for pair in told for each in pair)
    without = entries[pane.members[0].lane].without
    return Part(size, tokens, adapters, rows, *numbers, vectors=vectors, without=without)


def _with_vectors(vectors, entry, some, at, n_rows):
    """The vectors of a chunk with those of some rows of an entry, from row `at` on; None: none."""
    given = [] if entry.vectors is None else entry.vectors[some]
    n_asked = sum(token <= VECTOR for token in entry.tokens[some])
    assert n_asked == len(given), "rows of embeddings have their vectors, and no others"
    if not n_asked:
        return vectors
    if vectors is None:
        vectors = np.zeros((n_rows, given.shape[1]), given.dtype)
    vectors[at : at + n_asked] = given
    return vectors


def _states(pane, entries, size) -> dict:
    """What layers with a state need to know of a chunk's rows: see `Rows`. A lane's later chunks go
    on from what its first one has written."""
    source, target = (np.full(pane.lanes, size.slots, np.int32) for _ in range(2))
    kept = np.zeros((pane.lanes, pane.tokens), bool)
    for number, member in enumerate(pane.members):
        entry = entries[member.lane]
        source[number] = entry.target if member.first else entry.source
        target[number] = entry.target
        kept[number, : max(0, min(member.count, entry.n_kept - member.first))] = True
    return {"source": source, "target": target, "kept": kept, "is_chain": size.is_chain}


def _view(pane, entries, size, window) -> View:
    """The rows of a chunk in the pools of layers with a window: a lane's table holds what the first
    of its rows sees, and the others see no earlier ones."""
    capacity, pool = size.cache_of(window.size)
    written = np.full(size.rows, pool, np.int32)
    table = np.full((pane.lanes, capacity), pool, np.int32)
    length, begins = (np.zeros(pane.lanes, np.int32) for _ in range(2))
    for number, member in enumerate(pane.members):
        entry, first, end = entries[member.lane], member.first, member.first + member.count
        at = number * pane.tokens
        written[at : at + member.count] = window.places[entry.new[first:end]]
        n_before = len(entry.committed) + first
        begin = max(0, n_before - window.n_behind)
        n_new = min(first, window.n_behind)
        earlier = np.concatenate([entry.committed[begin:], entry.new[first - n_new : first]])
        begins[number], length[number] = begin, n_before - begin
        table[number, : length[number]] = window.places[earlier[len(earlier) - length[number] :]]
    return View(written, table, length, begins)


@dataclass(frozen=True)
class Growth:
    """Some nodes of a lane's tree that grows chunk by chunk: their `tokens`, `positions` and `new`
    pool rows. `fresh`: the pool rows of all nodes that are there after them, and
    `fresh_positions`; `seen`, bool [nodes, fresh]: which of these are a node's ancestors, or
    itself."""

    tokens: Sequence[int]
    positions: Sequence[int]
    new: np.ndarray
    committed: np.ndarray
    fresh: np.ndarray
    fresh_positions: Sequence[int]
    seen: np.ndarray


def arrange_growth(
    growths: Sequence[Growth], *, tokens: int, fresh: int, capacity: int, pool: int
) -> Part:
    """One chunk with `tokens` nodes of each lane, padded; the likeliest tokens after each are
    wanted. `fresh`: room for the nodes of a lane's tree."""
    lanes = power_of_two(len(growths))
    size = Size(rows_for(lanes * tokens), lanes, tokens, capacity, pool, fresh)
    padded = np.full(size.rows, PADDING, np.int32)
    positions = np.zeros(size.rows, np.int32)
    written = np.full(size.rows, pool, np.int32)
    table = np.full((lanes, capacity), pool, np.int32)
    length = np.zeros(lanes, np.int32)
    listed = np.full((lanes, fresh), pool, np.int32)
    places = np.zeros((lanes, fresh), np.int32)
    # A row that is padding sees something, since it would divide by zero.
    seen = np.zeros((lanes, tokens, fresh), bool)
    seen[:, :, 0] = True
    wanted = []
    for number, growth in enumerate(growths):
        count, n_fresh, at = len(growth.tokens), len(growth.fresh), number * tokens
        own = slice(at, at + count)
        padded[own], positions[own], written[own] = growth.tokens, growth.positions, growth.new
        length[number] = len(growth.committed)
        table[number, : length[number]] = growth.committed
        listed[number, :n_fresh] = growth.fresh
        places[number, :n_fresh] = growth.fresh_positions
        seen[number, :count] = False
        seen[number, :count, :n_fresh] = growth.seen
        wanted += range(at, at + count)
    rows = Rows(
        positions=positions,
        write=written,
        table=table,
        length=length,
        seen=seen,
        fresh=listed,
        fresh_positions=places,
    )
    in_order = np.arange(len(wanted), dtype=np.int32)
    none = np.full(size.rows, NONE, np.int32)  # a draft model has no adapters
    return Part(size, padded, none, rows, np.array(wanted, np.int32), in_order)


def count_rows(parts: Sequence[Part]) -> int:
    """The rows of a forward pass, without padding."""
    return sum(len(part.real) for part in parts)


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
