"""What low-rank adapters add to the products of a model's matrices, as plain data. Standard library
only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Columns:
    """What one adapter adds to the product of a matrix: `rank` rows of A and columns of B, and what
    their product is multiplied by. `adapter`: its number; only rows that are computed with it get
    it. None: all rows do."""

    rank: int
    scale: float
    adapter: int | None = None


@dataclass(frozen=True)
class Addition:
    """What is added to the product W x of a matrix W [out, in]: `scale` * B (A x) of an adapter,
    where A is [rank, in] and B [out, rank] (LoRA, arXiv 2106.09685). Those of several adapters
    stand beside each other: A [sum of ranks, in], B [out, sum of ranks]. `has_lengths`: every row
    of the sum W + `scale` * B A then gets a length of its own (DoRA, arXiv 2402.09353)."""

    columns: tuple[Columns, ...]
    has_lengths: bool = False

    @property
    def rank(self) -> int:
        """Of all together."""
        return sum(each.rank for each in self.columns)

    @property
    def scale(self) -> float:
        """Of the one adapter that adds something."""
        (only,) = self.columns
        return only.scale

    @property
    def chooses(self) -> bool:
        """Whether a row gets what its own adapter adds, and nothing of the others."""
        return any(each.adapter is not None for each in self.columns)


@dataclass(frozen=True)
class Additions:
    """What is added to a model. `rows`: (published name of a matrix, what is added to its product),
    sorted."""

    rows: tuple[tuple[str, Addition], ...]

    @classmethod
    def of_one(cls, matrices: Iterable[tuple[str, int, float]]) -> Additions:
        """Those of one adapter: (published name of a matrix, rank, scale)."""
        rows = ((name, Addition((Columns(rank, scale),))) for name, rank, scale in matrices)
        return cls(tuple(sorted(rows, key=lambda row: row[0])))

    @cached_property
    def _hash(self):
        return hash(self.rows)

    def __hash__(self) -> int:
        return self._hash  # a config is a key of many caches, and there may be thousands of rows

    @cached_property
    def of_matrix(self) -> dict[str, Addition]:
        """By the published name of the matrix."""
        return dict(self.rows)

    @cached_property
    def have_lengths(self) -> bool:
        """Whether some rows get a length of their own."""
        return any(added.has_lengths for _, added in self.rows)

    @cached_property
    def choose(self) -> bool:
        """Whether it must be known of each row with which adapter it is computed."""
        return any(added.chooses for _, added in self.rows)
