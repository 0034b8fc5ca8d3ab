"""The trees of a forward pass while they grow: what each lane's guesses are made from, and the pool
rows that the draft model writes to for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jlayer.drafting.lookup import Index
from jlayer.drafting.tree import ROOT, Guesses, Tree
from jlayer.engine.batch import Growth
from jlayer.engine.lane import Lane
from jlayer.engine.pool import Pool
from jlayer.engine.riders import Rider
from jlayer.engine.sample import NoiseKey, gumbel, noise_words
from jlayer.plan.memory import NOISE_BYTES


class Noise:
    """The noise of lanes' positions, kept from step to step and from pass to pass, in NOISE_BYTES:
    the next ones need the same."""

    def __init__(self, vocab_size: int):
        self._size = vocab_size
        self._words: OrderedDict[NoiseKey, np.ndarray] = OrderedDict()
        self.most = max(1, NOISE_BYTES // (8 * vocab_size))

    def __len__(self) -> int:
        """Positions whose noise is kept, at most `most`."""
        return len(self._words)

    def of(self, lane: Lane, ids: np.ndarray, depth: int) -> np.ndarray:
        """The noise of ids for the token `depth` places after a lane's history."""
        key = lane.noise_key(depth)
        if key not in self._words:
            self._words[key] = noise_words(self._size, key)
            if len(self._words) > self.most:
                self._words.popitem(last=False)
        self._words.move_to_end(key)
        return gumbel(self._words[key][ids])


@dataclass
class Seat:
    """A lane's tree while it grows.

    `own`, `others`: texts that are looked up, if any. `rows`: the pool rows of the lane's tokens.
    `deepest`: deeper guesses could not be accepted. `drafts`: whether a draft model guesses too.
    """

    rider: Rider
    tree: Tree
    own: Index | None
    others: Index | None
    rows: np.ndarray
    deepest: int
    drafts: bool
    expanded: list[int] = field(default_factory=list)  # nodes that the draft model has taken
    taken: list[int] = field(default_factory=list)  # their pool rows
    seen: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    candidates: dict[int, tuple] = field(default_factory=dict)  # node -> (ids, logits) after it

    @property
    def lane(self) -> Lane:
        return self.rider.lane

    def next(self, most: int, *, above: int) -> list[int]:
        """The next nodes of the tree to be expanded, at most `most`, and none at depth `above` or
        deeper."""
        limit, nodes = min(self.deepest, above), []
        while len(nodes) < most and (more := self.tree.next(most - len(nodes))):
            nodes += [node for node in more if self.tree.depths[node] < limit]
        return nodes

    def grow(self, nodes: Sequence[int], new: np.ndarray) -> Growth:
        """The next nodes for the draft model, to be written to the pool rows `new`."""
        tree, before = self.tree, len(self.expanded)
        places = {node: place for place, node in enumerate(self.expanded)}
        self.expanded += nodes
        self.taken += new.tolist()
        n_all = len(self.expanded)
        seen = np.zeros((n_all, n_all), bool)
        seen[:before, :before] = self.seen
        for place, node in enumerate(nodes, before):
            parent = int(tree.parents[node])
            if parent != ROOT:
                seen[place] = seen[places[parent]]
            seen[place, place] = True
        self.seen = seen
        return Growth(
            tokens=tree.tokens[nodes].tolist(),
            positions=(len(self.lane.history) - 1 + tree.depths[nodes]).tolist(),
            new=new,
            committed=self.rows,
            fresh=np.array(self.taken, np.int32),
            fresh_positions=len(self.lane.history) - 1 + tree.depths[self.expanded],
            seen=seen[before:],
        )

    def keep(self, guesses: Guesses, pool: Pool) -> None:
        """Gives back the pool rows of nodes that do not ride."""
        riding = set(guesses.nodes)
        pairs = list(zip(self.expanded, self.taken, strict=True))
        pool.release(np.array([row for node, row in pairs if node not in riding], np.int32))
        kept = [(node, row) for node, row in pairs if node in riding]
        self.expanded, self.taken = [node for node, _ in kept], [row for _, row in kept]

    def n_missing(self, guesses: Guesses) -> int:
        """How many guesses that ride have no pool row yet."""
        return len(guesses.nodes) - len(self.expanded)

    def give(self, guesses: Guesses, new: np.ndarray) -> None:
        """Gives the rider its guesses with their pool rows: those that the draft model wrote to,
        and new ones."""
        known, fresh = dict(zip(self.expanded, self.taken, strict=True)), iter(new.tolist())
        rows = [known[node] if node in known else next(fresh) for node in guesses.nodes]
        self.taken = []
        self.rider.guesses, self.rider.guessed = guesses, np.array(rows, np.int32)
        self.rider.n_drafted = min(len(self.tree), self.tree.most)

    def release(self, pool: Pool) -> None:
        """Gives back the pool rows of all nodes that the rider did not get."""
        pool.release(np.array(self.taken, np.int32))
        self.taken = []


def temperature_of(lane: Lane) -> float:
    """0 where it is greedy."""
    return 0.0 if lane.options.is_greedy else lane.options.temperature
