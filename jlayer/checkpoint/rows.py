"""Folders that hold the rows of one host alone, of a model that several hosts run together.

Of each matrix that is dealt out such a folder has some consecutive rows. Its manifest says which,
so nothing here knows how they were chosen. No JAX.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.errors import CheckpointError

FEWEST_HOSTS = 2


@dataclass(frozen=True)
class Host:
    """One of `n` hosts, by its number from 0."""

    number: int
    n: int

    def __post_init__(self):
        if not (self.n >= FEWEST_HOSTS and 0 <= self.number < self.n):
            raise ValueError(f"no host {self.number} of {self.n}")

    def __str__(self) -> str:
        return f"{self.number}/{self.n}"

    @property
    def words(self) -> str:
        return f"host {self.number} of {self.n} (the first is 0)"

    def as_dict(self) -> dict[str, int]:
        """The form in a manifest."""
        return {"host": self.number, "hosts": self.n}

    @classmethod
    def from_dict(cls, raw: dict) -> Host:
        """The inverse of `as_dict`. Raises ValueError, KeyError or TypeError for another form."""
        number, n = raw["host"], raw["hosts"]
        if type(number) is not int or type(n) is not int or len(raw) != 2:
            raise ValueError("rows")
        return cls(number, n)


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a tensor: `n` of `whole`, from row `first` on. Of a vector: numbers."""

    first: int
    n: int
    whole: int

    def __post_init__(self):
        if not (self.n > 0 and 0 <= self.first <= self.whole - self.n):
            raise ValueError(f"rows {self.first} to {self.first + self.n} of {self.whole}")

    @property
    def end(self) -> int:
        return self.first + self.n

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor, from that of these rows."""
        return (self.whole, *shape[1:])

    def own_row(self, first: int, n: int) -> int | None:
        """Where `n` rows from row `first` of the whole tensor on begin among these; None: not all
        of them are here."""
        return first - self.first if self.first <= first and first + n <= self.end else None


def check_host(folder: str, found: Host | None, wanted: Host | None = None) -> None:
    """Raises CheckpointError where a folder holds the rows of another host than the one that reads
    it; `wanted` is None where one host runs the model alone. A folder with all rows fits each."""
    if found is None or found == wanted:
        return
    asked = f"those of {wanted.words}" if wanted else "all rows"
    form = f"with --rows {wanted}" if wanted else "without --rows"
    raise CheckpointError(
        f"{folder}: holds the rows of {found.words} alone, expected {asked}; use it on that host, "
        f"together with the others, or convert the source again {form}"
    )
