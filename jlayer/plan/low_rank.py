"""The memory that the products of adapters need beside those of the weights, and whether the host's
cores can compute them."""

from __future__ import annotations

import math

from jlayer.encodings.grouped import BLOCK_BYTES, block_rows
from jlayer.errors import UsageError
from jlayer.plan.shapes import Shapes
from jlayer.plan.tiles import Tile
from jlayer.plan.tiling import Tiling
from jlayer.spec import ModelConfig


def low_rank_bytes(tile: Tile, n_rows: int) -> int:
    """Bytes of the temporaries of what adapters add to the products of a tile, all in float32:
    copies of A and B where they are of 16 bits, a copy of the input [R, in], and A x [R, rank]; the
    latter again, with where it is not a row's own, where rows choose."""
    parts = [part for part in tile.parts if part.is_low_rank]
    copies = sum(math.prod(part.shape) for part in parts if part.dtype != "float32")
    ranks = sum(part.shape[0] for part in parts if part.is_for_all_rows)
    ranks *= 3 if tile.chooses else 1
    width = max((part.width for part in parts if part.is_for_all_rows), default=0)
    return 4 * (copies + n_rows * (width + ranks))


def lengths_bytes(tile: Tile, platform: str) -> int:
    """Bytes of the temporaries of the lengths of a tile's rows: of each matrix a block of rows in
    float32, and what is added to it, since nothing says which is first. And all plain matrices once
    more, where they are parts of a longer array, or of 16 bits on a CPU."""
    with_lengths = {part.of for part in tile.parts if part.is_lengths}
    own = [part for part in tile.parts if part.matrix in with_lengths and part.has_rows]
    blocks = sum(_block_bytes(part, platform) for part in own)
    plain = [part for part in own if part.encoding.is_plain]
    is_joined, is_on_cpu = tile.joined is not None, platform == "cpu"
    copied = (p.n_bytes for p in plain if is_joined or (is_on_cpu and p.dtype != "float32"))
    return 2 * blocks + sum(copied)


def _block_bytes(part, platform):
    row_bytes = 4 * part.width
    return row_bytes * block_rows(part.n_rows, row_bytes, BLOCK_BYTES[platform])


def hosted_low_rank_bytes(tiling: Tiling, shapes: Shapes) -> int:
    """Bytes of host memory for what an adapter adds to products of the host's cores:
    `low_rank_bytes` of a tile, and what is added to it, for one tile at a time."""
    tiles = [tile for tile, _ in tiling.distinct if tile.for_host]
    return max(
        (
            low_rank_bytes(tile, shapes.n_rows) + 4 * shapes.n_rows * max(tile.heights.values())
            for tile in tiles
            if any(part.is_low_rank for part in tile.parts)
        ),
        default=0,
    )


def check_host_share(cfg: ModelConfig, host_share: float | None) -> bool:
    """Whether the host's cores may multiply a share of this model's rows; of those that an adapter
    scales they do not know the lengths. Raises UsageError where a share of such was asked for."""
    if cfg.additions is None or not cfg.additions.have_lengths:
        return host_share != 0
    if host_share:
        raise UsageError(
            "host_share: the host's cores do not scale rows, as this adapter (DoRA) does; leave it "
            "out, or set it to 0"
        )
    return False
