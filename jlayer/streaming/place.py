"""Where a tile lies on disk, and where its parts lie once it is read."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.checkpoint.store import Segment, Store
from jlayer.plan.tiles import Part, Tile

# JAX takes an array as it lies only at a multiple of this; elsewhere it copies it, slowly.
VIEW_ALIGNMENT = 64


@dataclass(frozen=True)
class Placement:
    """A part's place once its tile is read: which of the tile's segments, and how far into it."""

    part: Part
    segment: int
    offset: int


def place(store: Store, tile: Tile) -> tuple[tuple[Segment, ...], tuple[Placement, ...]]:
    """The segments to read for a tile, and where each part lies in them.

    Neighbours are joined where the later one can then be viewed where it comes to lie. A tile that
    crosses the link as one array has a segment for each part, in the parts' order.
    """
    if tile.joined:
        places = (Placement(part, index, 0) for index, part in enumerate(tile.parts))
        return tuple(_span(store, part) for part in tile.parts), tuple(places)
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
    return joins and (span.offset - last.offset) % VIEW_ALIGNMENT == 0
