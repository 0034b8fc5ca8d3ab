"""What is compiled: one program for each input shape, before the first weight is on the device, and
counted.

A tile's work is a list of Calls: compiled functions, with what each reads of a token's way through
the model and what it gives. The lists come from the family's tables of stages; which input shapes
there are, `plan.shapes` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.families.base import Function, LayerKind
from jlayer.families.registry import family_of
from jlayer.interrupts import deferred
from jlayer.model.cache import cache_struct, empty_cache
from jlayer.model.products import Encoded, InBlob, dequantize, weight
from jlayer.model.stages import block, call, multiply
from jlayer.plan.machine import platform_of
from jlayer.plan.tiles import Part, Tile
from jlayer.spec import Leaf, ModelConfig, Place
from jlayer.streaming.executor import Watch

_backend_compiles = 0


def _count_compiles(event, duration, **_):
    global _backend_compiles
    if event.endswith("backend_compile_duration"):
        _backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def backend_compiles() -> int:
    """Programs that XLA has compiled in this process so far, for whatever reason."""
    return _backend_compiles


@dataclass(frozen=True)
class Size:
    """The shape of a chunk of tokens: `batch` sequences of `tokens` columns, whose caches have room
    for `capacity` positions."""

    batch: int
    tokens: int
    capacity: int

    def __str__(self):
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True)
class Call:
    """A compiled function at a tile.

    It is called with a dict of what it `reads` (names of the flow, "weights", "whole", "products")
    and another of what it consumes (the cache, or nothing), and returns a dict of what it `gives`.
    """

    program: Callable
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    whole: tuple[str, ...] = ()
    uses_cache: bool = False


class Programs:
    """Compiled programs of one model on one device, by shape; `compiles` counts them by a readable
    label."""

    def __init__(
        self, cfg: ModelConfig, *, dtype: str, device: jax.Device, watch: Watch | None = None
    ):
        self.cfg, self.dtype, self.device = cfg, dtype, device
        self._watch = watch or Watch()
        self.compiles: dict[str, int] = {}
        self.temporary_bytes = 0  # the largest of all programs so far, as XLA says
        self._block_bytes = BLOCK_BYTES[platform_of(device.platform)]
        self._compiled: dict = {}

    def calls(
        self, tile: Tile, size: Size, *, widths: dict[str, tuple[int, ...]], last: int
    ) -> tuple[Call, ...]:
        """What a chunk of this size goes through at a tile.

        `widths`: by product, the rows of all of its stage's tiles. `last`: how many of the last
        columns the head looks at; none: it does nothing.
        """
        if tile.stage is None:
            return (self._layer(tile, size),)
        if tile.stage.logits:
            return (self._head(tile, size, last),) if last else ()
        found = []
        if tile.begins_stage and tile.stage.input:
            found.append(self._function(tile, size, tile.stage.input, {}))
        found.append(self._rows(tile, size))
        if tile.ends_stage:
            found.append(self._function(tile, size, tile.stage.finish, widths))
        return tuple(found)

    def embed(self, parts: list[Part], *, batch: int, tokens: int) -> Callable:
        """(rows of the embedding [B, T, ...] by leaf) -> hidden [B, T, D]."""
        width = self.cfg.hidden_size

        def function(rows):
            flat = {name: array.reshape(-1, array.shape[-1]) for name, array in rows.items()}
            (weights,) = self._join(parts, flat).values()
            if isinstance(weights, Encoded):
                weights = dequantize(weights, width)
            return weights.astype(self.dtype).reshape(batch, tokens, width)

        args = {
            part.leaf: jax.ShapeDtypeStruct((batch, tokens, part.shape[1]), part.dtype)
            for part in parts
        }
        return self._get(f"embed {batch}x{tokens}", (), function, (args,))

    def empty_cache(self, kind: LayerKind, *, batch: int, capacity: int) -> Callable:
        """() -> a layer's cache before the first token, freshly allocated on the device."""

        def make():
            return empty_cache(
                kind.cache, self.cfg, batch=batch, capacity=capacity, dtype=self.dtype
            )

        return self._get(f"cache {batch}x{capacity}", (kind.cache,), make, ())

    def _layer(self, tile, size):
        """A whole layer: (weights, whole, hidden, positions), cache -> (hidden, cache)."""
        whole = tuple(leaf.name for leaf in tile.kind.kept_in(Place.DEVICE))

        def function(given, consumed):
            layer = self._weights(tile, given["weights"]) | given["whole"]
            hidden, cache = block(tile.kind)(
                layer, given["hidden"], consumed["cache"], given["positions"], self.cfg
            )
            return {"hidden": hidden, "cache": cache}

        given = {"weights": struct_of(tile), "whole": self._whole(tile, whole)}
        given |= self._flow(tile, size, ("hidden", "positions"))
        label = f"block {size} cache {size.capacity}"
        program = self._get(label, tile.signature, function, (given, self._cache(tile, size)))
        return Call(program, tuple(given), ("hidden", "cache"), whole, uses_cache=True)

    def _rows(self, tile, size):
        """Some rows of a stage's matrices: (x [B, T, in], weights) -> products [B, T, rows]."""

        def function(given, consumed):
            weights = self._weights(tile, given["weights"])
            return {"products": multiply(tile.stage, given["x"], weights, cfg=self.cfg)}

        width = tile.parts[0].width
        given = {"weights": struct_of(tile), "x": self._struct(size, width)}
        heights = "+".join(map(str, tile.heights.values()))
        label = f"{tile.stage.name} rows {heights} {size}"
        program = self._get(label, tile.signature, function, (given, {}))
        return Call(program, ("weights", "x"), ("products",))

    def _function(self, tile, size, wanted: Function, widths):
        """One of a stage's own functions: (products, whole, what it reads) -> what it gives."""

        def function(given, consumed):
            flow = given | consumed
            weights, products = given.get("whole", {}), given.get("products")
            return call(wanted, flow, weights, products, cfg=self.cfg)

        uses_cache = "cache" in wanted.reads
        given = self._flow(tile, size, [name for name in wanted.reads if name != "cache"])
        if wanted.whole:
            given["whole"] = self._whole(tile, wanted.whole)
        if widths:
            given["products"] = {
                name: [self._struct(size, width) for width in own] for name, own in widths.items()
            }
        consumed = self._cache(tile, size) if uses_cache else {}
        label = f"{wanted.name} {size}" + (f" cache {size.capacity}" if uses_cache else "")
        key = (tile.kind.name, tile.stage.name, tuple(widths.items()))
        program = self._get(label, key, function, (given, consumed))
        return Call(program, tuple(given), wanted.gives, wanted.whole, uses_cache)

    def _head(self, tile, size, last):
        """Some rows of the head: (weights, whole, hidden) -> float32 logits [B, last, v] of the
        last columns."""
        wanted = tile.stage.input

        def function(given, consumed):
            flow = {"hidden": given["hidden"][:, size.tokens - last :]}
            flow |= call(wanted, flow, given["whole"], cfg=self.cfg)
            weights = self._weights(tile, given["weights"])
            (logits,) = multiply(tile.stage, flow["x"], weights, cfg=self.cfg).values()
            return {"logits": logits}

        given = {"weights": struct_of(tile), "whole": self._whole(tile, wanted.whole)}
        given |= self._flow(tile, size, ("hidden",))
        label = f"head {size} last {last} rows {sum(tile.heights.values())}"
        program = self._get(label, tile.signature, function, (given, {}))
        return Call(program, tuple(given), ("logits",), wanted.whole)

    def _weights(self, tile, put):
        """A tile's weights by leaf, inside a program, out of what was put of it."""
        return self._join(tile.parts, _parts_in(put, tile))

    def _join(self, parts, arrays):
        pieces, forms = {}, {}
        for part in parts:
            pieces.setdefault(part.matrix, {})[part.piece] = arrays[part.leaf]
            forms[part.matrix] = part.form
        return {
            name: weight(own, encoding=forms[name], block_bytes=self._block_bytes)
            for name, own in pieces.items()
        }

    def _get(self, label, key, function, args):
        """The compiled program of this label and key; the label alone is what it is counted by.

        Of two arguments the second is consumed.
        """
        if (label, key) not in self._compiled:
            with deferred(), self._watch.compiling(label):
                self._compiled[label, key] = self._compile(label, function, args)
        return self._compiled[label, key]

    def _compile(self, label, function, args):
        before = backend_compiles()
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args
        )
        consumed = (1,) if len(args) == 2 else ()
        jitted = jax.jit(function, donate_argnums=consumed, out_shardings=sharding)
        program = jitted.lower(*placed).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        self.temporary_bytes = max(self.temporary_bytes, temporary)
        self.compiles[label] = self.compiles.get(label, 0) + backend_compiles() - before
        return program

    def _flow(self, tile, size, names):
        """The shapes of what flows through a stage, by name."""
        sizes = {
            "hidden": lambda: self._struct(size, self.cfg.hidden_size),
            "x": lambda: self._struct(size, tile.parts[0].width),
            "positions": lambda: jax.ShapeDtypeStruct((size.batch, size.tokens), "int32"),
        }
        return {name: sizes[name]() for name in names}

    def _whole(self, tile, names):
        leaves = {leaf.name: leaf for leaf in self._device_leaves(tile)}
        return {
            name: jax.ShapeDtypeStruct(leaves[name].shape(self.cfg), self.dtype) for name in names
        }

    def _device_leaves(self, tile) -> tuple[Leaf, ...]:
        if tile.kind is None:
            return (family_of(self.cfg).final_norm,)
        return tile.kind.kept_in(Place.DEVICE)

    def _cache(self, tile, size):
        spec = tile.kind.cache
        struct = cache_struct(
            spec, self.cfg, batch=size.batch, capacity=size.capacity, dtype=self.dtype
        )
        return {"cache": struct}

    def _struct(self, size, width):
        return jax.ShapeDtypeStruct((size.batch, size.tokens, width), self.dtype)


def struct_of(tile: Tile):
    """What is put of a tile on a device, without the numbers: arrays by leaf, or one of bytes."""
    if tile.joined:
        return jax.ShapeDtypeStruct((tile.joined.n_bytes,), "uint8")
    return {part.leaf: jax.ShapeDtypeStruct(part.shape, part.dtype) for part in tile.parts}


def _parts_in(put, tile: Tile) -> dict:
    """The inverse, inside a program: a tile's parts by leaf, out of what was put of it."""
    if not tile.joined:
        return put
    return {
        part.leaf: InBlob(put, offset, part.shape, part.dtype)
        for part, offset in zip(tile.parts, tile.joined.offsets, strict=True)
    }
