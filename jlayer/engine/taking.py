"""Which lanes read what is kept of their prompts, where some of them begin alike: no entry is held
twice that a plan counts once.

A lane that another one has as many entries for, or is about to have, reads nothing. Of what the
others read, each first token that they share is in one pool row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.engine.entries import NONE
from jlayer.engine.lane import Lane
from jlayer.engine.riders import n_alike


@dataclass(frozen=True)
class Fill:
    """A lane that gets its first `n_tokens` entries: the first `n_shared` of these are those of
    `source`, which comes before it or has them, and the others are read."""

    lane: Lane
    n_tokens: int
    source: Lane | None = None
    n_shared: int = 0

    @property
    def n_read(self) -> int:
        return self.n_tokens - self.n_shared


def fills_of(
    lanes: Sequence[Lane], n_kept: Sequence[int], beside: Sequence[Lane] = ()
) -> list[Fill]:
    """What each of these lanes, of one run, is to read, of so many first tokens that are kept; the
    most first. `beside`: other lanes, with the entries that they have. Empties the tables of these,
    and of those that get their entries in a forward pass, from a lane that is about to have them.
    """
    owned = [max(len(lane.table), n) for lane, n in zip(lanes, n_kept, strict=True)]
    before, fills = list(beside), []
    there = {id(lane): len(lane.table) for lane in before}
    for number in sorted(range(len(lanes)), key=lambda number: -owned[number]):
        lane, n_own = lanes[number], owned[number]
        alike = [(_n_alike(lane, one), one) for one in before]
        n_promised = max((n for n, one in alike if _computes(one)), default=0)
        held = [(min(n, there[id(one)]), one) for n, one in alike]
        n_shared, source = max(held, key=lambda pair: pair[0], default=(0, None))
        if n_own <= max(n_shared, n_promised):
            lane.table.cut(0)
            n_own = n_shared if n_own and n_shared >= n_promised else 0
        if n_own > len(lane.table):
            lane.table.cut(0)
            fills.append(Fill(lane, n_own, source if n_shared else None, n_shared))
        before.append(lane)
        there[id(lane)] = n_own
    return fills


def places_of(fills: Sequence[Fill]) -> tuple[list[np.ndarray], np.ndarray]:
    """For each fill the places of its entries, among new ones and behind these the given ones; and
    the pool rows of the given ones."""
    n_new = sum(fill.n_read for fill in fills)
    places: dict[int, np.ndarray] = {}
    given, first, first_given = [NONE], 0, n_new
    for fill in fills:
        head, source = NONE, fill.source
        if source is not None and id(source) in places:
            head = places[id(source)][: fill.n_shared]
        elif source is not None:
            given.append(source.table.rows[: fill.n_shared].copy())
            head = np.arange(first_given, first_given + fill.n_shared, dtype=np.int32)
            first_given += fill.n_shared
        own = np.arange(first, first + fill.n_read, dtype=np.int32)
        places[id(fill.lane)] = np.concatenate([head, own])
        first += fill.n_read
    return list(places.values()), np.concatenate(given)


def _n_alike(lane, other):
    """Of so many first tokens `other` has, or gets, the entries of `lane`."""
    if (lane.adapter, lane.has_switched) != (other.adapter, other.has_switched):
        return 0
    return n_alike(lane.history, other.history, min(lane.n_shareable, len(other.history)))


def _computes(lane):
    """Whether it is on its way through its prompt: others wait for what they share with it."""
    return lane.is_alive and lane.is_hungry and lane.n_pending > 1
