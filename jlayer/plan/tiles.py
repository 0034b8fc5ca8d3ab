"""What moves together: a model cut into tiles, from its config alone.

A range of output rows of a matrix is consecutive bytes on disk, on the host and on the device, and
`x @ W[rows].T` is exact, so a layer may come in any number of row tiles and nothing is summed. The
largest tile is a whole layer. Norms are small and stay on the device; a bias travels with its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jlayer.checkpoint.layout import ALIGNMENT
from jlayer.config import ModelConfig
from jlayer.encodings.quantization import SCHEMES, piece_name, split_piece
from jlayer.families.llama import head_leaf, layer_leaves, layer_tensor_name
from jlayer.spec import STORED_BYTES, Leaf

# The matrices that read the same input, in the order of the block. A stage ends when all its rows
# are there.
STAGES = (
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("o", ("o_proj",)),
    ("gate_up", ("gate_proj", "up_proj")),
    ("down", ("down_proj",)),
)


@dataclass(frozen=True)
class Part:
    """One array of a tile: all of a leaf, or a range of its rows. `shape` is the part's own.

    A quantised matrix comes as its pieces, `q_proj.q` and `q_proj.scale`, of the same rows.
    """

    leaf: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * STORED_BYTES[self.dtype]

    @property
    def matrix(self) -> str:
        """The leaf that it is all or a piece of."""
        return split_piece(self.leaf)[0]


@dataclass(frozen=True)
class Tile:
    """The unit that moves: arrays that one `stage` uses together.

    `stage`: one of STAGES, "block" (a whole layer) or "head". `ends_stage`: after it the stage's
    output is whole.
    """

    name: str
    stage: str
    layer: int | None
    parts: tuple[Part, ...]
    ends_stage: bool = True

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    @property
    def heights(self) -> dict[str, int]:
        """The matrices that it has rows of, in their order, and how many."""
        return {part.matrix: part.shape[0] for part in self.parts if len(part.shape) == 2}

    @property
    def signature(self) -> tuple:
        """What a program compiled for this tile depends on: alike for all layers of a regular
        model."""
        return (self.stage, *((part.leaf, part.shape, part.dtype) for part in self.parts))


def cut(
    cfg: ModelConfig, dtype_of: Callable[[str], str], tile_bytes: int | None
) -> tuple[Tile, ...]:
    """All tiles of a sweep in order, each of about `tile_bytes` at most; None: whole layers.

    `dtype_of` tells a published tensor's dtype on disk, or its scheme where it is quantised.
    """
    tiles = []
    for layer in range(cfg.num_hidden_layers):
        tiles += _layer_tiles(cfg, dtype_of, layer, tile_bytes)
    return (*tiles, *_head_tiles(cfg, dtype_of, tile_bytes or tiles[0].n_bytes))


def norm_leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """The leaves of a layer that stay on the device: one vector of the width each."""
    return tuple(leaf for leaf in layer_leaves(cfg) if leaf.name.endswith("layernorm"))


def norm_parts(cfg: ModelConfig, dtype_of: Callable[[str], str], layer: int) -> tuple[Part, ...]:
    return tuple(part for leaf in norm_leaves(cfg) for part in _parts(cfg, dtype_of, leaf, layer))


def row_ranges(n_rows: int, row_bytes: list[int], tile_bytes: int) -> list[tuple[int, int]]:
    """(first row, rows) of the fewest ranges of at most `tile_bytes` (or one row), nearly equal.

    `row_bytes`: of each array that the ranges are of. Heights are multiples of what makes a range a
    whole number of disk blocks, wherever there are rows enough: an aligned matrix is then read
    straight into its slot.
    """
    most = max(1, tile_bytes // sum(row_bytes))
    height = -(-n_rows // -(-n_rows // most))
    unit = ALIGNMENT // math.gcd(*row_bytes, ALIGNMENT)
    if height >= unit:
        up = -(-height // unit) * unit
        height = up if up <= most else height // unit * unit
    return [(row, min(height, n_rows - row)) for row in range(0, n_rows, height)]


def _layer_tiles(cfg, dtype_of, layer, tile_bytes):
    leaves = {leaf.name: leaf for leaf in layer_leaves(cfg) if leaf not in norm_leaves(cfg)}
    if tile_bytes is None:
        parts = tuple(
            part for leaf in leaves.values() for part in _parts(cfg, dtype_of, leaf, layer)
        )
        return [Tile(f"layer {layer}", "block", layer, parts)]
    tiles = []
    for stage, names in STAGES:
        groups = (
            _paired(cfg, dtype_of, leaves, names, layer, tile_bytes)
            if stage == "gate_up"
            else _packed(cfg, dtype_of, leaves, names, layer, tile_bytes)
        )
        for index, parts in enumerate(groups):
            name = f"layer {layer} {stage} {index + 1}/{len(groups)}"
            tiles.append(Tile(name, stage, layer, tuple(parts), index == len(groups) - 1))
    return tiles


def _packed(cfg, dtype_of, leaves, names, layer, tile_bytes):
    """Row ranges of some matrices one after another; neighbours that fit one tile share it."""
    groups, room = [], 0
    for name in names:
        whole = _parts(cfg, dtype_of, leaves[name], layer)
        row_bytes = _row_bytes(whole)
        for first, n_rows in row_ranges(whole[0].shape[0], row_bytes, tile_bytes):
            size = n_rows * sum(row_bytes)
            parts = _rows(cfg, dtype_of, leaves, name, layer, first, n_rows)
            if groups and size <= room and all(part.matrix != name for part in groups[-1]):
                groups[-1] += parts
                room -= size
            else:
                groups.append(parts)
                room = tile_bytes - size
    return groups


def _paired(cfg, dtype_of, leaves, names, layer, tile_bytes):
    """The same row range of both matrices in each tile, so that their product is whole at once."""
    whole = [part for name in names for part in _parts(cfg, dtype_of, leaves[name], layer)]
    row_bytes = _row_bytes(whole)
    return [
        [part for name in names for part in _rows(cfg, dtype_of, leaves, name, layer, first, n)]
        for first, n in row_ranges(whole[0].shape[0], row_bytes, tile_bytes)
    ]


def _rows(cfg, dtype_of, leaves, name, layer, first, n_rows):
    """A range of a matrix's rows, with its bias's where it has one."""
    found = []
    for leaf_name in (name, f"{name}_bias"):
        if leaf_name in leaves:
            for whole in _parts(cfg, dtype_of, leaves[leaf_name], layer):
                shape = (n_rows, *whole.shape[1:])
                found.append(Part(whole.leaf, whole.tensor, whole.dtype, shape, first))
    return found


def _parts(cfg, dtype_of, leaf, layer):
    return parts_of(leaf, layer_tensor_name(leaf, layer), cfg, dtype_of)


def parts_of(
    leaf: Leaf, tensor: str, cfg: ModelConfig, dtype_of: Callable[[str], str]
) -> list[Part]:
    """A whole leaf: one part, or those of its scheme, the largest first."""
    form, shape = dtype_of(tensor), leaf.shape(cfg)
    if form not in SCHEMES:
        return [Part(leaf.name, tensor, form, shape)]
    return [
        Part(piece_name(leaf.name, piece), piece_name(tensor, piece), dtype, own)
        for piece, (dtype, own) in SCHEMES[form].pieces(shape).items()
    ]


def _row_bytes(parts):
    return [part.n_bytes // part.shape[0] for part in parts]


def _head_tiles(cfg, dtype_of, tile_bytes):
    leaf = head_leaf(cfg)
    whole = parts_of(leaf, leaf.published, cfg, dtype_of)
    ranges = row_ranges(whole[0].shape[0], _row_bytes(whole), tile_bytes)
    return [
        Tile(
            f"head {index + 1}/{len(ranges)}",
            "head",
            None,
            tuple(
                Part(part.leaf, part.tensor, part.dtype, (n_rows, *part.shape[1:]), first)
                for part in whole
            ),
            index == len(ranges) - 1,
        )
        for index, (first, n_rows) in enumerate(ranges)
    ]
