"""A tree of guessed tokens that grows best-first.

A node's score is the log-probability that its whole path will be drawn. The order of nodes is that
of falling scores; of equal scores the lower number, which is the older node, comes first. A child
never scores above its parent and has a higher number, so the first nodes in this order are always
a tree, whatever their count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROOT = -1


@dataclass(frozen=True)
class Guesses:
    """A tree to be verified: nodes best first, so parents before children; one entry a node."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # places in these tuples; ROOT: the last token of the text
    scores: tuple[float, ...]  # log-probability that the path to the node will be drawn
    nodes: tuple[int, ...]  # numbers in the Tree that they came from
    expected: float  # tokens that a forward pass with this tree gives: 1 + the sum of exp(scores)


class Tree:
    """The guessed tokens after a text, while the tree grows; nodes are numbered as they come."""

    def __init__(self, most: int):
        """`most`: the most nodes that will be verified. No others are worth growing."""
        self._most = most
        self._length = 0
        self._tokens = np.zeros(0, np.int32)
        self._parents = np.zeros(0, np.int32)
        self._depths = np.zeros(0, np.int32)
        self._scores = np.zeros(0, np.float64)
        self._expanded = np.zeros(0, bool)
        self._root_expanded = False
        # Scores of the best `most` nodes, in no order: far fewer than all nodes of a wide tree.
        self._best = np.zeros(0, np.float64)

    def __len__(self) -> int:
        return self._length

    @property
    def most(self) -> int:
        return self._most

    @property
    def tokens(self) -> np.ndarray:
        """int32 [nodes]; a view, as are the next three."""
        return self._tokens[: self._length]

    @property
    def parents(self) -> np.ndarray:
        """int32 [nodes]: the number of each node's parent, or ROOT."""
        return self._parents[: self._length]

    @property
    def depths(self) -> np.ndarray:
        """int32 [nodes]: 1 for a child of the root."""
        return self._depths[: self._length]

    @property
    def scores(self) -> np.ndarray:
        """float64 [nodes]."""
        return self._scores[: self._length]

    @property
    def expected(self) -> float:
        """Tokens that a forward pass with the best `most` nodes is expected to give."""
        return 1.0 + float(np.exp(self._best).sum())

    def add(self, parent: int, ids: Sequence[int] | np.ndarray, log_p: np.ndarray) -> None:
        """Adds the children of `parent`, a node or ROOT, all at once.

        `ids`: distinct tokens. `log_p`: the log-probability of each if the parent is drawn. Those
        that cannot be among the best `most` are left out.
        """
        depth, score = 1, 0.0
        if parent == ROOT:
            self._root_expanded = True
        else:
            self._expanded[parent] = True
            depth, score = int(self._depths[parent]) + 1, float(self._scores[parent])
        # Rounding may put a log-probability above 0, which would place a child before its parent.
        scores = score + np.minimum(np.asarray(log_p, np.float64), 0.0)
        kept = np.flatnonzero(scores > self._bar())
        if not len(kept):
            return
        kept = kept[np.argsort(-scores[kept], kind="stable")[: self._most]]
        best = np.concatenate([self._best, scores[kept]])
        if len(best) > self._most:
            best = np.partition(best, len(best) - self._most)[-self._most :]
            kept = kept[scores[kept] >= best[0]]
        self._best = best
        new = slice(self._length, self._length + len(kept))
        self._reserve(new.stop)
        self._tokens[new] = np.asarray(ids)[kept]
        self._parents[new] = parent
        self._depths[new] = depth
        self._scores[new] = scores[kept]
        self._expanded[new] = False
        self._length = new.stop

    def next(self, count: int) -> list[int]:
        """The best nodes whose children can be among the best `most`: at most `count`, best first.

        At first [ROOT]. They count as expanded from now on. None: the best `most` are final.
        """
        if not self._root_expanded:
            self._root_expanded = True
            return [ROOT]
        # Children of the last of `most` nodes would come after it.
        growable = np.flatnonzero((self.scores > self._bar()) & ~self._expanded[: self._length])
        chosen = growable[np.argsort(-self._scores[growable], kind="stable")[:count]]
        self._expanded[chosen] = True
        return chosen.tolist()

    def lineage(self, node: int) -> list[int]:
        """The numbers of the nodes from below the root to `node`, which comes last."""
        numbers = []
        while node != ROOT:
            numbers.append(node)
            node = int(self._parents[node])
        return numbers[::-1]

    def path(self, node: int) -> list[int]:
        """The tokens from below the root to `node`."""
        return self._tokens[self.lineage(node)].tolist() if node != ROOT else []

    def best(self, count: int) -> Guesses:
        """The best `count` nodes, at most `most`."""
        count = min(count, self._most, self._length)
        scores = self.scores
        if count == 0:
            return Guesses((), (), (), (), 1.0)
        if count < len(scores):
            bar = np.partition(scores, len(scores) - count)[len(scores) - count]
            order = np.flatnonzero(scores >= bar)  # more than `count` if some are equal
        else:
            order = np.arange(len(scores))
        order = order[np.argsort(-scores[order], kind="stable")[:count]]
        places = np.zeros(self._length + 1, np.int64)
        places[order] = np.arange(count)
        places[ROOT] = ROOT  # the last entry
        return Guesses(
            tokens=tuple(self._tokens[order].tolist()),
            parents=tuple(places[self._parents[order]].tolist()),
            scores=tuple(scores[order].tolist()),
            nodes=tuple(order.tolist()),
            expected=1.0 + float(np.exp(scores[order]).sum()),
        )

    def _bar(self):
        """The score that a new node must exceed."""
        if len(self._best) < self._most:
            return -np.inf
        return self._best.min()

    def _reserve(self, length):
        if length <= len(self._tokens):
            return
        size = max(length, 2 * len(self._tokens), 256)
        for name in ("_tokens", "_parents", "_depths", "_scores", "_expanded"):
            column = getattr(self, name)
            longer = np.zeros(size, column.dtype)
            longer[: self._length] = column[: self._length]
            setattr(self, name, longer)
