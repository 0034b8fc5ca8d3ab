"""Plan → the steps of one sweep: a plain list that the executor interprets and anything else can
sum, draw or test.

With n slots, tile k+n is read into a slot as soon as tile k has left it, and tile k+1 is put on the
device while tile k runs. The order wraps: while the last tiles run, the first of the next sweep are
read and put.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Read:
    """Disk → host slot, in the background."""

    tile: int
    slot: int


@dataclass(frozen=True)
class Put:
    """Host slot → device, once its read is done."""

    tile: int
    slot: int


@dataclass(frozen=True)
class Run:
    """A compiled function over the tile's weights on the device."""

    tile: int
    slot: int


@dataclass(frozen=True)
class Free:
    """Drop the tile once the output of what used it is ready; its slot may then be written
    again."""

    tile: int
    slot: int


Step = Read | Put | Run | Free


def prologue(n_tiles: int, n_slots: int) -> list[Step]:
    """What comes before the first sweep: every slot is being filled, the first tile is put."""
    _check(n_tiles, n_slots)
    return [*(Read(k % n_tiles, k) for k in range(n_slots)), Put(0, 0)]


def sweep(n_tiles: int, n_slots: int, phase: int = 0) -> list[Step]:
    """One sweep in the steady state, from tile 0 (already put) to tile 0 of the next sweep put.

    `phase` is the slot that holds tile 0; `next_phase` gives the following sweep's.
    """
    _check(n_tiles, n_slots)
    steps: list[Step] = []
    for k in range(n_tiles):
        slot = (phase + k) % n_slots
        put_next = Put((k + 1) % n_tiles, (phase + k + 1) % n_slots)
        run = Run(k, slot)
        done = [Free(k, slot), Read((k + n_slots) % n_tiles, slot)]
        # With a single slot the next tile can only follow the one that leaves.
        steps += [run, *done, put_next] if n_slots == 1 else [run, put_next, *done]
    return steps


def next_phase(n_tiles: int, n_slots: int, phase: int) -> int:
    """The slot of tile 0 in the sweep after one that began at `phase`."""
    return (phase + n_tiles) % n_slots


def _check(n_tiles, n_slots):
    assert min(n_tiles, n_slots) >= 1, (n_tiles, n_slots)
