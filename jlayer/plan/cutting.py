"""Cuts a model into tiles, from its config alone.

The first rows of a stage may be set apart: those that the host's cores multiply where they lie,
while the others cross the link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jlayer.encodings.registry import encoding, piece_name
from jlayer.families.base import Group
from jlayer.families.registry import (
    beside_head,
    head_leaf,
    head_stage,
    layer_kinds,
    layer_tensor_name,
)
from jlayer.plan.dealing import dealt
from jlayer.plan.joined import joined
from jlayer.plan.tiles import Part, Tile, Weights
from jlayer.plan.tiling import Tiling
from jlayer.spec import ALIGNMENT, Leaf, Place


@dataclass(frozen=True)
class _Target:
    """What tiles are for: a platform, and how many of its devices; one of several hosts."""

    platform: str
    n_devices: int = 1
    host: int = 0
    n_hosts: int = 1

    def own(self, parts: Sequence[Part]) -> list[Part]:
        """Of whole matrices of the same height, and of their biases, the rows of this host."""
        row_unit = _row_unit(parts)
        deal = row_unit and dealt(parts[0].n_rows, row_unit=row_unit, n=self.n_hosts)
        if deal is None:
            return list(parts)
        first = deal.first(self.host)
        return [replace(part.of_rows(first, deal.height), hosts=deal) for part in parts]


def cut(
    weights: Weights,
    tile_bytes: int | None,
    *,
    platform: str,
    n_devices: int = 1,
    host: int = 0,
    n_hosts: int = 1,
    shares: tuple[tuple[str, float], ...] = (),
) -> Tiling:
    """Cuts a forward pass into tiles of at most about `tile_bytes`; None: whole layers.

    `n_devices`: the rows of each tile are dealt out to so many; not those of whole layers. `host`:
    of each matrix the rows that this one of `n_hosts` reads (`dealing.host_rows`).
    `shares`: (encoding, the share of the rows of its matrices that is set apart for the host's
    cores); whole layers have no such rows.
    """
    is_apart = bool(shares) or n_devices * n_hosts > 1
    assert tile_bytes is not None or not is_apart, "a whole layer is multiplied in one place"
    target = _Target(platform, n_devices, host, n_hosts)
    cfg, tiles_of, alike = weights.cfg, {}, []
    share_of = dict(shares)
    for layer, kind in enumerate(layer_kinds(cfg)):
        forms = tuple(
            weights.form_of(layer_tensor_name(cfg, leaf, layer, expert))
            for leaf, expert in kind.tensors()
        )
        if (kind.name, forms) not in tiles_of:
            tiles = _layer_tiles(weights, kind, layer, tile_bytes, target, share_of)
            tiles_of[kind.name, forms] = tuple(tiles)
        alike.append(tiles_of[kind.name, forms])
    head = _head_tiles(weights, tile_bytes or alike[0][0].n_bytes, target, share_of)
    return Tiling(
        cfg,
        alike,
        tuple(head),
        cut_as=(tile_bytes, shares),
        dtype=weights.dtype,
        platform=platform,
    )


def device_parts(weights: Weights, layer: int) -> tuple[Part, ...]:
    """The leaves of a layer that stay on the device."""
    kind = layer_kinds(weights.cfg)[layer]
    return tuple(
        part for leaf in kind.kept_in(Place.DEVICE) for part in _parts(weights, leaf, layer)
    )


def parts_of(leaf: Leaf, tensor: str, weights: Weights) -> list[Part]:
    """A whole leaf as parts, one for each piece of its encoding, the largest first."""
    form, shape = weights.form_of(tensor), leaf.shape(weights.cfg)
    return [
        Part(
            leaf=piece_name(leaf.name, piece),
            tensor=piece_name(tensor, piece),
            dtype=dtype,
            shape=piece_shape,
            matrix=leaf.name,
            piece=piece,
            form=form,
            width=shape[-1],
            n_rows=shape[0],
            of=leaf.of,
        )
        for piece, (dtype, piece_shape) in encoding(form).pieces(shape).items()
    ]


def row_ranges(
    n_rows: int, row_bytes: list[int], tile_bytes: int, *, row_unit: int = 1
) -> list[tuple[int, int]]:
    """Splits rows into the fewest, nearly equal ranges of at most `tile_bytes` (or one unit).

    Returns (first row, number of rows) of each. `row_bytes`: bytes of a row of each array. Ranges
    begin at multiples of `row_unit` rows. If there are enough rows, a range is a whole number of
    disk blocks, so an aligned matrix is read directly into its slot.
    """
    most = max(1, tile_bytes // sum(row_bytes) // row_unit) * row_unit
    height = -(-n_rows // -(-n_rows // most))
    height = -(-height // row_unit) * row_unit
    unit = math.lcm(ALIGNMENT // math.gcd(*row_bytes, ALIGNMENT), row_unit)
    if height >= unit:
        up = -(-height // unit) * unit
        height = up if up <= most else height // unit * unit
    return [(row, min(height, n_rows - row)) for row in range(0, n_rows, height)]


def host_rows(n_rows: int, row_bytes: Sequence[int], share: float, *, row_unit: int = 1) -> int:
    """About `share` of `n_rows` rows: a whole number of disk blocks, unless it is all or none; with
    too few rows for that, of units."""
    count = round(n_rows * share)
    unit = math.lcm(ALIGNMENT // math.gcd(*row_bytes, ALIGNMENT), row_unit)
    if share >= 1:
        return count
    unit = row_unit if n_rows < 2 * unit else unit
    return min(n_rows, round(count / unit) * unit)


def _layer_tiles(weights, kind, layer, tile_bytes, target, share_of):
    if tile_bytes is None and not kind.n_experts:
        streamed = kind.kept_in(Place.TILE)
        parts = tuple(part for leaf in streamed for part in _parts(weights, leaf, layer))
        return [_tile(f"layer {layer}", kind, None, layer, parts, target=target)]
    tiles, tile_of = [], _whole_expert(weights, kind, layer, tile_bytes, target)
    for stage, expert in kind.passes():
        if expert is not None and tile_of is not None:
            if stage is kind.expert_stages[0]:
                tiles.append(tile_of(expert))
            continue
        share = share_of if expert is None else {}  # the host's cores multiply no experts
        chosen = [
            (on_host, parts)
            for on_host in (True, False)
            for parts in _packed(
                *(weights, kind, stage, layer, expert, tile_bytes, share, on_host),
                target=target,
            )
        ]
        if whole := [
            part
            for leaf in kind.moving_of(stage.finish)
            for part in target.own(_parts(weights, leaf, layer))
        ]:
            chosen.append((False, tuple(whole)))
        if not chosen:
            chosen = [(False, ())]
        number = "" if expert is None else f" {expert}"
        for index, (on_host, parts) in enumerate(chosen):
            name = f"layer {layer} {stage.name}{number} {index + 1}/{len(chosen)}"
            ends = {"begins_stage": index == 0, "ends_stage": index == len(chosen) - 1}
            ends["for_host"] = on_host
            tile = _tile(name, kind, stage, layer, tuple(parts), target=target, **ends)
            tiles.append(tile if expert is None else replace(tile, expert=expert))
    return tiles


def _whole_expert(weights, kind, layer, tile_bytes, target):
    """A function (number of an expert) -> its tile; None where an expert is more than one, or none
    is there."""
    if not kind.n_experts:
        return None

    def parts_of_expert(expert):
        groups = (group for stage in kind.expert_stages for group in stage.groups)
        return tuple(
            part
            for group in groups
            for part in target.own(_group_parts(weights, kind, group, layer, expert))
        )

    n_bytes = sum(part.n_bytes for part in parts_of_expert(0))
    if tile_bytes is not None and n_bytes > tile_bytes:
        return None

    def whole(expert):
        name = f"layer {layer} expert {expert}"
        parts = parts_of_expert(expert)
        return _tile(name, kind, None, layer, parts, target=target, expert=expert)

    return whole


def _tile(name, kind, stage, layer, parts, *, target, expert=None, **ends):
    """`expert`: of a tile that has all of it."""
    how = {"expert": expert, "n_devices": target.n_devices, **ends}
    tile = Tile(name, kind, stage, layer, parts, **how)
    if not tile.comes_out_even:
        return tile
    dtypes = {part.dtype for part in parts} if expert is not None else {"uint8"}
    layout = joined(
        [part.n_bytes for part in tile.share.parts],
        is_plain=expert is None and all(part.encoding.is_plain for part in parts),
        platform=target.platform,
        dtype=dtypes.pop() if len(dtypes) == 1 else "uint8",
    )
    return replace(tile, joined=layout)


def _packed(weights, kind, stage, layer, expert, tile_bytes, share_of, on_host, *, target):
    """The parts of each tile of a stage, of the rows for the host or of the others: row ranges of
    one group after another.

    Ranges of different groups share a tile if both fit.
    """
    packed, room = [], 0
    for group in stage.groups:
        own = target.own(_group_parts(weights, kind, group, layer, expert))
        matrices = [part for part in own if part.matrix in group.leaves]
        for first, n_rows in _ranges(matrices, tile_bytes, share_of, on_host, target.n_devices):
            parts = [part.of_rows(first, n_rows) for part in own]
            size = sum(part.n_bytes for part in parts if part.matrix in group.leaves)
            if packed and size <= room and not _holds(packed[-1], group):
                packed[-1] += parts
                room -= size
            else:
                packed.append(parts)
                room = tile_bytes - size
    return packed


def _ranges(whole: Sequence[Part], tile_bytes, share_of, on_host, n_devices):
    """(first row, number of rows) of each range of matrices of the same height, for one side. The
    rows of each but the last come out even among the devices."""
    n_rows, row_unit = whole[0].n_rows, _row_unit(whole)
    # A piece that has a row for many is small: where it begins on disk does not matter.
    row_bytes = [
        part.n_bytes // n_rows for part in whole if part.encoding.rows_per(part.piece) == 1
    ]
    if row_unit is None:
        return [] if on_host else [(0, n_rows)]
    share = min(share_of.get(part.form, 0.0) for part in whole)
    first = host_rows(n_rows, row_bytes, share, row_unit=row_unit)
    begin, count = (0, first) if on_host else (first, n_rows - first)
    if not count:
        return []
    ranges = row_ranges(count, row_bytes, tile_bytes, row_unit=row_unit * n_devices)
    return [(begin + row, n) for row, n in ranges]


def _row_unit(parts):
    """The rows that stay together; None: all of them."""
    if not all(part.encoding.by_rows for part in parts):
        return None
    return math.lcm(*(part.encoding.row_unit for part in parts))


def _holds(parts, group: Group):
    """Whether the parts include rows of a group. A tile has only one range of each matrix."""
    return any(part.matrix in group.leaves for part in parts)


def _group_parts(weights, kind, group, layer, expert):
    """A group's matrices and what stands beside each."""
    return [
        part
        for matrix in group.leaves
        for leaf in kind.with_bias(matrix)
        for part in _parts(weights, leaf, layer, expert)
    ]


def _parts(weights, leaf, layer, expert=None):
    return parts_of(leaf, layer_tensor_name(weights.cfg, leaf, layer, expert), weights)


def _head_tiles(weights, tile_bytes, target, share_of):
    leaf, stage = head_leaf(weights.cfg), head_stage(weights.cfg)
    leaves = (leaf, *beside_head(weights.cfg))
    own = target.own([part for one in leaves for part in parts_of(one, one.published, weights)])
    matrices = [part for part in own if part.matrix == leaf.name]
    ranges = [
        (on_host, *found)
        for on_host in (True, False)
        for found in _ranges(matrices, tile_bytes, share_of, on_host, target.n_devices)
    ]
    tiles = []
    for index, (on_host, first, n_rows) in enumerate(ranges):
        parts = tuple(part.of_rows(first, n_rows) for part in own)
        ends = {"begins_stage": index == 0, "ends_stage": index == len(ranges) - 1}
        name = f"head {index + 1}/{len(ranges)}"
        ends["for_host"] = on_host
        tiles.append(_tile(name, None, stage, None, parts, target=target, **ends))
    return tiles
