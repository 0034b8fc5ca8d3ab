"""Who rides in a forward pass, with which tokens, and in which rows of the pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jlayer.drafting.tree import Guesses
from jlayer.engine.batch import Entry
from jlayer.engine.lane import Lane
from jlayer.engine.pool import Pool
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import PackedRows

# Lanes that begin alike share the entries of so many tokens or more.
LEAST_SHARED = 16
NOTHING = np.zeros(0, np.int32)


@dataclass
class Rider:
    """A lane in a forward pass: the tokens `first` to `end` of its history are its rows, and what
    is guessed to follow them. The entries before are its own and, from the end of its table on,
    those of `source`, whose rows run `after` so many others."""

    lane: Lane
    first: int
    end: int
    source: Rider | None = None
    after: int = 0
    own: np.ndarray | None = None  # the pool rows of its rows
    shared: np.ndarray = field(default_factory=NOTHING.copy)  # those that it lists of its source's
    guesses: Guesses | None = None
    guessed: np.ndarray = field(default_factory=NOTHING.copy)  # the pool rows of its guesses
    n_drafted: int = 0  # guesses that were at hand; `guesses` are those that ride

    @property
    def is_complete(self) -> bool:
        return self.end == len(self.lane.history)

    @property
    def tokens(self) -> list[int]:
        return self.lane.history[self.first : self.end]

    @property
    def vectors(self) -> np.ndarray | None:
        """The embeddings in place of its tokens: see `Lane.vectors`."""
        return self.lane.vectors(self.first, self.end)

    @property
    def n_rows(self) -> int:
        return self.end - self.first + len(self.guessed)

    @property
    def scored(self) -> range:
        """Those of its tokens whose logits score the next one of the prompt."""
        scores = self.lane.scores
        return range(0) if scores is None else scores.rows(self.first, self.end)

    @property
    def pooled(self) -> range:
        """Those of its tokens whose final hidden states are wanted, its last ones."""
        pooled = self.lane.pooled
        return range(0) if pooled is None else pooled.rows(self.first, self.end)

    @property
    def n_drawn(self) -> int:
        """From the logits of so many of its last rows tokens are drawn: its last token and the
        guesses."""
        return 1 + len(self.guessed) if self.is_complete and self.lane.draws else 0

    @property
    def wanted(self) -> int:
        """Of so many of its last rows the logits are wanted."""
        return len(self.scored) + self.n_drawn

    @property
    def gained(self) -> np.ndarray:
        """The pool rows that its table gains for its tokens."""
        return np.concatenate([self.shared, self.own])

    @property
    def entry(self) -> Entry:
        lane, n_own = self.lane, self.end - self.first
        parents = None
        if self.guesses is not None:
            chain = range(-1, n_own - 1)
            parents = (*chain, *(n_own + parent for parent in self.guesses.parents))
        return Entry(
            [*self.tokens, *(self.guesses.tokens if self.guesses else ())],
            np.concatenate([lane.table.rows, self.shared]),
            np.concatenate([self.own, self.guessed]),
            lane.capacity,
            wanted=self.wanted,
            hidden=len(self.pooled),
            parents=parents,
            after=self.after,
            is_long=lane.is_long,
            source=lane.table.source,
            target=lane.table.target,
            n_kept=n_own,
            adapter=lane.adapter,
            vectors=self.vectors,
        )

    def take_rows(self, pool: Pool, chunk: int) -> np.ndarray:
        """Takes pool rows for its tokens, and shares those of its source; -> the new ones.
        `chunk`: the most rows of a chunk."""
        if self.source is not None:
            there = self.source.lane.table.rows
            if self.source.own is not None:
                there = np.concatenate([there, self.source.gained])
            self.shared = there[: self.first].copy()
            pool.share(self.shared)
        self.own = pool.take(self.end - self.first, chunk=chunk)
        return self.own

    def release(self, pool: Pool) -> None:
        """Gives back all rows that it took: the pass has failed."""
        if self.own is not None:
            pool.release(np.concatenate([self.gained, self.guessed]))


def choose_riders(
    lanes: Sequence[Lane], everybody: Sequence[Lane], plan: Plan, pool: Pool, prompt_rows: int
) -> list[Rider]:
    """Which of `lanes` ride in the next pass, and with how many tokens. `everybody`: whose entries
    may be shared, of those in `pool`.

    Next tokens come first, of lanes that have waited longest. Beside them ride at most
    `prompt_rows` of prompts.
    """
    riders, rows, sources = [], PackedRows(plan.chunk), None
    lanes = sorted(lanes, key=lambda lane: lane.last_pass)

    def fits(n_tokens, after=0):
        return not riders or rows.beside(n_tokens, after) <= plan.load.n_rows

    for lane in [lane for lane in lanes if lane.n_pending == 1]:
        if not fits(1):
            break
        rows.add(1)
        riders.append(Rider(lane, len(lane.history) - 1, len(lane.history)))
    room = prompt_rows if riders else plan.load.n_rows
    for lane in [lane for lane in lanes if lane.n_pending > 1]:
        sources = sources or Sources(everybody, riders, pool, plan.chunk)
        rider = sources.rider_of(lane)
        if rider is None:
            continue
        n_tokens = min(rider.end - rider.first, room)
        if lane.keeper is not None:
            n_tokens = lane.keeper.most(rider.first, n_tokens)
        while n_tokens > 1 and not fits(n_tokens, rider.after):
            n_tokens //= 2
        if n_tokens < 1 or not fits(n_tokens, rider.after):
            break
        rider.end = rider.first + n_tokens
        rows.add(n_tokens, rider.after)
        riders.append(rider)
        sources.add(rider)
        room -= n_tokens
    return riders


def shared_before(riders: Sequence[Rider]) -> Iterator[np.ndarray]:
    """The rows that riders share of entries from before the pass: a window that has moved on since
    must keep what they see of these."""
    for rider in riders:
        there = NOTHING if rider.source is None else rider.source.lane.table.rows
        if 0 < rider.first <= len(there):
            yield there[: rider.first]


class Sources:
    """Lanes that have entries, or get some in this pass, by the first tokens of their texts: those
    that begin alike take them over."""

    def __init__(self, everybody: Sequence[Lane], riders: Sequence[Rider], pool: Pool, chunk: int):
        self._pool, self._chunk = pool, chunk
        self._known: dict[tuple, dict[int, Rider]] = {}
        for other in everybody if not pool.has_state else ():
            if other.table is not None and not other.table.is_closed:
                self.add(Rider(other, len(other.table), len(other.table)))
        for rider in riders:
            self.add(rider)

    def add(self, rider: Rider) -> None:
        """Adds a rider, in place of its lane as it was before this pass."""
        if rider.end:
            self._alike(rider.lane)[id(rider.lane)] = rider

    def _alike(self, lane):
        # Under another adapter the same tokens have other entries.
        return self._known.setdefault((lane.adapter, *lane.history[:LEAST_SHARED]), {})

    def rider_of(self, lane: Lane) -> Rider | None:
        """The rider of a lane whose prompt is not done. A lane without entries takes those of
        another that begins alike, be they there or on their way in this pass. None: it waits for
        one that is still on its way through what they share.

        Sequences of one prompt share among themselves first, then the prompts of one run: their
        memory is planned so."""
        end = len(lane.history)
        best = Rider(lane, len(lane.table), end)
        if len(lane.table) or self._pool.has_state:
            return best
        others = [rider for rider in self._alike(lane).values() if rider.lane is not lane]
        own = [rider for rider in others if rider.lane.account is lane.account]
        others = [rider for rider in own if rider.lane.is_sibling(lane)] or own or others
        n_promised = 0
        for rider in (*others[-1:], *others[:-1]):  # the next answer to a question is like the last
            other = rider.lane
            n_same = n_alike(lane.history, other.history, min(lane.n_shareable, len(other.history)))
            n_shared = min(n_same, rider.end)
            # Its first entries may be of this pass too: what it lists of its own source.
            after = rider.after + (n_shared > rider.first)
            is_better = n_shared >= LEAST_SHARED and (-n_shared, after) < (-best.first, best.after)
            if not is_better and n_same <= n_promised:
                continue
            if other.is_long != lane.is_long or not self._is_there(rider, n_shared):
                continue
            if other.is_alive and other.is_hungry and other.n_pending > 1:
                n_promised = max(n_promised, n_same)
            if is_better:
                best = Rider(lane, n_shared, end, source=rider, after=after)
            if best.first == lane.n_shareable:
                break
        return best if best.first >= n_promised else None

    def _is_there(self, rider, n_shared):
        """Whether the first entries of a rider are held, and will be after this pass."""
        table = rider.lane.table
        return self._pool.holds(table.rows[:n_shared]) and self._pool.keeps(
            n_shared, rider.end - len(table), rider.end, self._chunk
        )


def n_alike(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many of the first `most` tokens are equal; 0 where it is fewer than LEAST_SHARED."""
    if most < LEAST_SHARED or one[:LEAST_SHARED] != other[:LEAST_SHARED]:
        return 0
    low, high = LEAST_SHARED, most
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
