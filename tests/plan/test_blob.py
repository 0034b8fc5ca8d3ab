"""Tiles that cross a link as one array: what lies where, and which tiles do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jlayer.plan.blob import blob_of

from jlayer.checkpoint.store import Segment
from jlayer.plan import blob
from jlayer.plan.tiles import Part, Tile
from jlayer.spec import ALIGNMENT
from jlayer.streaming.direct import aligned_span


def tile_of(*parts):
    return Tile("layer 0", "block", 0, parts)


@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    width=st.integers(1, 300),
    begins=st.lists(st.integers(0, 100_000), min_size=5, max_size=5),
)
def test_every_part_has_room_for_the_blocks_around_it_wherever_it_begins(rows, width, begins):
    parts = [Part(f"leaf_{i}.q", f"tensor.{i}.q", "uint8", (n, width)) for i, n in enumerate(rows)]
    found = blob_of(tile_of(*parts), "gpu")
    ends = [*found.offsets[1:], found.n_bytes]
    for part, begin, offset, end in zip(parts, begins, found.offsets, ends, strict=False):
        assert offset % ALIGNMENT == 0  # or the disk would refuse to read there directly
        assert offset + aligned_span(Segment("file", begin, part.n_bytes))[1] <= end


@pytest.mark.parametrize(
    ("platform", "parts"),
    [
        ("cpu", [Part("q_proj.q", "a", "uint8", (8, 8))]),
        ("gpu", [Part("q_proj", "a", "bfloat16", (8, 8)), Part("k_proj", "b", "bfloat16", (8, 8))]),
        ("gpu", [Part("q_proj.q", "a", "uint8", (2, blob.MOST_BYTES))]),
    ],
    ids=["no link", "multiplied as it lies", "large"],
)
def test_other_tiles_cross_array_by_array(platform, parts):
    assert blob_of(tile_of(*parts), platform) is None
