"""Tiles, the units that are streamed, and their sums.

A range of output rows of a matrix is consecutive bytes on disk, on the host and on the device, and
`x @ W[rows].T` is exact. So a layer may be cut into any number of row tiles, without partial sums.
The largest tile is a whole layer. A bias moves with the rows of its matrix. A large leaf that a
function reads uncut is a tile by itself, the last of the stage that the function ends.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import chain, compress

from jlayer.checkpoint.quantization import Quantization
from jlayer.encodings.base import Encoding
from jlayer.encodings.plain import INPUTS_FIRST
from jlayer.encodings.registry import SCHEMES, encoding, piece_name
from jlayer.families.base import LayerKind, Stage
from jlayer.families.registry import layer_tensor_name, published_tensors, stacked_tensors
from jlayer.plan.joined import Joined
from jlayer.spec import ALIGNMENT, ITEM_BYTES, STORED_BYTES, ModelConfig, resident_dtype


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
        """Bytes of all tensors before jlayer quantized some, if any: the last that has plain
        numbers has the published dtype. What is published in another encoding stays in it."""
        shapes = published_tensors(self.cfg)
        forms = [self.form_of(name) for name in shapes]
        vectors = (form for form in reversed(forms) if encoding(form).is_plain)
        plain = next(vectors, self.cfg.dtype or "bfloat16")
        return sum(
            encoding(plain if form in SCHEMES else form).n_bytes(shape)
            for form, shape in zip(forms, shapes.values(), strict=True)
        )


def unseen_weights(
    cfg: ModelConfig,
    quantization: Quantization | None,
    *,
    stored: str,
    dtype: str,
    as_published: bool = False,
) -> Weights:
    """The weights of a model of which only this is known. `stored`: the dtype of what is not
    quantized; `dtype`: the compute dtype. `as_published`: some experts may have inputs first."""
    shapes, inputs_first = published_tensors(cfg), set()
    if as_published:
        stacks = [stack for stack in stacked_tensors(cfg).values() if stack.inputs_first]
        inputs_first = {name for stack in stacks for name, *_ in stack.parts}

    def form_of(tensor):
        scheme = quantization and quantization.scheme_of(tensor, shapes[tensor])
        if scheme is not None:
            return scheme.name
        return INPUTS_FIRST[stored].name if tensor in inputs_first else stored

    return Weights(cfg, form_of, dtype)


@dataclass(frozen=True)
class Part:
    """One array of a tile: a piece of a leaf, whole or a range of its rows.

    `matrix`: the leaf. `leaf`: the array within the tile (`q_proj`, or `q_proj.q` and
    `q_proj.scale` of the same rows). `tensor`: the tensor on disk. `shape`: of this part, from its
    `first_row` on. `n_rows`: of the matrix, of which a row of a piece may be for several; of a
    vector its numbers. `width`: numbers in a row of the matrix. `form`: the name of its encoding. A
    matrix that cannot be cut by rows is whole.
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
    n_rows: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * STORED_BYTES[self.dtype]

    @property
    def encoding(self) -> Encoding:
        return encoding(self.form)

    @property
    def has_rows(self) -> bool:
        """Whether it has the rows of the matrix themselves, not what scales them."""
        return self.piece == self.encoding.main

    @property
    def is_for_all_rows(self) -> bool:
        """Whether it is a piece that comes whole with each range of rows: one scale for all."""
        return self.encoding.rows_per(self.piece) == 0

    @property
    def n_weights(self) -> int:
        """Weights in this part; 0 for the scales of a quantized matrix."""
        if not self.has_rows:
            return 0
        return self.n_rows * self.width if len(self.shape) > 1 else self.width

    def of_rows(self, first: int, n_rows: int) -> Part:
        """A range of the rows of a whole leaf, from a multiple of its encoding's `row_unit` on."""
        if not self.encoding.by_rows:
            assert (first, n_rows) == (0, self.n_rows), "it is moved as a whole"
            return self
        per = self.encoding.rows_per(self.piece)
        if per == 0:
            return replace(self, n_rows=n_rows)
        assert first % per == 0, "a row of a piece would be cut"
        shape = (-(-n_rows // per), *self.shape[1:])
        return replace(self, shape=shape, first_row=first // per, n_rows=n_rows)

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
    layer, or a whole expert. `begins_stage`, `ends_stage`: whether it has the first and last rows
    of its stage. `joined`: its layout if it crosses the link as one array. `for_host`: whether its
    rows are set apart for the host's cores.
    """

    name: str
    kind: LayerKind | None
    stage: Stage | None
    layer: int | None
    parts: tuple[Part, ...]
    expert: int | None = None
    begins_stage: bool = True
    ends_stage: bool = True
    joined: Joined | None = None
    for_host: bool = False

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
        """Matrix -> the number of its rows in this tile that are multiplied, in order."""
        uncut = self.kind.moving if self.kind else ()
        return {
            part.matrix: part.n_rows
            for part in self.parts
            if len(part.shape) == 2 and part.matrix not in uncut
        }

    @property
    def uncut(self) -> tuple[str, ...]:
        """The leaves in it that a function reads uncut."""
        moving = self.kind.moving if self.kind else ()
        return tuple(dict.fromkeys(p.matrix for p in self.parts if p.matrix in moving))

    @property
    def ends_layer(self) -> bool:
        """Whether the output of a layer is complete after this tile."""
        if self.kind is None:
            return False
        if self.stage is None:
            return self.expert is None
        return self.ends_stage and self.stage == self.kind.stages[-1]

    @property
    def is_whole_expert(self) -> bool:
        """Whether it has all matrices of an expert."""
        return self.expert is not None and self.stage is None

    @property
    def first_stage(self) -> Stage | None:
        """The stage that it begins with or goes on with; None for a whole layer."""
        return self.kind.expert_stages[0] if self.is_whole_expert else self.stage

    @property
    def uses_cache(self) -> bool:
        """Whether its run uses the layer's cache: a whole layer, or the end of such a stage."""
        if self.kind is None:
            return False
        if self.stage is None:
            return self.expert is None
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
    layer, the tiles of the layer that was cut for it. `cut_as`: the tile size that was asked for,
    and the shares of rows for the host. `dtype`: the compute dtype; `platform`: of the device.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        alike: Sequence[tuple[Tile, ...]],
        head: tuple[Tile, ...],
        *,
        cut_as: tuple[int | None, tuple],
        dtype: str,
        platform: str,
    ):
        self.cut_as, self._dtype, self._platform = cut_as, dtype, platform
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
        return self._each(lambda tile: tile.n_bytes)

    @cached_property
    def device_sizes(self) -> tuple[int, ...]:
        """The bytes of each tile on the device, in order."""
        return self._each(lambda tile: tile.device_bytes)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        layers = enumerate(self._alike)
        tiles_of_layers = (tile for n, tiles in layers for tile in _for_layer(self._cfg, tiles, n))
        return (*tiles_of_layers, *self._head)

    @cached_property
    def from_disk(self) -> tuple[Tier, ...]:
        """The tiers where nothing is kept; there is nothing to move of a tile without weights."""
        return self._each(lambda tile: Tier.DISK if tile.n_bytes else Tier.DEVICE)

    @cached_property
    def experts(self) -> tuple[tuple[Tile, ...], ...]:
        """Of each layer that has experts, in order, the tiles of one; all of a layer have equal
        ones."""
        of_layer = {id(tiles): tuple(t for t in tiles if t.expert == 0) for tiles in self._alike}
        return tuple(found for tiles in self._alike if (found := of_layer[id(tiles)]))

    @cached_property
    def certain(self) -> tuple[int, ...]:
        """The tiles that every forward pass uses, by number: all but those of experts."""
        return self._numbers(lambda tile: tile.expert is None)

    @cached_property
    def uncut(self) -> frozenset[int]:
        """The tiles that are leaves which a function reads uncut, by number."""
        return frozenset(
            self._numbers(lambda tile: tile.expert is None and tile.uncut and not tile.heights)
        )

    @cached_property
    def is_whole(self) -> bool:
        """Whether a tile is a whole layer."""
        return self.shapes[0].stage is None

    @cached_property
    def distinct(self) -> tuple[tuple[Tile, int], ...]:
        """(a tile, the number of tiles of its shape), for every shape."""
        count, first = Counter(), {}
        n_layers = Counter(map(id, self._alike))
        groups = [(tiles, n_layers[key]) for key, tiles in self._layers.items()]
        for tiles, n in (*groups, (self._head, 1)):
            for tile in tiles:
                key = (tile.signature, tile.ends_stage, tile.for_host)
                first.setdefault(key, tile)
                count[key] += n
        return tuple((first[key], n) for key, n in count.items())

    @cached_property
    def tile_bytes(self) -> int:
        """The bytes of the largest tile."""
        return max(tile.n_bytes for tile, _ in self.distinct)

    @cached_property
    def largest(self) -> tuple[int, ...]:
        """The bytes of the largest tile that every forward pass uses, and those of the largest of
        an expert, if there are some: each has slots of its own."""
        found = {}
        for tile, _ in self.distinct:
            of_experts = tile.expert is not None
            found[of_experts] = max(found.get(of_experts, 0), tile.n_bytes)
        return tuple(found[of_experts] for of_experts in sorted(found))

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
            sum(self._decoded_bytes(tile, part) for part in tile.parts) for tile, _ in self.distinct
        )

    @cached_property
    def _layers(self) -> dict[int, tuple[Tile, ...]]:
        """The layers that were cut, by identity: those that are equal have the same tuple."""
        return {id(tiles): tiles for tiles in self._alike}

    def _each(self, fact: Callable[[Tile], object]) -> tuple:
        """The fact of each tile, in order, which is asked of the layers that were cut alone: a
        large model has 80 layers of one kind, and 40000 tiles."""
        of_layer = {key: tuple(map(fact, tiles)) for key, tiles in self._layers.items()}
        of_all = chain.from_iterable(of_layer[id(tiles)] for tiles in self._alike)
        return (*of_all, *map(fact, self._head))

    def _numbers(self, holds: Callable[[Tile], object]) -> tuple[int, ...]:
        """The numbers of the tiles of which this is true, in order."""
        return tuple(compress(range(len(self.shapes)), self._each(holds)))

    def _decoded_bytes(self, tile, part):
        """Of a part: of a leaf that is used uncut all of it, in float32 and then in its dtype."""
        if part.matrix not in tile.uncut:
            return part.decoded_bytes(self._dtype, self._platform)
        dtype = resident_dtype(tile.kind.leaf(part.matrix), self._dtype)
        if part.encoding.is_plain:
            return part.decoded_bytes(dtype, self._platform)
        return part.n_weights * (ITEM_BYTES["float32"] + ITEM_BYTES[dtype])


def _for_layer(cfg, tiles, layer):
    """The tiles of a layer, derived from the equal tiles of another layer."""
    if layer == tiles[0].layer:
        return tiles
    leaves = {leaf.name: leaf for leaf in tiles[0].kind.leaves}

    def tensor(tile, part):
        name = layer_tensor_name(cfg, leaves[part.matrix], layer, tile.expert)
        return piece_name(name, part.piece)

    before, after = f"layer {tiles[0].layer}", f"layer {layer}"
    return [
        replace(
            tile,
            name=after + tile.name.removeprefix(before),
            layer=layer,
            parts=tuple(replace(part, tensor=tensor(tile, part)) for part in tile.parts),
        )
        for tile in tiles
    ]
