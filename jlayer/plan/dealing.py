"""How the rows of a matrix are dealt out to several devices.

Each device multiplies its own rows, and the products are gathered: nothing is summed across
devices, so what a row gives does not depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.parts import Attention


@dataclass(frozen=True)
class Deal:
    """`n_rows` rows in `n` ranges of `height` each, in order. Where they do not come out even, the
    last ranges begin earlier: they have rows that the range before has too."""

    n: int
    n_rows: int
    height: int

    def first(self, number: int) -> int:
        """The first row of a range."""
        return min(number * self.height, self.n_rows - self.height)

    def repeated(self, number: int) -> int:
        """How many of a range's first rows the ranges before have too."""
        return min(self.height, number * self.height - self.first(number))

    @property
    def is_even(self) -> bool:
        return self.n * self.height == self.n_rows


def dealt(n_rows: int, *, row_unit: int, n: int) -> Deal | None:
    """The deal of so many rows to `n` devices, in whole units of rows; None where each device has
    all of them: there is one device, one unit, or a unit that is not full."""
    if n == 1 or n_rows % row_unit:
        return None
    height = -(-(n_rows // row_unit) // n) * row_unit
    return Deal(n, n_rows, height) if height < n_rows else None


def deals_heads(attention: Attention | None, n: int) -> bool:
    """Whether each of `n` devices has its own heads of this attention, and what its cache keeps of
    their keys and values; else each has all of them."""
    if n == 1 or attention is None or attention.n_kv_heads % n:
        return False
    norms = attention.head_norms
    # A norm over all heads is taken of all.
    return norms is None or (norms.over != "flat" and len(norms.q) == len(norms.k) == 1)


def host_rows(n_rows: int, *, row_unit: int, host: int, hosts: int) -> slice | None:
    """The rows of a matrix that one of several hosts reads, numbered from 0; its own devices share
    them. None: each host has all rows, see `dealt`."""
    deal = dealt(n_rows, row_unit=row_unit, n=hosts)
    if deal is None:
        return None
    first = deal.first(host)
    return slice(first, first + deal.height)
