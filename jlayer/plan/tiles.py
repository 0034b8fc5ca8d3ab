"""Cuts a model into tiles, the units that are streamed, from its config alone.

A range of output rows of a matrix is consecutive bytes on disk, on the host and on the device, and
`x @ W[rows].T` is exact. So a layer may be cut into any number of row tiles, without partial sums.
The largest tile is a whole layer. A bias moves with the rows of its matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from jlayer.encodings.base import Encoding
from jlayer.encodings.registry import encoding, piece_name
from jlayer.families.base import Group, LayerKind, Stage
from jlayer.families.registry import (
    family_of,
    head_leaf,
    head_stage,
    layer_kinds,
    layer_tensor_name,
    published_tensors,
)
from jlayer.plan.joined import Joined, joined
from jlayer.spec import ALIGNMENT, STORED_BYTES, Leaf, ModelConfig, Place


class Tier(Enum):
    """Where a tile is kept between forward passes."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    __hash__ = object.__hash__  # Enum's own is slow, and plans count millions of tiles by tier


@dataclass(frozen=True)
class Weights:
    """A model's weights as a plan needs them.

    `form_of`: published tensor -> name of its encoding on disk. `dtype`: the compute dtype.
    """

    cfg: ModelConfig
    form_of: Callable[[str], str]
    dtype: str

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(
            encoding(self.form_of(name)).n_bytes(shape)
            for name, shape in published_tensors(self.cfg).items()
        )

    @cached_property
    def published_bytes(self) -> int:
        """Bytes of all tensors before quantizing, if any; the final norm has the published
        dtype."""
        plain = self.form_of(family_of(self.cfg).final_norm.published)
        shapes = published_tensors(self.cfg)
        forms = map(self.form_of, shapes)
        return sum(
            encoding(form if encoding(form).is_plain else plain).n_bytes(shape)
            for form, shape in zip(forms, shapes.values(), strict=True)
        )


@dataclass(frozen=True)
class Part:
    """One array of a tile: a piece of a leaf, whole or a range of its rows.

    `matrix`: the leaf. `leaf`: the array within the tile (`q_proj`, or `q_proj.q` and
    `q_proj.scale` of the same rows). `tensor`: the tensor on disk. `shape`: of this part. `width`:
    numbers in a row of the matrix. `form`: the name of its encoding.
    """

    leaf: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int = 0
    matrix: str = ""
    piece: str = ""
    form: str = ""
    width: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * STORED_BYTES[self.dtype]

    @property
    def encoding(self) -> Encoding:
        return encoding(self.form)

    @property
    def n_weights(self) -> int:
        """Weights in this part; 0 for the scales of a quantized matrix."""
        if self.piece != self.encoding.main:
            return 0
        return math.prod((*self.shape[:-1], self.width))

    def decoded_bytes(self, dtype: str, platform: str) -> int:
        """Bytes of the decoded copy of its weights."""
        if not self.n_weights:
            return 0
        n_rows = self.n_weights // self.width
        return self.encoding.decoded_bytes(n_rows, self.width, dtype=dtype, platform=platform)


@dataclass(frozen=True)
class Tile:
    """The unit of streaming: arrays that are used together.

    `kind`: of its layer; None for the head. `stage`: the stage whose rows it has; None for a whole
    layer. `begins_stage`, `ends_stage`: whether it has the first and last rows of its stage.
    `joined`: its layout if it crosses the link as one array.
    """

    name: str
    kind: LayerKind | None
    stage: Stage | None
    layer: int | None
    parts: tuple[Part, ...]
    begins_stage: bool = True
    ends_stage: bool = True
    joined: Joined | None = None

    @cached_property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device; a joined tile includes the gaps between its parts."""
        return self.joined.n_bytes if self.joined else self.n_bytes

    @property
    def n_arrays(self) -> int:
        """Arrays that the time of a put is counted for; a joined tile counts one per matrix."""
        return len(self.heights if self.joined else self.parts)

    @property
    def heights(self) -> dict[str, int]:
        """Matrix -> the number of its rows in this tile, in order."""
        return {part.matrix: part.shape[0] for part in self.parts if len(part.shape) == 2}

    @property
    def ends_layer(self) -> bool:
        """Whether the output of a layer is complete after this tile."""
        if self.kind is None:
            return False
        return self.stage is None or (self.ends_stage and self.stage == self.kind.stages[-1])

    @property
    def uses_cache(self) -> bool:
        """Whether its run uses the layer's cache: a whole layer, or the end of such a stage."""
        if self.kind is None:
            return False
        if self.stage is None:
            return True
        return self.ends_stage and "cache" in self.stage.finish.reads

    @cached_property
    def signature(self) -> tuple:
        """The key of the programs compiled for this tile; equal for all layers of a kind."""
        kind = self.kind and self.kind.name
        stage = self.stage and self.stage.name
        return (kind, stage, *((part.leaf, part.shape, part.dtype) for part in self.parts))

    def products(self) -> dict[str, int]:
        """Product -> the number of its rows that this tile gives."""
        heights = self.heights
        return {
            group.product: heights[group.leaves[0]]
            for group in self.stage.groups
            if group.leaves[0] in heights
        }


