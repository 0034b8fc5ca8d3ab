"""A tile's arrays one after another, to cross the link as one array of bytes.

Each array that is put on a GPU costs a turn in Python and the driver (some 70 µs on an H200, where
48 MiB take 900), and a quantised tile has up to four, half of them small. What is multiplied as it
lies (a plain matrix) has to be an array of its own; what is written out first may lie anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.checkpoint.layout import ALIGNMENT
from jlayer.encodings.quantization import split_piece
from jlayer.plan.tiles import Tile

LINKED = ("gpu",)  # the platforms whose weights cross a link
# Larger tiles hide what each array costs; and offsets in a blob are 32 bits.
MOST_BYTES = 512 << 20


@dataclass(frozen=True)
class Blob:
    """Where each of a tile's parts begins, and the bytes of all."""

    offsets: tuple[int, ...]
    n_bytes: int


def blob_of(tile: Tile, platform: str) -> Blob | None:
    """How a tile crosses the link as one array; None where its arrays cross one by one, or, on a
    CPU, nothing crosses.

    Each part has room for the disk's blocks around it, wherever they begin, so that the offsets are
    the same for every tile that is alike.
    """
    quantized = any(split_piece(part.leaf)[1] for part in tile.parts)
    if platform not in LINKED or not quantized or tile.n_bytes > MOST_BYTES:
        return None
    offsets, at = [], 0
    for part in tile.parts:
        offsets.append(at)
        at += -(-part.n_bytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    return Blob(tuple(offsets), at)
