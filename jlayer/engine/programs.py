"""Compiles and counts programs: one for each input shape, before the first weight is on the device.

The work at a tile is a list of Calls: compiled functions, with the values that each reads and
gives. The lists are made from the family's tables of stages; the input shapes are in `plan.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.engine.device import has_flash
from jlayer.families.base import Function, LayerKind
from jlayer.families.registry import family_of
from jlayer.interrupts import deferred
from jlayer.model.cache import Rows, cache_struct, empty_cache, rows_struct
from jlayer.model.products import Encoded, InBlob, dequantize, product, weight
from jlayer.model.stages import block, call, hosted_products, multiply
from jlayer.plan.machine import platform_of
from jlayer.plan.tiles import Part, Tile
from jlayer.spec import Leaf, ModelConfig, Place
from jlayer.streaming.watch import Watch

_backend_compiles = 0


def _count_compiles(event, duration, **_):
    global _backend_compiles
    if event.endswith("backend_compile_duration"):
        _backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def backend_compiles() -> int:
    """The number of programs that XLA has compiled in this process so far, ours or not."""
    return _backend_compiles


@dataclass(frozen=True)
class Size:
    """The shape of a chunk: `rows`, of which the first are a pane of `lanes` times `tokens`; tables
    of `capacity` entries, and pools of `pool` rows. `fresh`: see `model.cache.Rows`."""

    rows: int
    lanes: int
    tokens: int
    capacity: int
    pool: int
    fresh: int | None = None

    @property
    def attends(self) -> str:
        """What the programs that use the cache are compiled for, as a label."""
        fresh = f" fresh {self.fresh}" if self.fresh else ""
        return f"{self.lanes}x{self.tokens} cache {self.capacity} of {self.pool}{fresh}"

    @property
    def rows_struct(self) -> Rows:
        """The shapes of its rows, as attention needs them."""
        return rows_struct(
            n_rows=self.rows,
            lanes=self.lanes,
            tokens=self.tokens,
            capacity=self.capacity,
            fresh=self.fresh,
        )


@dataclass(frozen=True)
class Call:
    """A compiled function at a tile.

    Its arguments are a dict of the values that it `reads` (names of the flow, "weights", "whole",
    "products", "hosted") and a dict of those whose memory it reuses (the cache, or nothing). It
    returns a dict of the values that it gives. `ends_stage`: whether it is the stage's `finish`.
    """

    program: Callable
    reads: tuple[str, ...]
    whole: tuple[str, ...] = ()
    uses_cache: bool = False
    ends_stage: bool = False


@dataclass(frozen=True)
class StageShape:
    """How a stage's rows are divided in a forward pass.

    `widths`: product -> its rows in each tile that the device multiplies. `hosted`: matrix -> its
    rows that the host multiplies.
    """

    widths: tuple[tuple[str, tuple[int, ...]], ...] = ()
    hosted: tuple[tuple[str, int], ...] = ()


class Programs:
    """The compiled programs of one model on one device; `compiles` counts them by label."""

    def __init__(
        self, cfg: ModelConfig, *, dtype: str, device: jax.Device, watch: Watch | None = None
    ):
        self.cfg, self.dtype, self.device = cfg, dtype, device
        self._watch = watch or Watch()
        self.compiles: dict[str, int] = {}
        self.temporary_bytes = 0  # of the program with the most so far, as XLA reports
        self._block_bytes = BLOCK_BYTES[platform_of(device.platform)]
        self.flash = has_flash(device, head_dim=cfg.head_dim, dtype=dtype)
        self._compiled: dict = {}

    def calls(
        self,
        tile: Tile,
        size: Size,
        *,
        shape: StageShape,
        wanted: int,
        on_host: bool = False,
        landing: int = 0,
    ) -> tuple[Call, ...]:
        """The calls for a chunk of this size at a tile.

        `shape`: of the tile's stage. `wanted`: how many rows the head reads, padding included; 0:
        no call. `on_host`: the host's cores multiply the tile; the head gives its input then.
        `landing`: the rows of what they multiplied, of all chunks.
        """
        if tile.stage is None:
            return (self._layer(tile, size),)
        if tile.stage.logits:
            head = self._head_input if on_host else self._head
            return (head(tile, size, wanted),) if wanted else ()
        calls = []
        if tile.begins_stage and tile.stage.input:
            calls.append(self._function(tile, size, tile.stage.input))
        if not on_host:
            calls.append(self._rows(tile, size))
        if tile.ends_stage:
            calls.append(self._function(tile, size, tile.stage.finish, shape, landing))
        return tuple(calls)

    def embed(self, parts: list[Part], *, n_rows: int) -> Callable:
        """The program (rows of the embedding [R, ...] by leaf) -> hidden [R, D]."""
        width = self.cfg.hidden_size

        def function(rows):
            (weights,) = self._join(parts, rows).values()
            if isinstance(weights, Encoded):
                weights = dequantize(weights, width)
            return weights.astype(self.dtype)

        args = {
            part.leaf: jax.ShapeDtypeStruct((n_rows, part.shape[1]), part.dtype) for part in parts
        }
        return self.get(f"embed {n_rows}", (), function, (args,))

    def empty_cache(self, kind: LayerKind, *, n_rows: int) -> Callable:
        """The program () -> an empty pool of a layer, allocated on the device."""

        def make():
            return empty_cache(kind.cache, self.cfg, n_rows=n_rows, dtype=self.dtype)

        return self.get(f"pool {n_rows}", (kind.cache,), make, ())

    def grown_cache(self, kind: LayerKind, *, before: int, n_rows: int) -> Callable:
        """The program (a pool of `before` rows) -> the same with `n_rows` rows."""

        def grow(cache):
            return jax.tree.map(
                lambda entry: jnp.pad(entry, ((0, n_rows - before), *[(0, 0)] * (entry.ndim - 1))),
                cache,
            )

        struct = cache_struct(kind.cache, self.cfg, n_rows=before, dtype=self.dtype)
        return self.get(f"pool {before} to {n_rows}", (kind.cache,), grow, (struct,))

    def written_rows(self, kind: LayerKind, *, pool: int, n_rows: int) -> Callable:
        """The program (a pool, rows [R]) -> the entries in these rows, [R, ...] each."""

        def rows_of(cache, rows):
            return jax.tree.map(lambda entry: entry.at[rows].get(mode="clip"), cache)

        struct = cache_struct(kind.cache, self.cfg, n_rows=pool, dtype=self.dtype)
        rows = jax.ShapeDtypeStruct((n_rows,), "int32")
        label = f"written rows {n_rows} of {pool}"
        return self.get(label, (kind.cache,), rows_of, (struct, rows), reuses=False)

    def products(self, tile: Tile, n_rows: int) -> Callable:
        """The program ({weights of a tile, inputs [R, in] by width}) -> the product of each of its
        matrices: to time its arithmetic."""
        widths = {part.matrix: part.width for part in tile.parts}

        def function(given):
            weights = self._weights(tile, given["weights"])
            inputs = given["inputs"]
            return [product(inputs[str(widths[name])], weights[name]) for name in tile.heights]

        inputs = {
            width: jax.ShapeDtypeStruct((n_rows, int(width)), self.dtype)
            for width in self.widths(tile)
        }
        given = {"weights": struct_of(tile), "inputs": inputs}
        return self.get(f"timed {n_rows}", tile.signature, function, (given,))

    def widths(self, tile: Tile) -> list[str]:
        """The widths of a tile's matrices, each once, as keys of a dict."""
        return sorted({str(p.width) for p in tile.parts if p.matrix in tile.heights})

    def zeros(self, tile: Tile):
        """A tile of zeros on the device."""
        return jax.tree.map(
            lambda one: jnp.zeros(one.shape, one.dtype, device=self.device), struct_of(tile)
        )

    def _layer(self, tile, size):
        """A whole layer: (weights, whole, hidden, rows), cache -> (hidden, cache)."""
        whole = tuple(leaf.name for leaf in tile.kind.kept_in(Place.DEVICE))

        def function(given, consumed):
            layer = self._weights(tile, given["weights"]) | given["whole"]
            rows = given["rows"].replace(flash=self.flash)
            hidden, cache = block(tile.kind)(
                layer, given["hidden"], consumed["cache"], rows, self.cfg
            )
            return {"hidden": hidden, "cache": cache}

        given = {"weights": struct_of(tile), "whole": self._whole(tile, whole)}
        given |= self._flow(tile, size, ("hidden", "rows"))
        label = f"block {size.rows} {size.attends}"
        program = self.get(label, tile.signature, function, (given, self._cache(tile, size)))
        return Call(program, tuple(given), whole, uses_cache=True)

    def _rows(self, tile, size):
        """Some rows of a stage's matrices: (x [R, in], weights) -> products [R, heights]."""

        def function(given, consumed):
            weights = self._weights(tile, given["weights"])
            return {"products": multiply(tile.stage, given["x"], weights, cfg=self.cfg)}

        width = tile.parts[0].width
        given = {"weights": struct_of(tile), "x": self._struct(size, width)}
        heights = "+".join(map(str, tile.heights.values()))
        label = f"{tile.stage.name} {heights} {size.rows}"
        program = self.get(label, tile.signature, function, (given, {}))
        return Call(program, ("weights", "x"))

    def _function(self, tile, size, wanted: Function, shape=None, landing=0):
        """The `input` or, with a `shape`, the `finish` function of a stage: (products, hosted,
        whole, flow) -> results."""
        hosted = dict(shape.hosted) if shape else {}

        def function(given, consumed):
            flow = given | consumed
            if "rows" in flow:
                flow["rows"] = flow["rows"].replace(flash=self.flash)
            products = dict(given.get("products", {}))
            if hosted:
                found, row_of = given["hosted"]["products"], given["hosted"]["row_of"]
                raw = found.at[row_of].get(mode="fill", fill_value=0)
                of_host = hosted_products(tile.stage, raw, hosted, dtype=self.dtype, cfg=self.cfg)
                for name, part in of_host.items():
                    products[name] = [part, *products.get(name, ())]
            return call(wanted, flow, given.get("whole", {}), products, cfg=self.cfg)

        uses_cache = "cache" in wanted.reads
        given = self._flow(tile, size, [name for name in wanted.reads if name != "cache"])
        if wanted.whole:
            given["whole"] = self._whole(tile, wanted.whole)
        if shape and shape.widths:
            given["products"] = {
                name: [self._struct(size, width) for width in parts] for name, parts in shape.widths
            }
        if hosted:
            given["hosted"] = {
                "products": jax.ShapeDtypeStruct((landing, sum(hosted.values())), "float32"),
                "row_of": jax.ShapeDtypeStruct((size.rows,), "int32"),
            }
        consumed = self._cache(tile, size) if uses_cache else {}
        sees_lanes = uses_cache or "rows" in wanted.reads
        label = f"{wanted.name} {size.rows}" + (f" {size.attends}" if sees_lanes else "")
        label += f" hosted {landing}" if hosted else ""
        key = (tile.kind.name, tile.stage.name, shape)
        program = self.get(label, key, function, (given, consumed))
        return Call(program, tuple(given), wanted.whole, uses_cache, ends_stage=shape is not None)

    def _head(self, tile, size, n_wanted):
        """Some rows of the head: (weights, whole, hidden, wanted [W]) -> float32 logits [W, v] of
        the wanted rows of the chunk."""

        def function(given, consumed):
            weights = self._weights(tile, given["weights"])
            x = self._wanted_input(tile, given)
            (logits,) = multiply(tile.stage, x, weights, cfg=self.cfg).values()
            return {"logits": logits}

        given = {"weights": struct_of(tile)} | self._wanted_given(tile, size, n_wanted)
        label = f"head {sum(tile.heights.values())} {size.rows} wanted {n_wanted}"
        program = self.get(label, tile.signature, function, (given, {}))
        return Call(program, tuple(given), tile.stage.input.whole)

    def _head_input(self, tile, size, n_wanted):
        """(whole, hidden, wanted [W]) -> the head's input x [W, D] of the wanted rows."""

        def function(given, consumed):
            return {"x": self._wanted_input(tile, given)}

        given = self._wanted_given(tile, size, n_wanted)
        label = f"head input {size.rows} wanted {n_wanted}"
        program = self.get(label, (), function, (given, {}))
        return Call(program, tuple(given), tile.stage.input.whole)

    def _wanted_input(self, tile, given):
        """Inside a program: the input of the head, of the wanted rows."""
        flow = {"hidden": given["hidden"].at[given["wanted"]].get(mode="clip")}
        return call(tile.stage.input, flow, given["whole"], cfg=self.cfg)["x"]

    def _wanted_given(self, tile, size, n_wanted):
        given = {"whole": self._whole(tile, tile.stage.input.whole)}
        given |= self._flow(tile, size, ("hidden",))
        return given | {"wanted": jax.ShapeDtypeStruct((n_wanted,), "int32")}

    def _weights(self, tile, put):
        """Inside a program: a tile's weights by leaf, from the arrays that were put."""
        return self._join(tile.parts, _parts_in(put, tile))

    def _join(self, parts, arrays):
        pieces, forms = {}, {}
        for part in parts:
            pieces.setdefault(part.matrix, {})[part.piece] = arrays[part.leaf]
            forms[part.matrix] = part.form
        return {
            name: weight(pieces_of_leaf, encoding=forms[name], block_bytes=self._block_bytes)
            for name, pieces_of_leaf in pieces.items()
        }

    def get(self, label, key, function, args, *, reuses=True):
        """The compiled program of this label and key; compiles are counted by the label alone.

        With two arguments it reuses the memory of the second.
        """
        if (label, key) not in self._compiled:
            with deferred(), self._watch.compiling(label):
                self._compiled[label, key] = self._compile(
                    label, function, args, consumed=(1,) if reuses and len(args) == 2 else ()
                )
        return self._compiled[label, key]

    def _compile(self, label, function, args, *, consumed):
        before = backend_compiles()
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args
        )
        jitted = jax.jit(function, donate_argnums=consumed, out_shardings=sharding)
        program = jitted.lower(*placed).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        self.temporary_bytes = max(self.temporary_bytes, temporary)
        self.compiles[label] = self.compiles.get(label, 0) + backend_compiles() - before
        return program

    def _flow(self, tile, size, names):
        """The shapes of values of the flow, by name."""
        shapes = {
            "hidden": lambda: self._struct(size, self.cfg.hidden_size),
            "x": lambda: self._struct(size, tile.parts[0].width),
            "rows": lambda: size.rows_struct,
        }
        return {name: shapes[name]() for name in names}

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
        struct = cache_struct(tile.kind.cache, self.cfg, n_rows=size.pool, dtype=self.dtype)
        return {"cache": struct}

    def _struct(self, size, width):
        return jax.ShapeDtypeStruct((size.rows, width), self.dtype)


def struct_of(tile: Tile):
    """The shapes of what is put of a tile: arrays by leaf, or one array of bytes if joined."""
    if tile.joined:
        return jax.ShapeDtypeStruct((tile.joined.n_bytes,), "uint8")
    return {part.leaf: jax.ShapeDtypeStruct(part.shape, part.dtype) for part in tile.parts}


def _parts_in(put, tile: Tile) -> dict:
    """Inside a program: a tile's parts by leaf, from the arrays that were put."""
    if not tile.joined:
        return put
    return {
        part.leaf: InBlob(put, offset, part.shape, part.dtype)
        for part, offset in zip(tile.parts, tile.joined.offsets, strict=True)
    }