class Tiling:
    """All tiles of a forward pass in order, and their sums.

    Layers of one kind and encoding have equal tiles, so only one of them is cut. `alike`: for each
    layer, the tiles of the layer that was cut for it. `wanted`: the tile size that was asked for.
    `dtype`: the compute dtype; `platform`: of the device.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        alike: Sequence[tuple[Tile, ...]],
        head: tuple[Tile, ...],
        *,
        wanted: int | None,
        dtype: str,
        platform: str,
    ):
        self.wanted, self._dtype, self._platform = wanted, dtype, platform
        self._cfg, self._alike, self._head = cfg, alike, head

    @cached_property
    def shapes(self) -> tuple[Tile, ...]:
        """For each of `tiles` a tile of equal shape, perhaps of another layer.

        Sums need no more, and this is much faster.
        """
        return (*(tile for tiles in self._alike for tile in tiles), *self._head)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each tile, in order."""
        return tuple(tile.n_bytes for tile in self.shapes)

    @cached_property
    def device_sizes(self) -> tuple[int, ...]:
        """The bytes of each tile on the device, in order."""
        return tuple(tile.device_bytes for tile in self.shapes)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        layers = enumerate(self._alike)
        tiles_of_layers = (tile for n, tiles in layers for tile in _for_layer(self._cfg, tiles, n))
        return (*tiles_of_layers, *self._head)

    @cached_property
    def is_whole(self) -> bool:
        """Whether a tile is a whole layer."""
        return self.shapes[0].stage is None

    @cached_property
    def distinct(self) -> tuple[tuple[Tile, int], ...]:
        """(a tile, the number of tiles of its shape), for every shape."""
        count, first = Counter(), {}
        layers = {id(tiles): tiles for tiles in self._alike}  # equal ones are the same object
        n_layers = Counter(map(id, self._alike))
        groups = [(tiles, n_layers[key]) for key, tiles in layers.items()]
        for tiles, n in (*groups, (self._head, 1)):
            for tile in tiles:
                key = (tile.signature, tile.ends_stage)
                first.setdefault(key, tile)
                count[key] += n
        return tuple((first[key], n) for key, n in count.items())

    @cached_property
    def tile_bytes(self) -> int:
        """The bytes of the largest tile."""
        return max(tile.n_bytes for tile, _ in self.distinct)

    @cached_property
    def slack(self) -> int:
        """Bytes of a host slot beyond its tile: two disk blocks for each segment, of which a part
        has at most one."""
        return ALIGNMENT * 2 * max(len(tile.parts) for tile, _ in self.distinct)

    @cached_property
    def n_bytes(self) -> int:
        return sum(tile.n_bytes * n for tile, n in self.distinct)

    @cached_property
    def head_rows(self) -> int:
        """The most rows of the head in one tile."""
        return max(sum(tile.heights.values()) for tile, _ in self.distinct if tile.kind is None)

    @cached_property
    def most_rows(self) -> int:
        """The most rows of matrices in one tile."""
        return max(sum(tile.heights.values()) for tile, _ in self.distinct)

    @cached_property
    def decoded_bytes(self) -> int:
        """The most bytes of decoded copies of matrices that the program of a tile makes before the
        product."""
        return max(
            sum(part.decoded_bytes(self._dtype, self._platform) for part in tile.parts)
            for tile, _ in self.distinct
        )


def cut(weights: Weights, tile_bytes: int | None, *, platform: str) -> Tiling:
    """Cuts a forward pass into tiles of at most about `tile_bytes`; None: whole layers."""
    cfg, tiles_of, alike = weights.cfg, {}, []
    for layer, kind in enumerate(layer_kinds(cfg)):
        forms = tuple(weights.form_of(layer_tensor_name(cfg, leaf, layer)) for leaf in kind.leaves)
        if (kind.name, forms) not in tiles_of:
            tiles = _layer_tiles(weights, kind, layer, tile_bytes, platform)
            tiles_of[kind.name, forms] = tuple(tiles)
        alike.append(tiles_of[kind.name, forms])
    head = _head_tiles(weights, tile_bytes or alike[0][0].n_bytes, platform)
    return Tiling(
        cfg, alike, tuple(head), wanted=tile_bytes, dtype=weights.dtype, platform=platform
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
        )
        for piece, (dtype, piece_shape) in encoding(form).pieces(shape).items()
    ]


