"""The adapters of a layer as one vector, in the order of its matrices: one array crosses the link
in the place of many small ones, each of which would take as long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jlayer.tuning.adapter import State
from jlayer.tuning.visits import Trained

# Layer -> a vector, float32.
Flats = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Row:
    """An adapter: the leaf that it is of, the published name of that, by what B A is multiplied,
    and the shapes of A and B."""

    leaf: str
    name: str
    scale: float
    a: tuple[int, int]
    b: tuple[int, int]

    @property
    def sides(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """As they follow one another."""
        return ("a", self.a), ("b", self.b)


@dataclass(frozen=True)
class Layout:
    """`layers`: the adapters of each layer that has some."""

    layers: Mapping[int, tuple[Row, ...]]

    @classmethod
    def of(cls, trained: Trained, state: State) -> Layout:
        """Of adapters with the shapes of `state`."""
        return cls(
            {
                layer: tuple(
                    Row(leaf, name, scale, state[name]["a"].shape, state[name]["b"].shape)
                    for leaf, (name, scale) in own.items()
                )
                for layer, own in trained.items()
            }
        )

    def flat(self, state: State) -> dict[int, np.ndarray]:
        """The vectors of a state, which are copies."""
        return {
            layer: np.concatenate(
                [state[row.name][s].ravel() for row in rows for s, _ in row.sides]
            )
            for layer, rows in self.layers.items()
        }

    def views(self, flats: Flats) -> State:
        """The state in some vectors; the arrays are parts of these."""
        found = {}
        for layer, rows in self.layers.items():
            at = 0
            for row in rows:
                found[row.name] = {}
                for side, shape in row.sides:
                    size = math.prod(shape)
                    found[row.name][side] = flats[layer][at : at + size].reshape(shape)
                    at += size
        return found
