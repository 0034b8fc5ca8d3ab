"""All tiles of a forward pass, and their sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, compress

from jlayer.encodings.registry import piece_name
from jlayer.families.registry import layer_tensor_name
from jlayer.plan.tiles import Tier, Tile
from jlayer.spec import ALIGNMENT, ITEM_BYTES, ModelConfig, resident_dtype


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
    def most_on_device(self) -> tuple[int, ...]:
        """The same as `largest` of what a device has of each."""
        found = {}
        for tile, _ in self.distinct:
            of_experts = tile.expert is not None
            found[of_experts] = max(found.get(of_experts, 0), tile.share.n_bytes)
        return tuple(found[of_experts] for of_experts in sorted(found))

    @cached_property
    def slack(self) -> int:
        """Bytes of a host slot beyond its tile: two disk blocks for each segment, of which a part
        has at most one; one for each device where the tile is joined."""
        n_segments = (
            len(tile.parts) * (tile.n_devices if tile.joined else 1) for tile, _ in self.distinct
        )
        return ALIGNMENT * 2 * max(n_segments)

    @cached_property
    def n_bytes(self) -> int:
        return sum(tile.n_bytes * n for tile, n in self.distinct)

    @cached_property
    def head_rows(self) -> int:
        """The most rows of the head in one tile, of all hosts."""
        return max(_all_rows(tile) for tile, _ in self.distinct if tile.kind is None)

    @cached_property
    def most_rows(self) -> int:
        """The most rows of matrices in one tile, of all hosts."""
        return max(_all_rows(tile) for tile, _ in self.distinct)

    @cached_property
    def decoded_bytes(self) -> int:
        """The most bytes of decoded copies of matrices that the program of a tile makes before the
        product."""
        return max(
            sum(
                self._decoded_bytes(tile, whole if whole.matrix in tile.uncut else own)
                for whole, own in zip(tile.parts, tile.share.parts, strict=True)
            )
            for tile, _ in self.distinct
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
        n_weights = part.n_weights * (part.hosts.n if part.hosts else 1)
        return n_weights * (ITEM_BYTES["float32"] + ITEM_BYTES[dtype])


def _all_rows(tile):
    """The rows of a tile's matrices that one host reads, and those of the others."""
    hosts = {matrix: tile.hosts_of(matrix) for matrix in tile.heights}
    return sum(n * (hosts[name].n if hosts[name] else 1) for name, n in tile.heights.items())


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
