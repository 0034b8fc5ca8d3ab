"""How a tile's arrays cross the link: one by one, or joined in one array of bytes.

Each array that is put on a GPU costs time in Python and the driver (some 70 us on an H200, where
48 MiB take 900), and a quantised tile has up to four, half of them small. A plain matrix has to be
an array of its own, since it is multiplied as it lies; what is decoded first may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jlayer.spec import ALIGNMENT

LINKED = ("gpu",)  # the platforms whose weights cross a link
# Larger tiles hide what each array costs; and offsets in a joined array are 32 bits.
MOST_BYTES = 512 << 20


@dataclass(frozen=True)
class Joined:
    """Where each of a tile's parts begins in the one array, and the bytes of all."""

    offsets: tuple[int, ...]
    n_bytes: int


def joined(sizes: Sequence[int], *, is_plain: bool, platform: str) -> Joined | None:
    """The layout of parts of these bytes in one array; None where they cross one by one, or, on a
    CPU, where nothing crosses.

    Each part has room for the disk's blocks around it, wherever they begin. So the offsets are the
    same for every tile of the same parts.
    """
    if platform not in LINKED or is_plain or sum(sizes) > MOST_BYTES:
        return None
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    return Joined(tuple(offsets), at)
