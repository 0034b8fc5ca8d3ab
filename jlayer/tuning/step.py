"""A step: chunks of rows go forward through all tiles, over the head, and back to the lowest layer
that has an adapter. Frozen weights stream as in a run; of a layer's numbers only its input is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import jax
import numpy as np

from jlayer.engine.programs import Programs
from jlayer.engine.residents import Residents
from jlayer.model.backward import LowRank
from jlayer.model.cache import Rows
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor
from jlayer.tuning.flat import Flats, Layout
from jlayer.tuning.kept import Down, Inputs
from jlayer.tuning.programs import TunePrograms
from jlayer.tuning.units import again, units_of
from jlayer.tuning.visits import Visit, Way

AS_MANY_ROWS = 8  # of a forward pass: a visit may take as long, with its gradients in float32


@dataclass(frozen=True)
class ChunkRows:
    """Some lanes, all of one length. `ids`, `targets`: int32 [R]; `weights`: float32 [R], by how
    much the loss of each row counts; `rows`: what a mixer knows of them."""

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: Rows


@dataclass(frozen=True)
class Found:
    """What a step gives. `losses`: float32 [R] of each chunk, of every row; `gradients`: of the sum
    of weighted losses by the adapters, as vectors; {} where none were asked for."""

    losses: list[np.ndarray]
    gradients: dict[int, np.ndarray]


@dataclass
class _Chunk:
    """A chunk on its way. `flow`: as in a run. On the way back: of each unit what its gradients
    need (`kept`) and its products; `back`: the gradients of the flow, `dy` those of the products of
    the present unit, part by part, `dx` that of what they multiply."""

    rows: Rows
    targets: jax.Array
    weights: jax.Array
    flow: dict
    kept: dict[int, dict] = field(default_factory=dict)
    products: dict[int, dict] = field(default_factory=dict)
    back: dict = field(default_factory=dict)
    dy: dict = field(default_factory=dict)
    dx: jax.Array | None = None
    head: tuple | None = None
    losses: jax.Array | None = None
    keys: dict = field(default_factory=dict)  # leaf -> what its dropout follows from, in this layer


class Stepper:
    """Takes chunks through the visits of a step. `layout`: of the adapters that are trained;
    `dropout`: of what they multiply."""

    def __init__(
        self,
        programs: Programs,
        embedding: Embedding,
        residents: Residents,
        visits: Sequence[Visit],
        layout: Layout,
        *,
        dropout: float = 0.0,
    ):
        self.visits, self.layout, self.residents = visits, layout, residents
        self.trained = {
            layer: frozenset(row.leaf for row in rows) for layer, rows in layout.layers.items()
        }
        self.devices, self.dtype = programs.devices, programs.dtype
        self.of = TunePrograms(programs.cfg, programs, dropout=dropout)
        self._programs, self._embedding = programs, embedding
        # (layer, unit) -> the shapes of its products and of what its functions read. Layers of a
        # kind may be cut in other ways, where their matrices are in other encodings.
        self.shapes: dict[tuple, tuple] = {}
        ways = [visit.way for visit in visits]
        self._n_forward = sum(way in (Way.FORWARD, Way.HEAD) for way in ways)  # the first ones
        self._numbers: dict[int, jax.Array] = {}  # of experts, on the device
        self.down = Down()
        self._ahead: dict[bytes, Future] = {}  # ids of a chunk -> its rows of the embedding

    def run(
        self,
        executor: Executor,
        chunks: Sequence[ChunkRows],
        flats: Flats,
        *,
        following: Sequence[ChunkRows] = (),
        trains: bool = True,
        noise: Sequence[int] = (),
        check: Callable[[], None] = lambda: None,
    ) -> Found:
        """One step, with the adapters in some vectors.

        `following`: the chunks of the next step, whose rows of the embedding are read meanwhile.
        `trains`: whether gradients are computed; else the way forward is all. `noise`: numbers
        that dropout follows from; without them nothing is dropped. `check`: called at every tile;
        what it raises ends the step.
        """
        on_way = _OnWay(self, flats, chunks, noise=noise, trains=trains)
        visits = iter(self.visits)

        def run(tile, arrays):
            check()
            visit = next(visits)
            assert visit.tile.name == tile.name, "runs come in the order of visits"
            if visit.way is Way.HEAD and visit.is_first:
                self._read_ahead(following)
            return on_way.take(visit, arrays)

        n_rows = AS_MANY_ROWS * sum(len(one.ids) for one in chunks)
        executor.sweep(run, n_tiles=None if trains else self._n_forward, n_rows=n_rows)
        return on_way.end()

    def _read_ahead(self, chunks):
        self._ahead = {one.ids.tobytes(): self.down.call(self._rows_of, one.ids) for one in chunks}

    def _rows_of(self, ids):
        """The rows of the embedding of ids [R], by leaf."""
        unique, place = np.unique(ids, return_inverse=True)
        return {leaf: some[place] for leaf, some in self._embedding.read(unique).items()}

    def embed(self, ids):
        """ids [R] -> hidden [R, D] on the device."""
        ahead = self._ahead.pop(ids.tobytes(), None)
        rows = self._rows_of(ids) if ahead is None else ahead.result()
        first = self.visits[0].tile
        program = self._programs.embed(self._embedding.parts, first, n_rows=len(ids))
        given = {"rows": self.devices.put(rows)}
        wanted = first.stage and first.stage.input
        if wanted and wanted.whole:
            leaves = self.residents.of(first.layer)
            given["whole"] = {name: leaves[name] for name in wanted.whole}
        return program(given)["hidden"]

    def close(self) -> None:
        """Ends the thread that brings arrays down."""
        self.down.close()

    def number(self, expert: int):
        """The number of an expert on the device."""
        if expert not in self._numbers:
            self._numbers[expert] = self.devices.put(np.asarray(expert, np.int32))
        return self._numbers[expert]


class _OnWay:
    """A step that is under way."""

    def __init__(self, stepper, flats, chunks, *, noise, trains):
        self._on, self._of, self._flats = stepper, stepper.of, flats
        self._noise, self._trains = noise, trains
        put = stepper.devices.put
        self._inputs = Inputs(put, stepper.down, has_link=stepper.devices.has_link)
        self._lows: dict[int, dict[str, LowRank]] = {}  # layer -> its adapters on the device
        self._gradients: dict[str, LowRank] = {}  # of the present layer, by leaf
        self._sent: dict[int, Future] = {}  # layer -> its gradients, on their way
        layers = [visit.tile.layer for visit in stepper.visits if visit.way is Way.FORWARD]
        self._last = max(layers)
        self._chunks = [
            _Chunk(
                rows=jax.tree.map(put, one.rows),
                targets=put(one.targets),
                weights=put(one.weights),
                flow={"hidden": stepper.embed(one.ids)},
            )
            for one in chunks
        ]

    def end(self) -> Found:
        losses = [np.asarray(chunk.losses) for chunk in self._chunks]
        return Found(losses, {layer: sent.result() for layer, sent in self._sent.items()})

    def take(self, visit: Visit, arrays):
        """Moves every chunk through a visit -> something to wait for."""
        if visit.way is Way.HEAD:
            return self._head(visit, arrays)
        if visit.way is Way.FORWARD:
            return self._forward(visit, arrays)
        return self._again(visit, arrays) if visit.way is Way.AGAIN else self._back(visit, arrays)

    # Forward.

    def _forward(self, visit, arrays):
        layer, tile = visit.tile.layer, visit.tile
        if visit.begins_layer:
            if self._trains and layer >= min(self._on.trained):
                self._inputs.keep(layer, [chunk.flow["hidden"] for chunk in self._chunks])
            self._begin_layer(layer, tile.kind, following=layer + 1)
        found = self._multiply(visit, arrays)
        if visit.ends_layer:
            for chunk in self._chunks:
                chunk.flow = {"hidden": chunk.flow["hidden"]}
            self._lows.pop(layer, None)
        return found

    def _begin_layer(self, layer, kind, *, following):
        """`following`: the layer that comes next."""
        for one in (layer, following):
            if one in self._on.trained and one not in self._lows:
                self._lows[one] = self._put_adapters(one)
        whole = self._on.residents.of(layer)
        names = units_of(kind)[0].stage.input.whole
        for number, chunk in enumerate(self._chunks):
            given = {name: whole[name] for name in names}
            chunk.flow["x"] = self._of.begin(kind, given, chunk.flow["hidden"])
            chunk.keys = self._keys(number, layer)

    def _put_adapters(self, layer):
        vector = self._on.devices.put(self._flats[layer])
        return self._of.apart(self._on.layout.layers[layer], vector)

    def _keys(self, number, layer):
        """What the dropout of each adapter of a layer follows from, in one chunk."""
        if not self._noise:
            return {}
        return {
            leaf: self._on.devices.put(
                np.random.SeedSequence([*self._noise, number, layer, index]).generate_state(2)
            )
            for index, leaf in enumerate(row.leaf for row in self._on.layout.layers.get(layer, ()))
        }

    def _multiply(self, visit, arrays):
        """A tile's products, or an expert's sum; at the unit's last tile what follows them."""
        tile, unit = visit.tile, units_of(visit.tile.kind)[visit.unit]
        lows, found = self._lows.get(tile.layer, {}), []
        for chunk in self._chunks:
            if unit.of_experts:
                number = self._on.number(tile.expert)
                mixed, done = self._of.expert(visit, unit, arrays, number, chunk.flow)
                chunk.flow["mixed"] = mixed
                found.append(done)
                continue
            if tile.heights:
                own = self._of.rows(visit, chunk.flow[unit.source], arrays, lows, self._drop(chunk))
                for name, part in own.items():
                    chunk.products.setdefault(visit.unit, {}).setdefault(name, []).append(part)
                    found.append(part)
            if visit.is_last:
                given = self._end(visit, unit, arrays, chunk)
                # The next expert takes the memory of that sum: it is not waited for.
                found += [array for name, array in given.items() if name != "mixed"]
        return found

    def _drop(self, chunk):
        return self._of.noises(chunk.keys)

    def _end(self, visit, unit, arrays, chunk):
        products = chunk.products.get(visit.unit, {})
        key = (visit.tile.layer, visit.unit)
        if key not in self._on.shapes:
            reads = {name: chunk.flow[name] for name in unit.reads}
            self._on.shapes[key] = jax.tree.map(_shape, (products, reads))
        given = self._whole(visit, unit), _uncut(visit, arrays), chunk.rows, products, chunk.flow
        found = self._of.end(visit, unit, *given)
        if visit.way is Way.FORWARD:
            chunk.products.pop(visit.unit, None)
        chunk.flow.pop("x", None)
        chunk.flow |= found
        return found

    def _whole(self, visit, unit):
        whole = self._on.residents.of(visit.tile.layer)
        names = [name for function in unit.functions for name in function.whole]
        return {name: whole[name] for name in names if name in whole}

    # The head.

    def _head(self, visit, arrays):
        whole, found = self._on.residents.of(None), []
        if visit.is_first and self._trains:
            self._inputs.fetch(self._last)
        for chunk in self._chunks:
            hidden = chunk.flow["hidden"]
            if visit.is_first:
                chunk.head = self._of.head_begin(whole, hidden)
            x, sums = chunk.head
            sums, done = self._of.head_rows(visit, x, arrays, chunk.targets, sums)
            chunk.head = x, sums
            found.append(done)
            if visit.is_last:
                chunk.losses, dhidden = self._of.head_end(whole, hidden, sums, chunk.weights)
                chunk.back, chunk.flow, chunk.head = {"hidden": dhidden}, {}, None
        return found

    # Back.

    def _again(self, visit, arrays):
        layer, kind = visit.tile.layer, visit.tile.kind
        if visit.begins_layer:
            self._return_to(layer, kind)
        found = self._multiply(visit, arrays)
        if visit.is_last:
            self._keep(layer, kind, visit.unit + 1)
        return found

    def _return_to(self, layer, kind):
        """Begins the way back through a layer."""
        for chunk, hidden in zip(self._chunks, self._inputs.take(layer), strict=True):
            chunk.flow, chunk.kept, chunk.products = {"hidden": hidden}, {}, {}
            chunk.kept[-1] = {"hidden": hidden}
        self._begin_layer(layer, kind, following=layer - 1)
        self._keep(layer, kind, 0)
        if layer - 1 >= min(self._on.trained):
            self._inputs.fetch(layer - 1)
        self._gradients = self._of.zeros(self._lows.get(layer, {}))

    def _needs(self, layer, kind):
        return again(kind, self._on.trained.get(layer, frozenset()))

    def _keep(self, layer, kind, unit):
        """Keeps what a unit's gradients need of the flow before it, and nothing more of the unit
        before that than they need."""
        needs = self._needs(layer, kind)
        for chunk in self._chunks:
            for later in range(unit, len(needs.kept)):
                names = [name for name in needs.kept[later] if name in chunk.flow]
                chunk.kept.setdefault(later, {}).update({n: chunk.flow[n] for n in names})
                if needs.multiplied[later]:
                    break  # the flow after it is not this one
            if unit and not needs.keeps_products[unit - 1]:
                chunk.products.pop(unit - 1, None)

    def _back(self, visit, arrays):
        layer, kind = visit.tile.layer, visit.tile.kind
        unit, found = units_of(kind)[visit.unit], []
        if unit.of_experts:
            return self._expert_back(visit, unit, arrays)
        for chunk in self._chunks:
            if visit.is_first:
                found += self._end_back(visit, unit, arrays, chunk)
            if visit.tile.heights:
                found.append(self._rows_back(visit, unit, arrays, chunk))
            if visit.is_last:
                self._leave_unit(visit, unit, chunk)
        if visit.ends_layer:
            found += self._leave_layer(layer, kind)
        return found

    def _end_back(self, visit, unit, arrays, chunk):
        """The gradients of a unit's products, and of the flow before it."""
        products, reads = self._on.shapes[visit.tile.layer, visit.unit]
        if not unit.is_linear:
            kept = chunk.kept[visit.unit]
            products = chunk.products.pop(visit.unit, {})
            reads = {name: kept[name] for name in unit.reads}
        back = {name: chunk.back[name] for name in unit.gives if name in chunk.back}
        given = self._whole(visit, unit), _uncut(visit, arrays), chunk.rows, products, reads, back
        chunk.dy, of_reads = self._of.end_back(visit, unit, *given)
        chunk.back = {name: d for name, d in chunk.back.items() if name not in unit.gives}
        for name, gradient in of_reads.items():
            self._add_back(chunk, name, gradient)
        chunk.dx = None
        return jax.tree.leaves((chunk.dy, of_reads))

    def _add_back(self, chunk, name, gradient):
        before = chunk.back.get(name)
        chunk.back[name] = gradient if before is None else self._of.sum(before, gradient)

    def _rows_back(self, visit, unit, arrays, chunk):
        tile, layer = visit.tile, visit.tile.layer
        lows = self._lows.get(layer, {})
        names = tuple(dict(visit.offsets))
        own = {name: lows[name] for name in names if name in lows}
        low = {name: self._gradients[name] for name in own}
        dy = {name: chunk.dy[name].pop() for name in tile.products()}
        if chunk.dx is None:
            rows, width = chunk.weights.shape[0], tile.parts[0].width
            chunk.dx = self._of.zeros(jax.ShapeDtypeStruct((rows, width), "float32"))
        x = chunk.kept[visit.unit].get(unit.source)
        sums = {"dx": chunk.dx, "low": low}
        sums, done = self._of.rows_back(visit, x, arrays, own, self._drop(chunk), dy, sums)
        chunk.dx = sums["dx"]
        self._gradients |= sums["low"]
        return done

    def _leave_unit(self, visit, unit, chunk):
        if chunk.dx is not None:
            self._add_back(chunk, unit.source, chunk.dx)
        chunk.dx, chunk.dy = None, {}
        chunk.kept.pop(visit.unit, None)

    def _expert_back(self, visit, unit, arrays):
        number, found = self._on.number(visit.tile.expert), []
        for chunk in self._chunks:
            kept = chunk.kept[visit.unit]
            sums = {}
            for name in ("inputs", "routing"):
                before = chunk.back.pop(name, None)
                shape = jax.ShapeDtypeStruct(kept[name].shape, "float32")
                sums[name] = self._of.zeros(shape) if before is None else before
            dmixed = chunk.back["mixed"]
            sums, done = self._of.expert_back(visit, unit, arrays, number, kept, dmixed, sums)
            chunk.back |= sums
            found.append(done)
        return found

    def _leave_layer(self, layer, kind):
        whole = self._on.residents.of(layer)
        names = units_of(kind)[0].stage.input.whole
        given = {name: whole[name] for name in names}
        for chunk in self._chunks:
            hidden, dx = chunk.kept[-1]["hidden"], chunk.back.pop("x")
            dhidden = chunk.back["hidden"]
            chunk.back = {"hidden": self._of.begin_back(kind, given, hidden, dx, dhidden)}
            chunk.flow, chunk.kept, chunk.products = {}, {}, {}
        if self._gradients:
            rows = self._on.layout.layers[layer]
            self._sent[layer] = self._on.down.send(self._of.joined(rows, self._gradients))
        self._gradients = {}
        self._lows.pop(layer, None)
        return [chunk.back["hidden"] for chunk in self._chunks]


def _shape(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _uncut(visit, arrays):
    """The arrays of a tile that is read uncut; None of others."""
    return arrays if visit.tile.uncut else None
