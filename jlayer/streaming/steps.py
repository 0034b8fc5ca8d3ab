"""The steps that a schedule is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A slot of the ring, by number; or the room of what stays in host memory, by a key that other tiles
# may have had before. None: the tile's own room.
Slot = int | tuple[int, int, int] | None


@dataclass(frozen=True)
class Read:
    """Read a tile from disk to a slot in host memory, in the background."""

    tile: int
    slot: Slot


@dataclass(frozen=True)
class Put:
    """Put a tile from host to device, after its read, if it is read in this sweep. `stays`: it is
    not dropped when it has run. `guessed`: it may not run at all; its slot may be written again as
    soon as it is there."""

    tile: int
    slot: Slot
    stays: bool = False
    guessed: bool = False


@dataclass(frozen=True)
class Run:
    """Call the compiled functions that use the tile's weights on the device; or, `on` the "host",
    let its cores multiply them where they lie, in the background. `also`: the tiles of further
    experts that are used in the same call."""

    tile: int
    on: str = "device"
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class Free:
    """Wait for the run of tile `after`, which used this tile; then drop the tile from the device,
    if it was there, and release its slot.

    If `after` is None, the tile stays on the device: wait for its transfer, then release the slot.
    """

    tile: int
    slot: Slot
    after: int | None


@dataclass(frozen=True)
class Drop:
    """Drop a tile from the device that nothing in this sweep has used: another one takes its
    place."""

    tile: int


@dataclass(frozen=True)
class Keep:
    """A tile that was put by guess is used, and stays on the device."""

    tile: int


@dataclass(frozen=True)
class Fetch:
    """Wait for the decision which experts of a layer are used; it is sent into the schedule.
    `tile`: the first tile of the layer's experts. `guess`: the same of the next layer, if its
    experts are to be guessed."""

    tile: int
    guess: int | None = None


@dataclass(frozen=True)
class Decision:
    """The numbers of the experts that a layer uses, in the order in which they run; and of those
    that the next layer may use, the likeliest first."""

    chosen: Sequence[int]
    guessed: Sequence[int] = ()


@dataclass(frozen=True)
class PutCache:
    """Put the cache of the layer whose run is at `tile` from host to device."""

    tile: int


@dataclass(frozen=True)
class Take:
    """After the run at `tile`: bring what was written to the layer's cache back to the host, and
    drop the cache from the device."""

    tile: int


Step = Read | Put | Run | Free | Drop | Keep | Fetch | PutCache | Take
