"""The order in which a step goes to the tiles of a model: forward, over the head, and back.

Every layer comes twice on the way back: first what is needed of it is computed again, then it is
gone back through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby

from jlayer.families.base import LayerKind
from jlayer.plan.tiles import Tier, Tile
from jlayer.tuning.units import again, units_of

# Layer -> its leaves that have an adapter -> (published name, by what B A is multiplied).
Trained = Mapping[int, Mapping[str, tuple[str, float]]]


def leaves_of(trained: Trained, layer: int) -> frozenset[str]:
    """The matrices of a layer that have an adapter."""
    return frozenset(trained.get(layer, ()))


class Way(Enum):
    """What is done at a tile."""

    FORWARD = "forward"
    HEAD = "head"
    AGAIN = "again"
    BACK = "back"


@dataclass(frozen=True)
class Visit:
    """`unit`: the number of the tile's unit in its layer. `is_first`, `is_last`: of the tiles of
    its unit, on this way. `begins_layer`, `ends_layer`: the same of its layer on this way.
    `offset`: in the tile's matrices the first row that it has of each, by name."""

    tile: Tile
    way: Way
    unit: int = 0
    is_first: bool = True
    is_last: bool = True
    begins_layer: bool = False
    ends_layer: bool = False
    offsets: tuple[tuple[str, int], ...] = ()


def visits_of(tiles: Sequence[Tile], trained: Mapping[int, frozenset[str]]) -> tuple[Visit, ...]:
    """All visits of a step. `trained`: layer -> its matrices that have an adapter."""
    layers = [tuple(some) for _, some in groupby(tiles, lambda tile: tile.layer)]
    *layers, head = layers
    lowest = min(trained)
    forward, back = [], []
    for some in layers:
        layer = some[0].layer
        units = _by_unit(some)
        forward += _in_layer(units, Way.FORWARD)
        if layer >= lowest:  # below it nothing is trained
            needs = again(some[0].kind, trained.get(layer, frozenset()))
            wanted = [of_unit for of_unit in units if needs.multiplied[of_unit[0][0]]]
            turned = [of_unit[::-1] for of_unit in units[::-1]]
            back = [*_in_layer(wanted, Way.AGAIN), *_in_layer(turned, Way.BACK), *back]
    own = _ends(_of_head(head), Way.HEAD)
    return (*forward, *own, *back)


def _of_head(tiles):
    found, at = [], 0
    for tile in tiles:
        ((name, height),) = tile.heights.items()
        found.append((0, tile, ((name, at),)))
        at += height
    return found


def _by_unit(tiles):
    """[(unit, tile, offsets), ...] of each unit of a layer."""
    kind: LayerKind = tiles[0].kind
    number_of = {stage: n for n, unit in enumerate(units_of(kind)) for stage in unit.stages}
    found, at = [], {}
    numbered = ((number_of[tile.first_stage], tile) for tile in tiles)
    for _, some in groupby(numbered, lambda pair: pair[0]):
        of_unit = []
        for number, tile in some:
            heights = tile.heights if tile.expert is None else {}
            of_unit.append((number, tile, tuple((name, at.get(name, 0)) for name in heights)))
            for name, height in heights.items():
                at[name] = at.get(name, 0) + height
        found.append(of_unit)
    return found


def _in_layer(units, way):
    visits = [visit for of_unit in units for visit in _ends(of_unit, way)]
    if visits:
        visits[0] = replace(visits[0], begins_layer=True)
        visits[-1] = replace(visits[-1], ends_layer=True)
    return visits


def _ends(of_unit, way):
    last = len(of_unit) - 1
    return [
        Visit(tile, way, unit, index == 0, index == last, offsets=offsets)
        for index, (unit, tile, offsets) in enumerate(of_unit)
    ]


def streamed(visits: Sequence[Visit]) -> tuple[tuple[Tile, ...], dict[int, int]]:
    """(the tiles as an executor streams them, one a visit; a visit whose tile came before -> the
    first one with it). All experts come, in order: none is chosen."""
    first: dict[str, int] = {}
    tiles, repeats = [], {}
    for number, visit in enumerate(visits):
        tiles.append(replace(visit.tile, expert=None))
        if first.setdefault(visit.tile.name, number) != number:
            repeats[number] = first[visit.tile.name]
    return tuple(tiles), repeats


def kept_again(visits: Sequence[Visit], tiers: Sequence[Tier], most: int) -> dict[int, int]:
    """A visit on the way back through a layer -> the one that computes again with its tile, whose
    slot is kept for it: of each layer the last `most` that are read from disk, which are the first
    on the way back."""
    found, of_layer = {}, {}
    for number, visit in enumerate(visits if most else ()):
        if visit.way is Way.AGAIN:
            if visit.begins_layer:
                of_layer = {}
            if tiers[number] is Tier.DISK:
                of_layer[visit.tile.name] = number
        elif visit.way is Way.BACK and visit.tile.name in list(of_layer)[-most:]:
            found[number] = of_layer[visit.tile.name]
    return found


def tiers_of(
    tiles: Sequence[Tile], repeats: Mapping[int, int], room: int, slack: int
) -> tuple[Tier, ...]:
    """Where each is kept: in host memory as many of the first ones as `room` bytes hold, each with
    `slack` bytes around it. What has no weights is on the device."""
    tiers = []
    for number, tile in enumerate(tiles):
        if number in repeats:
            tiers.append(tiers[repeats[number]])
        elif not tile.n_bytes:
            tiers.append(Tier.DEVICE)
        else:
            fits = tile.n_bytes + slack <= room
            room -= (tile.n_bytes + slack) * fits
            tiers.append(Tier.HOST if fits else Tier.DISK)
    return tuple(tiers)
