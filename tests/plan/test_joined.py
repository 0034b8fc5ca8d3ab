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


@pytest.mark.parametrize("stored", SCHEMES)
def test_of_several_devices_each_has_its_own_rows_in_one_array(stored):
    tiling = cut(weights_of(SMALL, stored=stored), 100_000, platform="gpu", n_devices=2)
    for tile in tiling.tiles:
        parts = [tile.parts_of(device) for device in range(2)]
        sizes = [part.n_bytes for part in parts[0]]
        assert tile.joined == joined(sizes, is_plain=False, platform="gpu")
        assert sizes == [part.n_bytes for part in parts[1]]
        assert tile.room_bytes == 2 * tile.device_bytes == 2 * tile.joined.n_bytes
        n_bytes = tile.joined.n_bytes
        offsets = [*tile.joined.offsets, *(n_bytes + at for at in tile.joined.offsets)]
        assert tile.joined.all_offsets(2) == tuple(offsets)
        for whole, first, second in zip(tile.parts, *parts, strict=True):
            assert first.first_row == whole.first_row
            assert second.first_row == first.first_row + first.shape[0]
            assert first.shape[0] + second.shape[0] == whole.shape[0]


def test_rows_that_do_not_come_out_even_cross_array_by_array():
    """The bytes of some rows would be read twice. So do those for the host's cores, which look for
    each array."""
    shares = (("int8", 0.5),)
    for options in ({"n_devices": 7}, {"n_devices": 2, "shares": shares}):
        tiling = cut(weights_of(SMALL, stored="int8"), 100_000, platform="gpu", **options)
        apart = [tile for tile in tiling.tiles if not tile.comes_out_even]
        assert apart
        assert all((tile.joined is None) == (tile in apart) for tile in tiling.tiles)


@pytest.mark.parametrize(
    ("stored", "platform"), [("bfloat16", "gpu"), ("int8", "cpu"), ("int4", "cpu")]
)
def test_a_tile_that_is_not_joined_is_on_the_device_as_its_parts(stored, platform):
    for tile in cut(weights_of(SMALL, stored=stored), 100_000, platform=platform).tiles:
        assert tile.joined is None
        assert tile.n_arrays == len(tile.parts)
        assert tile.device_bytes == sum(part.n_bytes for part in tile.parts)
