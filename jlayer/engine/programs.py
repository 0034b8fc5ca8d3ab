"""Compiles and counts programs: one for each input shape, before the first weight is on the device.

The work at a tile is one Call: a compiled program, with the values that it reads and gives. What
follows one another without a weight in between is in one program, since each call costs time: the
rows of a stage's last tile, the function that ends the stage, and the one that makes the next
stage's input. The programs are made from the family's tables of stages; the input shapes are in
`plan.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp

from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.engine.calls import Call
from jlayer.engine.compiles import Compiler
from jlayer.engine.device import has_flash
from jlayer.engine.division import StageShape
from jlayer.engine.gathering import (
    gathered,
    gathered_in_order,
    gathered_rows,
    in_order_of_hosts,
    own_heads,
)
from jlayer.engine.picking import ADAPTERS, chosen_by, input_reads, picked_input, picks
from jlayer.engine.pool_programs import PoolPrograms
from jlayer.engine.size import Size
from jlayer.families.base import Function, LayerKind
from jlayer.families.registry import final_norm_leaves
from jlayer.model.experts import picked_rows, spread
from jlayer.model.ops import scaled
from jlayer.model.products import Encoded, InBlob, as_array, dequantize, weight
from jlayer.model.stages import block, call, hosted_products, join, multiply
from jlayer.model.together import mix_together
from jlayer.plan.experts import at_once, is_stacked
from jlayer.plan.tiles import Part, Tile
from jlayer.spec import Leaf, ModelConfig, Place, resident_dtype
from jlayer.streaming.devices import Devices
from jlayer.streaming.watch import Watch


class Programs:
    """The compiled programs of one model on its devices; `compiles` counts them by label."""

    def __init__(
        self, cfg: ModelConfig, *, dtype: str, devices: Devices, watch: Watch | None = None
    ):
        self.cfg, self.dtype, self.devices = cfg, dtype, devices
        self._compiler = Compiler(devices, watch or Watch(), of=(cfg, dtype))
        self.pools = PoolPrograms(devices, dtype=dtype, get=self.get)
        # Whether it must be known of each row with which adapter it is computed.
        self.chooses = cfg.additions is not None and cfg.additions.choose
        self._block_bytes, self._gather = BLOCK_BYTES[devices.platform], devices.all_gather

    def calls_at(
        self,
        tile: Tile,
        size: Size,
        *,
        shape: StageShape,
        wanted: int,
        on_host: bool = False,
        landing: int = 0,
        picked: int = 0,
    ) -> tuple[Call, ...]:
        """The calls for a chunk of this size at a tile: one or none; two at the last tile of a
        stage of which the host multiplies some rows, so that the device's rows do not wait for it,
        unless it has none.

        `shape`: of the tile's stage. `wanted`: how many rows the head reads, padding included; 0:
        no call. `on_host`: the host's cores multiply the tile; the head gives its input then.
        `landing`: the rows of what they multiplied, of all chunks. `picked`: at an expert, so many
        rows are multiplied, among them those that chose it; 0: all.
        """
        if tile.is_whole_expert:
            return (self._experts(tile, size, picked),)
        if tile.stage is None:
            return (self._layer(tile, size),)
        if tile.stage.logits:
            head = self.head_input if on_host else self._head
            return (head(tile, size, wanted),) if wanted else ()
        if not tile.ends_stage:
            return () if on_host else (self._rows(tile, size, picked),)
        if not shape.hosted:
            return (self._end(tile, size, shape, picked=picked),)
        end = self._end(tile, size, shape, with_rows=False, landing=landing)
        return (end,) if on_host or tile.uncut else (self._rows(tile, size), end)

    def embed(
        self, parts: list[Part], first: Tile, *, n_rows: int, has_vectors: bool = False
    ) -> Callable:
        """The program {rows of the embedding [R, ...] by leaf, whole leaves of `first`} -> hidden
        [R, D], and the input x of the first stage. `first`: the first tile. `has_vectors`: it gets
        `vectors` [R, D] too, and takes these instead where `is_vector` [R] says so."""
        width, wanted = self.cfg.hidden_size, first.stage and first.stage.input
        scale = self.cfg.embedding_scale

        def function(given):
            (weights,) = self._join(parts, given["rows"]).values()
            if isinstance(weights, Encoded):
                weights = dequantize(weights, width)
            flow = {"hidden": scaled(weights.astype(self.dtype), scale)}
            if has_vectors:
                vectors, instead = given["vectors"], given["is_vector"][:, None]
                vectors = vectors if scale.is_of_table else scaled(vectors, scale)
                flow = {"hidden": jnp.where(instead, vectors, flow["hidden"])}
            if wanted:
                flow |= call(wanted, flow, given.get("whole", {}))
            return flow

        rows = {
            part.leaf: jax.ShapeDtypeStruct((n_rows, part.shape[1]), part.dtype) for part in parts
        }
        given = {"rows": rows}
        given |= self._whole("whole", self._device_leaves(first), wanted.whole if wanted else ())
        if has_vectors:
            given["vectors"] = self._struct(n_rows, width)
            given["is_vector"] = jax.ShapeDtypeStruct((n_rows,), "bool")
        key = (wanted, *(part.form for part in parts))
        label = f"embed {n_rows}{' with vectors' if has_vectors else ''}"
        return self.get(label, key, function, (given,))

    def enter(self, tile, size) -> Call:
        """What makes the input of a layer at its first tile, where nothing before has: of hidden
        states alone. (whole, hidden) -> x, or what else its first stage reads."""
        wanted = tile.stage.input

        def function(given, consumed):
            return call(wanted, given, given.get("whole", {})), ()

        given = self.flow(tile, size, wanted.reads)
        given |= self._whole("whole", self._device_leaves(tile), wanted.whole)
        program = self.get(f"enter {size.rows}", (wanted,), function, (given, {}))
        return Call(program, tuple(wanted.reads), uses_weights=False, whole=wanted.whole)

    def _layer(self, tile, size):
        """A whole layer: (weights, whole, hidden, rows), cache -> (hidden, cache)."""
        whole = tuple(leaf.name for leaf in tile.kind.kept_in(Place.DEVICE))

        def function(given, consumed):
            layer = self.weights(tile, given["weights"]) | given.get("whole", {})
            rows = given["rows"].replace(flash=self.flash(tile.kind))
            hidden, cache = block(tile.kind)(
                *(layer, given["hidden"], consumed["cache"], rows, given.get(ADAPTERS))
            )
            return {"hidden": hidden}, cache

        reads = ("hidden", "rows", *chosen_by(tile.kind.stages))
        given = {"weights": self.devices.struct_of(tile)} | self.flow(tile, size, reads)
        given |= self._whole("whole", self._device_leaves(tile), whole)
        label = f"block {size.rows} {size.attends(tile.kind.cache)}"
        program = self.get(label, tile.signature, function, (given, self._cache(tile, size)))
        return Call(program, reads, whole=whole, uses_cache=True)

    def _experts(self, tile, size, picked):
        """Some experts, each a tile like this one: (weights and numbers of as many as one call
        takes, what a layer's experts look at) -> their sum."""
        n, reads = at_once(tile), ("inputs", "routing", "mixed")
        stacked = is_stacked(tile, self.devices.platform)

        def function(given, consumed):
            pairs = zip(given["weights"], given["experts"], strict=True)
            experts = [(partial(self.weights, tile, put), number) for put, number in pairs]
            flow = {name: given[name] for name in reads}
            how = {"n_rows": size.rows, "picked": picked, "stacked": stacked}
            how["gather"] = partial(gathered_in_order, tile=tile, gather=self._gather)
            return {"mixed": mix_together(tile.kind, flow, experts, **how)}, ()

        given = self.flow(tile, size, reads)
        given["weights"] = [self.devices.struct_of(tile)] * n
        given["experts"] = [jax.ShapeDtypeStruct((), "int32")] * n
        label = f"{n} experts {size.rows}{picks(picked)}"
        return Call(self.get(label, tile.signature, function, (given, {})), reads)

    def _rows(self, tile, size, picked=0):
        """Some rows of a stage's matrices: (x [R, in], weights) -> products [R, heights]."""

        def function(given, consumed):
            weights, x = self.weights(tile, given["weights"]), picked_input(tile, given, picked)
            return {"products": self._multiplied(tile, x, weights, given.get(ADAPTERS))}, ()

        reads = input_reads(tile, picked)
        given = {"weights": self.devices.struct_of(tile)} | self.flow(tile, size, reads, picked)
        label = f"{tile.stage.name} {_heights(tile)} {size.rows}{picks(picked)}"
        program = self.get(label, tile.signature, function, (given, {}))
        return Call(program, tuple(reads))

    def _end(self, tile, size, shape, *, with_rows=True, landing=0, picked=0):
        """The end of a stage, at its last tile: its rows, if it is `with_rows`; `finish`, with the
        products of all tiles and the leaves that are the tile; and the input of the next stage, if
        a function makes it. A `finish` that reads what there is of all rows gets the products of
        picked rows among zeros."""
        stage, following = tile.stage, shape.next_input
        finish, hosted = stage.finish, dict(shape.hosted)
        with_rows = with_rows and bool(tile.heights)
        kept = tuple(name for name in finish.whole if name not in tile.uncut)
        uses_weights = with_rows or bool(tile.uncut)
        by_heads = self.pools.deals_heads(tile.kind)

        def function(given, consumed):
            flow = given | consumed
            if "rows" in flow:
                flow["rows"] = flow["rows"].replace(flash=self.flash(tile.kind))
            products = {name: [*parts] for name, parts in given.get("products", {}).items()}
            for name, part in self._of_host(stage, given.get("hosted"), hosted).items():
                products[name] = [part, *products.get(name, ())]
            weights = self.weights(tile, given["weights"]) if uses_weights else {}
            if with_rows:
                x = picked_input(tile, flow, picked)
                own = self._multiplied(tile, x, weights, flow.get(ADAPTERS))
                for name, part in own.items():
                    products.setdefault(name, []).append(part)
            for name, deal in shape.hosts:
                products[name] = in_order_of_hosts(products[name], deal)
            if picked and finish.reads:
                products = {
                    name: spread(join(parts), picked_rows(flow, picked), size.rows)
                    for name, parts in products.items()
                }
            is_dealt = by_heads and finish.how == tile.kind.attention
            finishes = partial(own_heads, gather=self._gather) if is_dealt else call
            results = finishes(finish, flow, weights | given.get("whole", {}), products)
            if following:
                whole = given.get("next_whole", {})
                results |= call(following, flow | results, whole)
            return results, results.pop("cache", ())

        functions = [each for each in (finish, following) if each]
        reads, next_whole = _reads(functions), tuple(leaf.name for leaf in shape.next_whole)
        own = input_reads(tile, picked) if with_rows else set()
        chunk = self.flow(tile, size, reads - {"cache"} | own, picked)
        chunk |= self._products(tile, size, shape, with_rows, landing, picked)
        given = chunk | ({"weights": self.devices.struct_of(tile)} if uses_weights else {})
        given |= self._whole("whole", self._device_leaves(tile), kept)
        given |= self._whole("next_whole", shape.next_whole, next_whole)
        names = [stage.name, _heights(tile) if with_rows else "end", str(size.rows)]
        names += [each.name for each in functions]
        names += [size.attends(tile.kind.cache)] if reads & {"cache", "rows"} else []
        names += [f"hosted {landing}"] if hosted else []
        names[-1] += picks(picked)
        uses_cache = "cache" in reads
        consumed = self._cache(tile, size) if uses_cache else {}
        key = (tile.signature if uses_weights else (tile.kind.name, stage.name), shape)
        results = (self.devices.everywhere, self.pools.over(tile.kind))
        program = self.get(" ".join(names), key, function, (given, consumed), results=results)
        return Call(
            program,
            tuple(chunk),
            uses_weights=uses_weights,
            whole=kept,
            next_whole=next_whole,
            uses_cache=uses_cache,
            ends_stage=True,
        )

    def _products(self, tile, size, shape, with_rows, landing, picked):
        """The shapes of a stage's products that are there before its last tile, and of those of
        the host."""
        own, found = tile.products() if with_rows else (), {}
        for name, widths in shape.widths:
            if before := widths[:-1] if name in own else widths:
                parts = [self._struct(picked or size.rows, width) for width in before]
                found.setdefault("products", {})[name] = parts
        if shape.hosted:
            width = sum(height for _, height in shape.hosted)
            found["hosted"] = {
                "products": jax.ShapeDtypeStruct((landing, width), "float32"),
                "row_of": jax.ShapeDtypeStruct((size.rows,), "int32"),
            }
        return found

    def _of_host(self, stage, given, heights):
        """Inside a program: the products of the host's cores, by name."""
        if not heights:
            return {}
        raw = given["products"].at[given["row_of"]].get(mode="fill", fill_value=0)
        return hosted_products(stage, raw, heights, dtype=self.dtype)

    def _head(self, tile, size, n_wanted):
        """Some rows of the head: (weights, whole, hidden, wanted [W]) -> float32 logits [W, v] of
        the wanted rows of the chunk."""

        def function(given, consumed):
            weights = self.weights(tile, given["weights"])
            x, adapters = self._wanted_input(tile, given), None
            if ADAPTERS in given:
                adapters = given[ADAPTERS].at[given["wanted"]].get(mode="clip")
            (logits,) = self._multiplied(tile, x, weights, adapters).values()
            return {"logits": logits}, ()

        given = {"weights": self.devices.struct_of(tile)} | self._wanted_given(tile, size, n_wanted)
        reads = chosen_by([tile.stage])
        given |= self.flow(tile, size, reads)
        label = f"head {sum(tile.heights.values())} {size.rows} wanted {n_wanted}"
        program = self.get(label, tile.signature, function, (given, {}))
        return Call(program, ("hidden", "wanted", *reads), whole=tile.stage.input.whole)

    def head_input(self, tile, size, n_wanted):
        """(whole, hidden, wanted [W]) -> the head's input x [W, D] of the wanted rows."""

        def function(given, consumed):
            return {"x": self._wanted_input(tile, given)}, ()

        given = self._wanted_given(tile, size, n_wanted)
        label = f"head input {size.rows} wanted {n_wanted}"
        program = self.get(label, (), function, (given, {}))
        whole = tile.stage.input.whole
        return Call(program, ("hidden", "wanted"), uses_weights=False, whole=whole)

    def _wanted_input(self, tile, given):
        """Inside a program: the input of the head, of the wanted rows."""
        flow = {"hidden": given["hidden"].at[given["wanted"]].get(mode="clip")}
        return call(tile.stage.input, flow, given.get("whole", {}))["x"]

    def _wanted_given(self, tile, size, n_wanted):
        given = self.flow(tile, size, ("hidden",))
        given |= self._whole("whole", self._device_leaves(tile), tile.stage.input.whole)
        return given | {"wanted": jax.ShapeDtypeStruct((n_wanted,), "int32")}

    def weights(self, tile, put):
        """Inside a program: a tile's weights by leaf, from the arrays that were put; those that a
        function reads uncut decoded."""
        found = self._join(tile.parts, _parts_in(put, tile))
        widths = {part.matrix: part.width for part in tile.parts}
        rows = {part.matrix: part.n_rows for part in tile.parts}
        uncut = {
            name: gathered_rows(
                as_array(found[name], widths[name]), tile, name, rows[name], self._gather
            )
            for name in tile.uncut
        }
        return found | uncut

    def _multiplied(self, tile, x, weights, adapters):
        """Inside a program: x [R, in] times the rows of a tile -> products [R, rows] by name."""
        products = multiply(tile.stage, x, weights, adapters)
        return gathered(products, tile.stage, tile, self._gather)

    def _join(self, parts, arrays):
        pieces, forms = {}, {}
        for part in parts:
            pieces.setdefault(part.matrix, {})[part.piece] = arrays[part.leaf]
            forms[part.matrix] = part.form
        return {
            name: weight(pieces_of_leaf, form=forms[name], block_bytes=self._block_bytes)
            for name, pieces_of_leaf in pieces.items()
        }

    def get(self, label, key, function, args, *, reuses=True, results=None):
        """The compiled program of this label and key; compiles are counted by the label alone.

        With two arguments it reuses the memory of the second. See `Compiler.get`.
        """
        return self._compiler.get(label, key, function, args, reuses=reuses, results=results)

    def flash(self, kind: LayerKind) -> bool:
        """Whether the device has flash attention for layers of this kind."""
        attention = kind.attention
        if attention is None or not attention.is_plain:
            return False
        return has_flash(self.devices.first, head_dim=attention.head_dim, dtype=self.dtype)

    @contextmanager
    def together(self):
        """Inside the `with` programs that are asked for are only begun to be compiled, several at a
        time; after it they are there."""
        with self._compiler.together():
            yield

    @property
    def compiles(self) -> dict[str, int]:
        return self._compiler.compiles

    @property
    def temporary_bytes(self) -> int:
        """Of the program with the most so far, as XLA reports."""
        return self._compiler.temporary_bytes

    def flow(self, tile, size, names, picked=0):
        """The shapes of values of the flow, by name."""
        width, experts = self.cfg.hidden_size, self.cfg.experts
        shapes = {
            "hidden": lambda: self._struct(size.rows, width),
            "x": lambda: self._struct(picked or size.rows, tile.parts[0].width),
            "rows": lambda: size.rows_struct,
            ADAPTERS: lambda: jax.ShapeDtypeStruct((size.rows,), "int32"),
            "latent": lambda: self._struct(size.rows, tile.kind.latent.entry),
            "inputs": lambda: self._struct(size.rows, width),
            "routing": lambda: _float32(size, experts.router.n_experts),
            "mixed": lambda: _float32(size, width),
            "expert": lambda: jax.ShapeDtypeStruct((), "int32"),
        }
        return {name: shapes[name]() for name in names}

    def _whole(self, key, leaves, names):
        """Under this key, if any are named, the shapes of leaves that are used uncut, by name."""
        of_name = {leaf.name: leaf for leaf in leaves}
        found = {
            name: jax.ShapeDtypeStruct(
                of_name[name].shape(self.cfg), resident_dtype(of_name[name], self.dtype)
            )
            for name in names
        }
        return {key: found} if found else {}

    def _device_leaves(self, tile) -> tuple[Leaf, ...]:
        if tile.kind is None:
            return final_norm_leaves(self.cfg)
        return tile.kind.kept_in(Place.DEVICE)

    def _cache(self, tile, size):
        return {"cache": self.pools.struct(tile.kind, size.pool_of(tile.kind.cache))}

    def _struct(self, n_rows, width):
        return jax.ShapeDtypeStruct((n_rows, width), self.dtype)


def _float32(size, width):
    return jax.ShapeDtypeStruct((size.rows, width), "float32")


def _heights(tile):
    """The heights of a tile's matrices, for a label."""
    return "+".join(map(str, tile.heights.values()))


def _reads(functions: Sequence[Function]) -> set[str]:
    """What these functions, one after another, read that none of them gives."""
    reads, given = set(), set()
    for function in functions:
        reads |= set(function.reads) - given
        given |= set(function.gives)
    return reads


def _parts_in(put, tile: Tile) -> dict:
    """Inside a program: what a device has of a tile's parts by leaf, from what was put there."""
    if not tile.joined:
        return put
    return {
        part.leaf: InBlob(put, offset, part.shape, part.dtype)
        for part, offset in zip(tile.share.parts, tile.joined.offsets, strict=True)
    }