def row_ranges(n_rows: int, row_bytes: list[int], tile_bytes: int) -> list[tuple[int, int]]:
    """Splits rows into the fewest, nearly equal ranges of at most `tile_bytes` (or one row).

    Returns (first row, number of rows) of each. `row_bytes`: bytes of a row of each array. If there
    are enough rows, a range is a whole number of disk blocks, so an aligned matrix is read directly
    into its slot.
    """
    most = max(1, tile_bytes // sum(row_bytes))
    height = -(-n_rows // -(-n_rows // most))
    unit = ALIGNMENT // math.gcd(*row_bytes, ALIGNMENT)
    if height >= unit:
        up = -(-height // unit) * unit
        height = up if up <= most else height // unit * unit
    return [(row, min(height, n_rows - row)) for row in range(0, n_rows, height)]


def _layer_tiles(weights, kind, layer, tile_bytes, platform):
    if tile_bytes is None:
        streamed = kind.kept_in(Place.TILE)
        parts = tuple(part for leaf in streamed for part in _parts(weights, leaf, layer))
        return [_tile(f"layer {layer}", kind, None, layer, parts, platform=platform)]
    tiles = []
    for stage in kind.stages:
        chosen = _packed(weights, kind, stage, layer, tile_bytes)
        for index, parts in enumerate(chosen):
            name = f"layer {layer} {stage.name} {index + 1}/{len(chosen)}"
            ends = {"begins_stage": index == 0, "ends_stage": index == len(chosen) - 1}
            tiles.append(_tile(name, kind, stage, layer, tuple(parts), platform=platform, **ends))
    return tiles


def _tile(name, kind, stage, layer, parts, *, platform, **ends):
    is_plain = all(part.encoding.is_plain for part in parts)
    layout = joined([part.n_bytes for part in parts], is_plain=is_plain, platform=platform)
    return Tile(name, kind, stage, layer, parts, joined=layout, **ends)


def _packed(weights, kind, stage, layer, tile_bytes):
    """The parts of each tile of a stage: row ranges of one group after another.

    Ranges of different groups share a tile if both fit.
    """
    packed, room = [], 0
    for group in stage.groups:
        leaves = [kind.leaf(name) for name in group.leaves]
        whole = [part for leaf in leaves for part in _parts(weights, leaf, layer)]
        row_bytes = [part.n_bytes // part.shape[0] for part in whole]
        for first, n_rows in row_ranges(whole[0].shape[0], row_bytes, tile_bytes):
            size = n_rows * sum(row_bytes)
            parts = _rows(weights, kind, group, layer, first, n_rows)
            if packed and size <= room and not _holds(packed[-1], group):
                packed[-1] += parts
                room -= size
            else:
                packed.append(parts)
                room = tile_bytes - size
    return packed


def _holds(parts, group: Group):
    """Whether the parts include rows of a group. A tile has only one range of each matrix."""
    return any(part.matrix in group.leaves for part in parts)


def _rows(weights, kind, group, layer, first, n_rows):
    """A range of rows of a group's matrices and their biases."""
    return [
        replace(whole, shape=(n_rows, *whole.shape[1:]), first_row=first)
        for matrix in group.leaves
        for leaf in kind.with_bias(matrix)
        for whole in _parts(weights, leaf, layer)
    ]


def _parts(weights, leaf, layer):
    return parts_of(leaf, layer_tensor_name(weights.cfg, leaf, layer), weights)


def _for_layer(cfg, tiles, layer):
    """The tiles of a layer, derived from the equal tiles of another layer."""
    if layer == tiles[0].layer:
        return tiles
    tensors = {
        (leaf.name, piece): piece_name(layer_tensor_name(cfg, leaf, layer), piece)
        for leaf in tiles[0].kind.leaves
        for piece in {part.piece for tile in tiles for part in tile.parts}
    }
    before, after = f"layer {tiles[0].layer}", f"layer {layer}"
    return [
        replace(
            tile,
            name=after + tile.name.removeprefix(before),
            layer=layer,
            parts=tuple(
                replace(part, tensor=tensors[part.matrix, part.piece]) for part in tile.parts
            ),
        )
        for tile in tiles
    ]


def _head_tiles(weights, tile_bytes, platform):
    leaf, stage = head_leaf(weights.cfg), head_stage(weights.cfg)
    whole = parts_of(leaf, leaf.published, weights)
    row_bytes = [part.n_bytes // part.shape[0] for part in whole]
    ranges = row_ranges(whole[0].shape[0], row_bytes, tile_bytes)
    return [
        _tile(
            f"head {index + 1}/{len(ranges)}",
            None,
            stage,
            None,
            tuple(
                replace(part, shape=(n_rows, *part.shape[1:]), first_row=first) for part in whole
            ),
            platform=platform,
            begins_stage=index == 0,
            ends_stage=index == len(ranges) - 1,
        )
        for index, (first, n_rows) in enumerate(ranges)
    ]
