"""How the rows of a matrix are dealt out: first to hosts, then to the devices of each.

Each device multiplies its own rows, and the products are gathered: nothing is summed across
devices, so what a row gives does not depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.parts import Attention


@dataclass(frozen=True)
class Deal:
    """`n_rows` rows in ranges of `height` each, in order, that begin at `firsts`. Where they do not
    come out even, the last ranges begin earlier: they have rows that the range before has too."""

    n_rows: int
    height: int
    firsts: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.firsts)

    def first(self, number: int) -> int:
        """The first row of a range."""
        return self.firsts[number]

    def repeated(self, number: int) -> int:
        """How many of a range's first rows the ranges before have too."""
        if number == 0:
            return 0
        return max(0, self.firsts[number - 1] + self.height - self.firsts[number])

    def of_all(self, at: int, n_rows: int) -> list[tuple[slice, int]]:
        """Of the rows from place `at` of every range on, one range after another: (where they are
        among these, the first one) of each range, without what the range before has too."""
        found = []
        for number, first in enumerate(self.firsts):
            skipped = max(0, self.repeated(number) - at)
            begin, end = number * n_rows + skipped, (number + 1) * n_rows
            found.append((slice(begin, end), first + at + skipped))
        return [(rows, first) for rows, first in found if rows.start < rows.stop]

    @property
    def is_even(self) -> bool:
        return self.n * self.height == self.n_rows


def dealt(n_rows: int, *, row_unit: int, n: int) -> Deal | None:
    """The deal of so many rows to `n` devices, or hosts, in whole units of rows; None where each
    has all of them: there is one, one unit, or a unit that is not full."""
    if n == 1 or n_rows % row_unit:
        return None
    height = -(-(n_rows // row_unit) // n) * row_unit
    if height >= n_rows:
        return None
    return Deal(n_rows, height, tuple(min(i * height, n_rows - height) for i in range(n)))


def host_rows(n_rows: int, *, row_unit: int, host: int, hosts: int) -> slice | None:
    """The rows of a matrix that one of several hosts reads, whatever devices it has; None: each
    host reads all of them. The devices of a host share them out as `dealt` says."""
    deal = dealt(n_rows, row_unit=row_unit, n=hosts)
    if deal is None:
        return None
    return slice(deal.first(host), deal.first(host) + deal.height)


def deals_heads(attention: Attention | None, n: int) -> bool:
    """Whether each of `n` devices has its own heads of this attention, and what its cache keeps of
    their keys and values; else each has all of them."""
    if n == 1 or attention is None or attention.n_kv_heads % n:
        return False
    norms = attention.head_norms
    # A norm over all heads is taken of all.
    return norms is None or (norms.over != "flat" and len(norms.q) == len(norms.k) == 1)
