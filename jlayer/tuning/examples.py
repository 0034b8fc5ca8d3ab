"""Texts as tokens, as they are held in memory while a model is tuned on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A text as tokens: 4 bytes for each, since the texts are all in memory.

    `ids`: int32 [n]. `weights`: float32 [n], of each id by how much its prediction from those
    before counts in the loss; the first is always 0. None: each of the others counts once. All are
    0 where the data give the text weight 0.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of(cls, ids: Sequence[int], weights: Sequence[float] | None = None) -> Example:
        """From numbers of any kind, of which there are as many."""
        own = np.asarray(ids, np.int32)
        if weights is None:
            return cls(own)
        found = np.asarray(weights, np.float32)
        assert found.shape == own.shape, (found.shape, own.shape)
        assert not found[:1].any(), "the first token is not predicted"
        return cls(own) if (found[1:] == 1).all() else cls(own, found)

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        return np.array_equal(self.ids, other.ids) and np.array_equal(
            self.all_weights, other.all_weights
        )

    __hash__ = None

    @property
    def all_weights(self) -> np.ndarray:
        """Those of every id, where they are None too."""
        if self.weights is not None:
            return self.weights
        found = np.ones(len(self), np.float32)
        found[:1] = 0
        return found

    @property
    def n_learned(self) -> int:
        """How many tokens count."""
        if self.weights is None:
            return max(0, len(self) - 1)
        return int(np.count_nonzero(self.weights))

    def piece(self, first: int, end: int) -> Example:
        """Some of its tokens, of which the first is not predicted. The ids are not copied."""
        ids = self.ids[first:end]
        if self.weights is None:
            return Example(ids)
        weights = self.weights[first:end].copy()
        weights[:1] = 0
        return Example.of(ids, weights)


@dataclass(frozen=True)
class Data:
    """The examples of a file, in its order, and the SHA-256 of its bytes. `skipped`: what is wrong
    with each line that was left out."""

    examples: list[Example]
    sha256: str
    skipped: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Of those that are learned from."""
        return sum(one.n_learned for one in self.examples)

    @property
    def digest(self) -> str:
        """Of the file and of the tokens that it became, which hang on the tokenizer and the
        template; some templates write the date."""
        digest = hashlib.sha256(self.sha256.encode())
        for one in self.examples:
            digest.update(f"{len(one)} {one.weights is not None} ".encode())
            digest.update(one.ids.tobytes())
            if one.weights is not None:
                digest.update(one.weights.tobytes())
        return digest.hexdigest()
