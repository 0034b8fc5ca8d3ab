"""The segments of a tile on disk, and the position of its parts after reading."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.checkpoint.store import Segment, Store
from jlayer.plan.tiles import Part, Tile

# JAX uses a host array without copying only at a multiple of this address; else it copies, slowly.
VIEW_ALIGNMENT = 64


@dataclass(frozen=True)
class Placement:
    """The position of a part after reading: the index of its segment, and the offset in it."""

    part: Part
    segment: int
    offset: int


def place(store: Store, tile: Tile) -> tuple[tuple[Segment, ...], tuple[Placement, ...]]:
    """The segments to read for a tile, and the position of each part in them.

    Parts that are neighbours on disk share a segment if the later part is then aligned to
    VIEW_ALIGNMENT, and none of them is decoded as it is read. A joined tile has one segment for
    each part of each device, in the order of the devices and of the parts.
    """
    if tile.joined:
        parts = [part for device in range(tile.n_devices) for part in tile.parts_of(device)]
        places = (Placement(part, index, 0) for index, part in enumerate(parts))
        return tuple(_span(store, part) for part in parts), tuple(places)
    spans = sorted((_span(store, part), part.tensor, part.first_row, part) for part in tile.parts)
    segments: list[Segment] = []
    places = []
    for span, _, _, part in spans:
        last = segments[-1] if segments else None
        if last and _follows(span, last):
            segments[-1] = Segment(last.file, last.offset, last.n_bytes + span.n_bytes)
        else:
            segments.append(span)
        places.append(Placement(part, len(segments) - 1, span.offset - segments[-1].offset))
    return tuple(segments), tuple(places)


def _span(store, part):
    return store.rows_segment(part.tensor, first_row=part.first_row, n_bytes=part.n_bytes)


def _follows(span, last):
    joins = last.file == span.file and last.offset + last.n_bytes == span.offset
    joins = joins and last.nested is None and span.nested is None
    return joins and (span.offset - last.offset) % VIEW_ALIGNMENT == 0
