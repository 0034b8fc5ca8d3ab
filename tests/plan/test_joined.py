"""Tiles that cross a link as one array: what lies where, and which tiles do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.checkpoint.store import Segment
from jlayer.encodings.registry import SCHEMES
from jlayer.plan.cutting import cut
from jlayer.plan.joined import MOST_BYTES, joined
from jlayer.spec import ALIGNMENT
from jlayer.streaming.direct import aligned_span
from tests.plan.models import SMALL, weights_of


@given(
    sizes=st.lists(st.integers(1, 900_000), min_size=1, max_size=5),
    begins=st.lists(st.integers(0, 100_000), min_size=5, max_size=5),
)
def test_every_part_has_room_for_the_blocks_around_it_wherever_it_begins(sizes, begins):
    found = joined(sizes, is_plain=False, platform="gpu")
    ends = [*found.offsets[1:], found.n_bytes]
    assert len(found.offsets) == len(sizes)
    for size, begin, offset, end in zip(sizes, begins, found.offsets, ends, strict=False):
        assert offset % ALIGNMENT == 0  # or the disk would refuse to read there directly
        assert offset + aligned_span(Segment("file", begin, size))[1] <= end


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([64], {"is_plain": False, "platform": "cpu"}),
        ([128, 128], {"is_plain": True, "platform": "gpu"}),
        ([MOST_BYTES, 1], {"is_plain": False, "platform": "gpu"}),
    ],
    ids=["no link", "multiplied as it lies", "large"],
)
def test_other_tiles_cross_array_by_array(sizes, options):
    assert joined(sizes, **options) is None


@pytest.mark.parametrize("tile_bytes", [None, 100_000, 3_000])
@pytest.mark.parametrize("stored", SCHEMES)
def test_a_tile_is_laid_out_by_the_bytes_of_its_own_parts(stored, tile_bytes):
    tiling = cut(weights_of(SMALL, stored=stored), tile_bytes, platform="gpu")
    for tile in tiling.tiles:
        sizes = [part.n_bytes for part in tile.parts]
        assert tile.joined == joined(sizes, is_plain=False, platform="gpu")
        assert tile.device_bytes == tile.joined.n_bytes
        assert tile.n_bytes < tile.device_bytes <= tile.n_bytes + len(sizes) * 2 * ALIGNMENT
        assert tile.n_arrays == len({part.matrix for part in tile.parts if len(part.shape) == 2})


@pytest.mark.parametrize(
    ("stored", "platform"), [("bfloat16", "gpu"), ("int8", "cpu"), ("int4", "cpu")]
)
def test_a_tile_that_is_not_joined_is_on_the_device_as_its_parts(stored, platform):
    for tile in cut(weights_of(SMALL, stored=stored), 100_000, platform=platform).tiles:
        assert tile.joined is None
        assert tile.n_arrays == len(tile.parts)
        assert tile.device_bytes == sum(part.n_bytes for part in tile.parts)
