"""Which rows the host's cores multiply where they lie, beside the device: `host_share`.

Of a stage's rows a first part is set apart for the host when the model is cut. How many of its
tiles the host multiplies depends on the rows of the forward pass: the more there are, the longer it
takes for the same bytes, while the link takes as long as ever. Both end at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jlayer.encodings.registry import encoding
from jlayer.plan.machine import (
    CORE_LOW_RANK_NUMBERS,
    CORE_LOW_RANK_OPERATIONS,
    CPU_DECODED_WEIGHTS,
    HostSpeeds,
)
from jlayer.plan.tiles import Tier
from jlayer.plan.tiling import Tiling

# Time of a stage's exchange with the host, in which its cores rest: the program that ends the stage
# before is called, the input comes down and is packed (an H100, 16 cores).
EXCHANGE_S = 550e-6
# Shares are multiples of this: a little more or less of measured speed gives the same tiles, whose
# programs a later start finds compiled.
STEP = 1 / 16
# A share is taken where a forward pass is shorter by this factor.
WORTH = 0.95
# The most rows of a pass with a share beside a link. Inputs and products of more take the link's
# time too, and speeds are measured up to 64 columns (512 rows, 72B shape on an H100: 0.62 s with 7%
# of the weights on the host, where 0.31 were planned and 0.33 is what the device takes alone).
MOST_ROWS = 128
# (encoding, share of the rows of its matrices)
Shares = tuple[tuple[str, float], ...]


def seconds_on_host(speeds: HostSpeeds, tiling: Tiling, tiles: Sequence[int], rows: int) -> float:
    """Seconds for the host's cores to multiply these tiles by `rows` columns, and for one of them
    to add what adapters do."""
    n_bytes, low_rank = {}, 0
    for index in tiles:
        for part in tiling.shapes[index].parts:
            if part.is_low_rank:
                low_rank += math.prod(part.shape)
            else:
                n_bytes[part.form] = n_bytes.get(part.form, 0) + part.n_bytes
    known = dict(speeds.forms)
    products = sum(
        size * speeds.seconds_a_byte(form, rows) for form, size in n_bytes.items() if form in known
    )
    each = 1 / CORE_LOW_RANK_NUMBERS + 2 * rows / CORE_LOW_RANK_OPERATIONS
    return products + low_rank * each


def auto_shares(
    speeds: HostSpeeds,
    forms: Sequence[str],
    *,
    passing: int,
    resident: int,
    rows: int,
    n_stages: int,
) -> Shares:
    """The shares at which host and link take equally long, for forward passes of `rows` rows.

    `passing`: bytes of the tiles that are not on the device; `resident`: of those that are: they
    are of the rows that are left to the device. `n_stages`: so many times the host waits for its
    input.
    """
    shares = []
    for form in forms:
        if form not in dict(speeds.forms):
            continue
        if speeds.link is None:
            shares.append((form, 0.0 if encoding(form).is_plain else 1.0))
            continue
        on_host, crossing = passing * speeds.seconds_a_byte(form, rows), passing / speeds.link
        of_passing = balanced(on_host, crossing, crossing, EXCHANGE_S * n_stages)
        share = of_passing * passing / (passing + resident)
        shares.append((form, STEP * round(share / STEP)))
    return tuple((form, share) for form, share in shares if share > 0)


def balanced(on_host: float, crossing: float, alone: float, exchange: float) -> float:
    """The share of some tiles at which host and link take equally long, 0 to 1.

    Seconds: for the host to multiply all of them; for all of them to cross the link; for the link
    without the host, other tiles included; and of the host's exchanges with the device.
    """
    return min(1.0, max(0.0, (alone - exchange) / (on_host + crossing)))


def hosted_tiles(
    tiling: Tiling,
    tiers: Sequence[Tier],
    speeds: HostSpeeds | None,
    *,
    link: float,
    rows: int,
    always: bool,
) -> frozenset[int]:
    """The tiles that the host multiplies in a forward pass of `rows` rows. `link`: its bytes/s
    while the cores rest. `always`: all that were set apart for it."""
    apart = [
        index
        for index, tile in enumerate(tiling.shapes)
        if tile.for_host and tiers[index] is not Tier.DEVICE
    ]
    if always or not apart:
        return frozenset(apart)
    if speeds is None:
        return frozenset()
    if speeds.link is not None and rows > MOST_ROWS:
        return frozenset()
    on_host = seconds_on_host(speeds, tiling, apart, rows)
    if speeds.link is None:
        # XLA writes the weights out first, which takes as long for any number of rows.
        decoded = sum(part.n_weights for index in apart for part in tiling.shapes[index].parts)
        return frozenset(apart if on_host < decoded / CPU_DECODED_WEIGHTS else ())
    passing = sum(
        size
        for size, tier in zip(tiling.device_sizes, tiers, strict=True)
        if tier is not Tier.DEVICE
    )
    # Beside cores that read the same memory the link is slower than by itself.
    crossing = sum(tiling.sizes[index] for index in apart) / speeds.link
    all_crossing, exchange = passing / speeds.link, EXCHANGE_S * count_stages(tiling, apart)
    share = balanced(on_host, crossing, all_crossing, exchange)
    with_host = max(all_crossing - share * crossing, share * on_host + exchange)
    if with_host > WORTH * passing / link:
        return frozenset()
    return frozenset(_some_of_each_stage(tiling, apart, share))


def _some_of_each_stage(tiling, apart, share):
    """Of the tiles of each stage that are `apart`, the first ones, about this share."""
    chosen, of_stage = [], []
    for at, index in enumerate(apart):
        of_stage.append(index)
        is_last = at + 1 == len(apart) or not _follows(tiling, index, apart[at + 1])
        if is_last:
            chosen += of_stage[: round(share * len(of_stage))]
            of_stage = []
    return chosen


def count_stages(tiling: Tiling, apart: Sequence[int]) -> int:
    """The number of stages that these tiles are of, given in order."""
    if not apart:
        return 0
    pairs = pairwise(apart)
    return 1 + sum(not _follows(tiling, one, other) for one, other in pairs)


def all_stages(tiling: Tiling) -> int:
    """The number of stages of a model, the head's included."""
    return sum(
        len(tile.kind.stages) if tile.stage is None and tile.expert is None else tile.begins_stage
        for tile in tiling.shapes
    )


def _follows(tiling, index, other):
    """Whether a tile is of the same stage of the same layer: the tiles of a stage stand together,
    and the first of them begins it."""
    return other == index + 1 and not tiling.shapes[other].begins_stage
