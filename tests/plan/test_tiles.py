"""Tiles: every row of every streamed leaf is in one of them, whatever the family and the size."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import accumulate, groupby

import pytest
from hypothesis import strategies as st

from jlayer.encodings.registry import ENCODINGS, encoding, piece_name
from jlayer.families import deepseek
from jlayer.families.registry import (
    FAMILIES,
    beside_head,
    head_leaf,
    layer_kinds,
    layer_tensor_name,
)
from jlayer.parts import Experts, Mlp, Router, Shared
from jlayer.plan.cutting import cut, row_ranges
from jlayer.plan.tiles import Weights
from jlayer.spec import ALIGNMENT, Place
from tests import made_up
from tests.campaigns import examples
from tests.plan.models import SMALL


@pytest.fixture(scope="module", autouse=True)
def known_families():
    with pytest.MonkeyPatch.context() as patch:
        for name, family in made_up.FAMILIES.items():
            patch.setitem(FAMILIES, name, family)
        yield


# Their configs have another mixer; see test_latent.
LATENT = {row.model_type for row in deepseek.FAMILIES}
EXPERTS = Experts(
    Router(3, 2),
    30,
    Mlp(module="mlp.experts.{expert}"),
    "mlp.gate.weight",
    shared=Shared(50, Mlp(module="mlp.shared")),
)


@st.composite
def any_weights(draw):
    """A model of any family, with or without biases and experts, and an encoding for each of its
    tensors."""
    cfg = replace(
        SMALL,
        model_type=draw(st.sampled_from(sorted(FAMILIES.keys() - LATENT))),
        experts=draw(st.sampled_from([None, EXPERTS, replace(EXPERTS, layers=(True, False) * 2)])),
        # Rows of 24 are no part of a disk block, others are: then heights are rounded.
        hidden_size=draw(st.sampled_from([24, 64, 256])),
        intermediate_size=40,
        num_hidden_layers=4,
        vocab_size=133,
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        head_bias=draw(st.booleans()),
    )
    seed = draw(st.integers(0, 9))

    def form_of(name):
        if name.endswith(("norm.weight", ".bias")):
            return "float32"
        return list(ENCODINGS)[(seed + len(name) * seed) % len(ENCODINGS)]

    return Weights(cfg, form_of, "float32")


sizes = st.none() | st.integers(1, 100_000)
platforms = st.sampled_from(["cpu", "gpu"])


def cut_size(weights, tile_bytes):
    """Layers with experts are always cut."""
    return tile_bytes or (1 << 20 if weights.cfg.experts else None)


def stages_of(tile):
    """The stages that a tile has rows of."""
    return tile.kind.expert_stages if tile.is_whole_expert else (tile.stage,)


def rows_by_tensor(tiles):
    """(first row, rows) of each tensor on disk, in the order of the tiles."""
    found = defaultdict(list)
    for tile in tiles:
        for part in tile.parts:
            found[part.tensor].append((part.first_row, part.shape[0]))
    return dict(found)


@examples(25, 300, weights=any_weights(), tile_bytes=sizes, platform=platforms)
def test_tiles_cover_the_rows_of_each_streamed_leaf_exactly_once(weights, tile_bytes, platform):
    cfg = weights.cfg
    expected = {}
    for layer, kind in enumerate(layer_kinds(cfg)):
        for leaf, expert in kind.tensors():
            if leaf.place is Place.TILE:
                expected[layer_tensor_name(cfg, leaf, layer, expert)] = leaf.shape(cfg)
    head = head_leaf(cfg)
    expected |= {leaf.published: leaf.shape(cfg) for leaf in (head, *beside_head(cfg))}
    pieces = {
        piece_name(name, piece): (dtype, shape)
        for name, whole in expected.items()
        for piece, (dtype, shape) in encoding(weights.form_of(name)).pieces(whole).items()
    }
    tiles = cut(weights, cut_size(weights, tile_bytes), platform=platform).tiles
    found = rows_by_tensor(tiles)
    assert found.keys() == pieces.keys()
    whole_each_time = {p.tensor for tile in tiles for p in tile.parts if p.is_for_all_rows}
    for name, ranges in found.items():
        if name in whole_each_time:
            assert set(ranges) == {(0, pieces[name][1][0])}
            continue
        ends = list(accumulate(n for _, n in ranges))
        assert [first for first, _ in ranges] == [0, *ends[:-1]]
        assert ends[-1] == pieces[name][1][0]
    for tile in tiles:
        for part in tile.parts:
            dtype, whole = pieces[part.tensor]
            assert (part.dtype, part.shape[1:]) == (dtype, whole[1:])
            if tile.layer is not None:
                assert f".layers.{tile.layer}." in part.tensor


@examples(25, 300, weights=any_weights(), tile_bytes=st.integers(1, 100_000), platform=platforms)
def test_a_tile_has_the_same_rows_of_matrices_that_are_needed_together(
    weights, tile_bytes, platform
):
    for tile in cut(weights, tile_bytes, platform=platform).tiles:
        rows = {}
        for part in tile.parts:  # pieces and biases too
            if part.is_for_all_rows:
                continue
            own = (part.first_row * part.encoding.rows_per(part.piece), part.n_rows)
            assert rows.setdefault(part.matrix.removesuffix("_bias"), own) == own
        for group in (group for stage in stages_of(tile) for group in stage.groups):
            assert len({rows[leaf] for leaf in group.leaves if leaf in rows}) <= 1
            assert len({leaf in rows for leaf in group.leaves}) == 1
        if not tile.parts:
            assert not tile.stage.groups
            continue
        is_cut = all(part.encoding.by_rows for part in tile.parts)
        unit = math.lcm(*(part.encoding.row_unit for part in tile.parts))
        least = sum(
            -(-part.n_bytes * min(unit, part.n_rows) // part.n_rows) if is_cut else part.n_bytes
            for part in tile.parts
        )
        # A bias is not counted when rows are packed: a number for each row; nor what rows share.
        small = sum(
            part.n_bytes
            for part in tile.parts
            if len(part.shape) == 1 or part.encoding.rows_per(part.piece) != 1
        )
        assert tile.n_bytes - small <= max(tile_bytes, least)


@examples(25, 300, weights=any_weights(), tile_bytes=st.integers(1, 100_000))
def test_stages_come_in_order_and_each_begins_and_ends_once(weights, tile_bytes):
    tiles = cut(weights, tile_bytes, platform="cpu").tiles
    kinds = layer_kinds(weights.cfg)
    in_order = [
        (layer, stage.name, expert)
        for layer, kind in enumerate(kinds)
        for stage, expert in kind.passes()
    ]
    named = [((t.layer, stage.name, t.expert), t) for t in tiles for stage in stages_of(t)]
    found = {key: [t for _, t in own] for key, own in groupby(named, key=lambda pair: pair[0])}
    assert list(found) == [*in_order, (None, "head", None)]
    for own in found.values():
        assert [tile.begins_stage for tile in own] == [True] + [False] * (len(own) - 1)
        assert [tile.ends_stage for tile in own] == [False] * (len(own) - 1) + [True]
    ends = [tile.layer for tile in tiles if tile.ends_layer]
    assert ends == list(range(len(kinds)))
    for layer, kind in enumerate(kinds):
        last = next(tile for tile in tiles if tile.layer == layer and tile.ends_layer)
        assert (last.kind, last.stage) == (kind, kind.stages[-1])


@examples(25, 300, weights=any_weights(), tile_bytes=sizes, platform=platforms)
def test_one_tile_of_every_shape_stands_for_all_of_it(weights, tile_bytes, platform):
    tile_bytes = cut_size(weights, tile_bytes)
    tiling = cut(weights, tile_bytes, platform=platform)
    assert sum(n for _, n in tiling.distinct) == len(tiling.tiles)
    assert tiling.n_bytes == sum(tile.n_bytes for tile in tiling.tiles)
    assert tiling.tile_bytes == max(tile.n_bytes for tile in tiling.tiles)
    assert tiling.is_whole == (tile_bytes is None)
    shapes = Counter((tile.signature, tile.ends_stage) for tile in tiling.tiles)
    assert [shapes[tile.signature, tile.ends_stage] for tile, _ in tiling.distinct] == [
        n for _, n in tiling.distinct
    ]


@pytest.mark.parametrize("n_rows", [1, 7, 133, 4096, 8192, 28672, 128256])
@pytest.mark.parametrize("row_bytes", [[2], [48], [8192], [16384, 16384], [4096, 256], [57344]])
@pytest.mark.parametrize("tile_bytes", [1, 4096, 1 << 20, 64 << 20])
@pytest.mark.parametrize("row_unit", [1, 128, 96])
def test_row_ranges_cover_all_rows_within_the_size_and_in_two_heights_at_most(
    n_rows, row_bytes, tile_bytes, row_unit
):
    ranges = row_ranges(n_rows, row_bytes, tile_bytes, row_unit=row_unit)
    assert all(first % row_unit == 0 for first, _ in ranges)
    ends = list(accumulate(n for _, n in ranges))
    assert [first for first, _ in ranges] == [0, *ends[:-1]]
    assert ends[-1] == n_rows
    assert len({n for _, n in ranges}) <= 2
    least = min(row_unit, n_rows) * sum(row_bytes)
    assert max(n for _, n in ranges) * sum(row_bytes) <= max(tile_bytes, least)


def test_tiles_of_llama_3_70b_are_few_shapes_and_whole_disk_blocks():
    for tile_bytes in (32 << 20, 64 << 20, 128 << 20):
        for n_rows, width in ((8192, 8192), (1024, 8192), (8192, 28672), (128256, 8192)):
            for row_bytes in ([2 * width], [width, width // 64], [width // 2, width // 32]):
                ranges = row_ranges(n_rows, row_bytes, tile_bytes)
                assert len({n for _, n in ranges}) <= 2
                assert all(first * n % ALIGNMENT == 0 for first, _ in ranges for n in row_bytes)
