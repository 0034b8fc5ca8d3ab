"""What becomes of each stage in a forward pass: which rows the host multiplies, which the device,
and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jlayer.engine.hosting import hosted_heights
from jlayer.families.base import Function
from jlayer.plan.dealing import Deal
from jlayer.plan.tiles import Tile
from jlayer.spec import Leaf


@dataclass(frozen=True)
class StageShape:
    """What the programs of a stage depend on in a forward pass, beside its tiles.

    `widths`: product -> its rows in each tile that the device multiplies, of all hosts; `hosts`:
    product -> how they are dealt out to hosts, where they are. `hosted`: matrix -> its
    rows that the host multiplies. `next_input`: the function that makes the next stage's input, if
    it has one; `next_whole`: the leaves that this reads.
    """

    widths: tuple[tuple[str, tuple[int, ...]], ...] = ()
    hosts: tuple[tuple[str, Deal], ...] = ()
    hosted: tuple[tuple[str, int], ...] = ()
    next_input: Function | None = None
    next_whole: tuple[Leaf, ...] = ()


NO_SHAPE = StageShape()


@dataclass(frozen=True)
class Division:
    """What follows from which tiles the host multiplies, for all stages: see `StageShape`."""

    hosted: frozenset[int]
    tiles: frozenset[int]  # by id, the tiles of `hosted`
    shapes: dict  # (layer, stage, expert) -> its shape
    heights: dict  # the same -> matrix -> its rows on the host; the head's too
    last: frozenset[int]  # by id, the last tile of each stage that the host multiplies

    def shape(self, tile: Tile) -> StageShape:
        """The shape of the tile's stage."""
        return self.shapes.get(_stage_key(tile), NO_SHAPE)

    def heights_of(self, tile: Tile) -> dict[str, int]:
        """Matrix -> its rows on the host, of the tile's stage."""
        return self.heights[_stage_key(tile)]


def divided(tiles: Sequence[Tile], hosted: frozenset[int]) -> Division:
    """The division of tiles; widths and heights are in their order."""
    widths: dict = {}
    of_host: dict = {}
    deals: dict = {}
    for index, tile in enumerate(tiles):
        if tile.stage is None:
            continue
        if index in hosted:
            of_host.setdefault(_stage_key(tile), []).append(tile)
        elif tile.stage.finish:
            of_stage = widths.setdefault(_stage_key(tile), {})
            for name, width in tile.products().items():
                of_stage[name] = (*of_stage.get(name, ()), width)
            deals.setdefault(_stage_key(tile), {}).update(_deals_of(tile))
    stages = {_stage_key(tile): tile.stage for tile in tiles if tile.stage is not None}
    heights = {key: hosted_heights(found, stages[key]) for key, found in of_host.items()}
    following = _next_inputs(tiles)
    shapes = {
        key: StageShape(
            widths=tuple(widths.get(key, {}).items()),
            hosts=tuple(deals.get(key, {}).items()),
            hosted=tuple(heights.get(key, {}).items()),
            **following.get(key, {}),
        )
        for key, stage in stages.items()
        if stage.finish
    }
    ids = frozenset(id(tiles[index]) for index in hosted)
    last = frozenset(id(found[-1]) for found in of_host.values())
    return Division(hosted, ids, shapes, heights, last)


def _next_inputs(tiles):
    """(layer, stage, expert) -> what makes the input of the stage after it; nothing where no
    function does. The head makes its own, of the rows that are wanted."""
    found = {}
    for tile, following in pairwise(tiles):
        stage = following.first_stage
        if following.kind is None or stage is None or not tile.ends_stage:
            continue
        if following.expert:
            continue  # experts share an input, which is there before the first
        if wanted := stage.input:
            leaves = tuple(following.kind.leaf(name) for name in wanted.whole)
            found[_stage_key(tile)] = {"next_input": wanted, "next_whole": leaves}
    return found


def _deals_of(tile):
    """Product -> how its rows are dealt out to hosts, of those that are."""
    present = {part.matrix for part in tile.parts}
    groups = [group for group in tile.stage.groups if group.leaves[0] in present]
    deals = {group.product: tile.hosts_of(group.leaves[0]) for group in groups}
    return {name: deal for name, deal in deals.items() if deal is not None}


def _stage_key(tile):
    return (tile.layer, tile.stage and tile.stage.name, tile.expert)
