"""The compiled programs of a step: each is for one chunk of rows at one tile, or between two units.

A chunk is some lanes of one length; all chunks have the same shapes, so a program is compiled once
for all layers of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.engine.programs import Programs
from jlayer.families.base import LayerKind, bias_name
from jlayer.families.registry import head_input, head_leaf
from jlayer.model.backward import (
    HeadSums,
    LowRank,
    Noise,
    add_head_rows,
    loss_back,
    losses_of,
    multiply,
    no_head_sums,
)
from jlayer.model.cache import empty_cache
from jlayer.model.experts import stage_input
from jlayer.model.stages import call, join
from jlayer.plan.tiles import Tile
from jlayer.spec import ModelConfig
from jlayer.tuning.flat import Row
from jlayer.tuning.units import OF_AN_EXPERT, Unit, units_of
from jlayer.tuning.visits import Visit


class TunePrograms:
    """Makes each program when it is first called. `programs`: of the model, which decode what is
    put of a tile, and count what is compiled. `dropout`: of what the adapters multiply."""

    def __init__(self, cfg: ModelConfig, programs: Programs, *, dropout: float = 0.0):
        self._cfg, self._programs, self._dropout = cfg, programs, dropout
        self._dtype, self._ready = programs.dtype, {}
        self._numbers: dict[int, int] = {}
        self._of_signature: dict[tuple, int] = {}
        self._tiles: list[Tile] = []
        self._firsts: dict[int, jax.Array] = {}

    def begin(self, kind: LayerKind, whole: Mapping, hidden):
        """hidden [R, D] -> x [R, D], the input of a layer's first unit."""

        def function(given):
            return self._begin(kind, given["whole"], given["hidden"])

        return self._run(("begin", kind.name), function, {"whole": whole, "hidden": hidden})

    def begin_back(self, kind: LayerKind, whole: Mapping, hidden, dx, dhidden):
        """The gradient of a layer's input [R, D], from that of its first unit's input, float32, and
        what passes by it."""

        def function(given):
            _, back = jax.vjp(lambda x: self._begin(kind, given["whole"], x), given["hidden"])
            (found,) = back(given["dx"].astype(self._dtype))
            return found + given["dhidden"]

        given = {"whole": whole, "hidden": hidden, "dx": dx, "dhidden": dhidden}
        return self._run(("begin back", kind.name), function, given)

    def _begin(self, kind, whole, hidden):
        first = units_of(kind)[0].stage.input
        return call(first, {"hidden": hidden}, whole)["x"]

    def rows(self, visit: Visit, x, weights, low_ranks: Mapping, noises: Mapping) -> dict:
        """x [R, in] times the rows of a tile -> products by name. `low_ranks`: by matrix A and
        the whole of B."""

        def function(given):
            return self._multiplied(visit, given, given["x"].astype(jnp.float32), given["low"])

        given = self._given(visit, x, weights, low_ranks, noises)
        return self._run(self._key("rows", visit, low_ranks, noises), function, given)

    def rows_back(self, visit: Visit, x, weights, low_ranks, noises, dy: Mapping, sums: dict):
        """Adds what a tile's rows give: `dy` by product -> `sums`: "dx" float32 [R, in], and
        "low" by matrix the gradients of A and B -> (the new sums, something to wait for). x None:
        nothing needs it."""

        def function(given, sums):
            x, low_ranks = given["x"], given["low"]
            if x is None:
                x = jnp.zeros(sums["dx"].shape, self._dtype)

            def multiplied(x, low_ranks):
                return self._multiplied(visit, given, x, low_ranks)

            _, back = jax.vjp(multiplied, x.astype(jnp.float32), low_ranks)
            dx, low = back(given["dy"])
            return {
                "dx": sums["dx"] + dx,
                "low": jax.tree.map(jnp.add, sums["low"], low),
            }

        given = self._given(visit, x, weights, low_ranks, noises) | {"dy": dy}
        key = (*self._key("rows back", visit, low_ranks, noises), x is None)
        return self._added(key, function, given, sums)

    def _given(self, visit, x, weights, low_ranks, noises):
        own = [name for name, _ in visit.offsets if name in low_ranks]
        return {
            "x": x,
            "weights": weights,
            "low": {name: low_ranks[name] for name in own},
            "firsts": {name: self._first(first) for name, first in visit.offsets if name in own},
            "noise": {name: noises[name] for name in own if name in noises},
        }

    def _multiplied(self, visit, given, x, low_ranks):
        """The products of a tile's rows; of each B in `low_ranks` the same rows are taken."""
        tile, heights = visit.tile, visit.tile.heights
        own = {
            name: low.replace(
                b=jax.lax.dynamic_slice_in_dim(low.b, given["firsts"][name], heights[name])
            )
            for name, low in low_ranks.items()
        }
        weights = self._programs.weights(tile, given["weights"])
        return multiply(tile.stage, x, weights, own, given["noise"], self._dtype)

    def end(self, visit: Visit, unit: Unit, whole, weights, rows, products: dict, flow: dict):
        """What a unit's functions give of its products, as lists of the parts of ranges, and of the
        flow before it. `weights`: of a tile that a function reads uncut; else None."""

        def function(given):
            return self._ended(visit, unit, given["rows"], self._uncut(visit, given))(
                given["products"], given["flow"]
            )

        own = {name: flow[name] for name in unit.reads}
        given = {"whole": whole, "weights": weights, "rows": rows, "products": products}
        key = ("end", *self._unit_key(visit, weights), _shape_key(products))
        return self._run(key, function, given | {"flow": own})

    def end_back(self, visit, unit, whole, weights, rows, products, flow, given_back: dict):
        """The gradients of a unit's products, part by part, and of the flow that its functions
        read, from those of what they give. `products`: arrays, or shapes where nothing needs their
        numbers; the same of `flow`."""
        is_known = not unit.is_linear

        def function(given):
            of = self._ended(visit, unit, given["rows"], self._uncut(visit, given))
            if is_known:
                primals = given["products"], given["flow"]
            else:
                primals = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (products, flow))
            results, back = jax.vjp(of, *primals)
            back_of = {
                name: given["back"][name].astype(array.dtype)
                if name in given["back"]
                else jnp.zeros_like(array)
                for name, array in results.items()
            }
            return back(back_of)

        given = {"whole": whole, "weights": weights, "rows": rows, "back": given_back}
        given |= {"products": products, "flow": flow} if is_known else {}
        key = ("end back", *self._unit_key(visit, weights), _shape_key(products))
        return self._run((*key, tuple(sorted(given_back))), function, given)

    def _uncut(self, visit, given):
        """The leaves that a unit's functions read uncut."""
        uncut = self._programs.weights(visit.tile, given["weights"]) if given["weights"] else {}
        return given["whole"] | uncut

    def _ended(self, visit, unit, rows, whole):
        kind: LayerKind = visit.tile.kind

        def ended(products, flow):
            flow = dict(flow)
            flow |= {"rows": rows, "cache": empty_cache(kind.cache, n_rows=1, dtype=self._dtype)}
            joined = {name: join(parts) for name, parts in products.items()}
            for function in unit.functions:
                flow |= call(function, flow, whole, joined)
                joined = {}
            return {name: flow[name] for name in unit.gives}

        return ended

    def expert(self, visit: Visit, unit: Unit, weights, number, flow: Mapping):
        """(`mixed` with what an expert adds, float32 [R, D], something to wait for)."""

        def function(given, mixed):
            added = self._expert(visit, unit, given)
            return mixed + added(given["inputs"].astype(jnp.float32), given["routing"])

        given = {name: flow[name] for name in OF_AN_EXPERT if name != "mixed"}
        given |= {"weights": weights, "number": number}
        key = ("expert", self._number(visit.tile))
        return self._added(key, function, given, flow["mixed"])

    def expert_back(self, visit: Visit, unit: Unit, weights, number, flow, dmixed, sums: dict):
        """Adds what an expert gives to the gradients of `inputs` and `routing`, both float32 ->
        (the new sums, something to wait for)."""

        def function(given, sums):
            added = self._expert(visit, unit, given)
            primals = given["inputs"].astype(jnp.float32), given["routing"]
            _, back = jax.vjp(added, *primals)
            found = back(given["dmixed"])
            return jax.tree.map(jnp.add, sums, dict(zip(("inputs", "routing"), found, strict=True)))

        given = {name: flow[name] for name in ("inputs", "routing")}
        given |= {"weights": weights, "number": number, "dmixed": dmixed}
        return self._added(("expert back", self._number(visit.tile)), function, given, sums)

    def _expert(self, visit, unit, given):
        weights = self._programs.weights(visit.tile, given["weights"])

        def added(inputs, routing):
            mixed = jnp.zeros(inputs.shape, jnp.float32)
            flow = {"inputs": inputs, "routing": routing, "mixed": mixed, "expert": given["number"]}
            for stage in unit.stages:
                x = stage_input(stage, flow).astype(jnp.float32)
                products = multiply(stage, x, weights, {}, {}, self._dtype)
                flow |= call(stage.finish, flow, {}, products)
            return flow["mixed"]

        return added

    def head_begin(self, whole, hidden):
        """hidden [R, D] -> the head's input x [R, D], and the sums before the first rows of it."""

        def function(given):
            x = call(head_input(self._cfg), {"hidden": given["hidden"]}, given["whole"])["x"]
            return x, no_head_sums(*x.shape)

        return self._run(("head begin",), function, {"whole": whole, "hidden": hidden})

    def head_rows(self, visit: Visit, x, weights, targets, sums: HeadSums):
        """(The sums with some rows of the head, something to wait for); targets int32 [R]."""
        leaf = head_leaf(self._cfg).name

        def function(given, sums):
            found = self._programs.weights(visit.tile, given["weights"])
            own = found[leaf], found.get(bias_name(leaf))
            first, how = given["first"], self._cfg.logits
            return add_head_rows(sums, given["x"], *own, given["targets"], first, how=how)

        ((_, first),) = visit.offsets
        given = {"x": x, "weights": weights, "targets": targets, "first": self._first(first)}
        return self._added(("head rows", self._number(visit.tile)), function, given, sums)

    def head_end(self, whole, hidden, sums: HeadSums, weights):
        """(the losses of the rows float32 [R], the gradient of sum(weights * losses) by hidden
        [R, D]); weights [R]."""

        def function(given):
            def normal(hidden):
                return call(head_input(self._cfg), {"hidden": hidden}, given["whole"])["x"]

            _, back = jax.vjp(normal, given["hidden"])
            dx = loss_back(given["sums"], given["weights"])
            (dhidden,) = back(dx.astype(self._dtype))
            return losses_of(given["sums"]), dhidden

        given = {"whole": whole, "hidden": hidden, "sums": sums, "weights": weights}
        return self._run(("head end",), function, given)

    def apart(self, rows: Sequence[Row], vector) -> dict[str, LowRank]:
        """The adapters of a layer by leaf, from their vector."""

        def function(vector):
            found, at = {}, 0
            for row in rows:
                sides = {}
                for side, shape in row.sides:
                    size = math.prod(shape)
                    sides[side] = vector[at : at + size].reshape(shape)
                    at += size
                found[row.leaf] = LowRank(**sides, scale=row.scale)
            return found

        return self._run(("apart", _shapes_of(rows)), function, vector)

    def joined(self, rows: Sequence[Row], low_ranks: Mapping[str, LowRank]):
        """The vector of a layer's adapters, or of their gradients."""

        def function(given):
            parts = [getattr(given[row.leaf], side) for row in rows for side, _ in row.sides]
            return jnp.concatenate([part.ravel() for part in parts])

        return self._run(("joined", _shapes_of(rows)), function, dict(low_ranks))

    def zeros(self, like):
        """Zeros of the shapes and dtypes of a tree."""
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(like))
        key = ("zeros", jax.tree.structure(like), shapes)
        if key not in self._ready:
            structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)

            def function():
                return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structs)

            self._ready[key] = self._programs.get("tune zeros", key, function, ())
        return self._ready[key]()

    def _first(self, row):
        """The number of a row, on the device."""
        if row not in self._firsts:
            self._firsts[row] = self._programs.devices.put(np.asarray(row, np.int32))
        return self._firsts[row]

    def sum(self, one, other):
        """Of two gradients of the same; in float32 if one of them is."""
        key = ("sum", one.shape, one.dtype, other.dtype)
        return self._run(key, lambda given: given[0] + given[1], (one, other))

    def noises(self, keys: Mapping) -> dict:
        """Of each matrix the noise of its adapter's inputs; {} without dropout."""
        if not self._dropout:
            return {}
        return {name: Noise(key, self._dropout) for name, key in keys.items()}

    def _number(self, tile):
        """One number for all tiles of a shape: their signatures are long, and there is a call for
        each at every step."""
        if id(tile) not in self._numbers:
            self._tiles.append(tile)  # so that its id stays its own
            number = self._of_signature.setdefault(tile.signature, len(self._of_signature))
            self._numbers[id(tile)] = number
        return self._numbers[id(tile)]

    def _key(self, label, visit, low_ranks, noises):
        own = [(name, low_ranks[name]) for name, _ in visit.offsets if name in low_ranks]
        forms = tuple((name, low.a.shape[0], low.scale) for name, low in own)
        return label, self._number(visit.tile), forms, bool(noises)

    def _unit_key(self, visit, weights):
        tile = visit.tile
        return tile.kind.name, visit.unit, self._number(tile) if weights else None

    def _added(self, key, function, given, sums):
        """What a function makes of `sums`, in their memory; and a number that is there when they
        are. The sums themselves cannot be waited for: the next program has their memory."""

        def adds(given, sums):
            found = function(given, sums)
            return found, jax.tree.leaves(found)[0].ravel()[0]

        return self._run(key, adds, given, sums)

    def _run(self, key, function, *args):
        if key not in self._ready:
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
            label = f"tune {key[0]}"
            self._ready[key] = self._programs.get(label, key, function, shapes)
        return self._ready[key](*args)


def _shapes_of(rows):
    return tuple((row.leaf, row.scale, row.a, row.b) for row in rows)


def _shape_key(products):
    return tuple((name, tuple(part.shape for part in parts)) for name, parts in products.items())
