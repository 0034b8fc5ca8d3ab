"""One forward pass: moves chunks of rows through every tile, and brings logits to the host.

Which rows these are, and what follows from their logits, is for others to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np

from jlayer.engine.batch import Part
from jlayer.engine.caches import Caches
from jlayer.engine.hosting import Host, HostedStage, hosted_heights, landing_rows
from jlayer.engine.outgoing import Outgoing
from jlayer.engine.programs import Programs, StageShape
from jlayer.engine.residents import Residents
from jlayer.errors import CheckpointError
from jlayer.plan.tiles import Tile
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor

# `take(logits [W, v], places [W], first vocabulary row)`: places among the wanted rows of the pass.
Take = Callable[[np.ndarray, np.ndarray, int], None]


@dataclass
class Chunk:
    """Some rows between two tiles.

    `flow`: the values that stages pass on (hidden [R, D], rows, a stage's input x). `products`:
    those of the current stage, by name, as lists of the parts of row ranges. `row_of`: [R], which
    row of what the host multiplied is whose.
    """

    part: Part
    flow: dict
    wanted: jax.Array
    row_of: jax.Array
    products: dict[str, list[jax.Array]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of the chunk on the device now."""
        return sum(array.nbytes for array in jax.tree.leaves((self.flow, self.products)))


@dataclass(frozen=True)
class Division:
    """What follows from which tiles the host multiplies, for all stages: see `StageShape`."""

    hosted: frozenset[int]
    tiles: frozenset[int]  # by id, the tiles of `hosted`
    shapes: dict  # (layer, stage) -> its shape
    heights: dict  # (layer, stage) -> matrix -> its rows on the host; the head's too
    last: frozenset[int]  # by id, the last tile of each stage that the host multiplies

    def shape(self, tile: Tile) -> StageShape:
        return self.shapes.get(_stage_key(tile), NO_SHAPE)


class Sweeper:
    """Moves rows through the tiles of a model.

    `hosted`: the tiles that the host multiplies in a forward pass of so many rows.
    """

    def __init__(
        self,
        programs: Programs,
        embedding: Embedding,
        residents: Residents,
        caches: Caches,
        *,
        host: Host | None = None,
        hosted: Callable[[int], frozenset[int]] = lambda n_rows: frozenset(),
    ):
        self.programs, self._embedding, self._residents = programs, embedding, residents
        self._caches, self._host, self._hosted = caches, host, hosted
        self.most_activation_bytes = 0
        self._tiles: tuple[Tile, ...] = ()  # the tiles of the next two tables
        self._divisions: dict[frozenset[int], Division] = {}
        self._ready: dict = {}  # (tile, size, wanted, hosted) -> its calls, looked up in a sweep
        self._stage: HostedStage | None = None  # that the host is at
        self._landing = 0  # the rows of what the host multiplies in this pass

    def compile(self, executor: Executor, parts: Sequence[Part]) -> None:
        """Compiles all programs of a forward pass of chunks like these."""
        self._compile(executor, parts, self._hosted(count_rows(parts)))

    def fill(self, executor: Executor, parts: Sequence[Part]) -> None:
        """Starts reading the first weights, ahead of a forward pass of chunks like these."""
        executor.fill(self._hosted(count_rows(parts)))

    def _compile(self, executor, parts, hosted):
        division = self._divide(executor.tiles, hosted)
        shapes = {(part.size, part.n_wanted) for part in parts}
        for n_rows in {size.rows for size, _ in shapes}:
            self.programs.embed(self._embedding.parts, n_rows=n_rows)
            self._caches.compile(n_rows)
        landing = landing_rows(count_rows(parts))
        for size, n_wanted in sorted(shapes, key=str):
            for tile in executor.tiles:
                self._calls(tile, size, n_wanted, division, landing)
        return division

    def run(
        self,
        executor: Executor,
        parts: Sequence[Part],
        take: Take,
        *,
        advance=None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """One forward pass. `advance`: instead of the method of this name, for all tiles, on the
        device. `check`: called at every tile; what it raises ends the pass.

        The rows are written to the pools; nothing else of the pools changes, so a pass that is
        repeated or given up leaves the committed rows as they were.
        """
        n_rows = count_rows(parts)
        hosted = frozenset() if advance else self._hosted(n_rows)
        division, self._landing = self._compile(executor, parts, hosted), landing_rows(n_rows)
        outgoing = Outgoing(take)

        def run(tile, arrays):
            check()
            if advance:
                outputs = advance(tile, arrays, passing)
            else:
                outputs = self.advance(tile, arrays, passing, division)
            if tile.kind is None:
                for output, chunk in zip(outputs, passing, strict=True):
                    if chunk.part.n_wanted:
                        outgoing.add(output, chunk.part.places, tile.parts[0].first_row)
            self._note_activations(passing, outgoing)
            return outputs

        def multiply(tile, views, is_kept):
            check()
            result = self._begin_on_host(tile, views, is_kept, passing, division)
            if tile.kind is None and self._stage.n_columns:
                places = np.concatenate([chunk.part.places for chunk in passing])
                fetch = partial(_hosted_logits, self._stage, tile)
                outgoing.add_hosted(fetch, places, tile.parts[0].first_row)
            return result

        caches = self._caches
        try:
            passing = self.begin(parts)
            caches.begin([(chunk.flow["rows"].write, chunk.part.rows.write) for chunk in passing])
            executor.sweep(run, caches, multiply=multiply, hosted=hosted)
            outgoing.finish()
            caches.finish()
        except BaseException:
            caches.give_up()
            raise
        finally:
            self._stage = None
            if self._host is not None:
                self._host.leave()
        self._embedding.settle()

    def begin(self, parts: Sequence[Part]) -> list[Chunk]:
        """Embeds the rows of a forward pass: the chunks for the first layer, on the device."""
        self._caches.ready()
        known: dict = {}

        def put(array):
            """Puts an array once: chunks of a lane share its table."""
            key = (array.shape, array.dtype, array.tobytes())
            if key not in known:
                known[key] = jax.device_put(array, self.programs.device)
            return known[key]

        chunks, first = [], 0
        for part in parts:
            row_of = np.full(part.size.rows, NO_ROW, np.int32)
            row_of[part.real] = np.arange(first, first + len(part.real))
            first += len(part.real)
            padded = np.zeros(part.n_wanted, np.int32)
            padded[: len(part.wanted)] = part.wanted
            flow = {"hidden": self._embed(part.tokens), "rows": jax.tree.map(put, part.rows)}
            chunks.append(Chunk(part, flow, put(padded), put(row_of)))
        return chunks

    def advance(
        self, tile: Tile, arrays, passing: Sequence[Chunk], division: Division | None = None
    ) -> list:
        """Moves every chunk through a tile on the device.

        Returns the last output of each chunk, to wait for; at a tile of the head its logits.
        """
        division = division or self._divide(self._tiles, frozenset())
        if tile.ends_stage:
            self._bring_hosted(tile, passing, division)
        return [self._advance(tile, arrays, chunk, division) for chunk in passing]

    def _begin_on_host(self, tile, views, is_kept, passing, division):
        """Has the host multiply a tile where it lies, once all of the stage are known -> what can
        be waited for. Ends the stage where the tile is its last."""
        if self._stage is None:
            for chunk in passing:
                self._advance(tile, None, chunk, division, ends=False)
            xs, real = _inputs(passing, of_head=tile.kind is None)
            heights = division.heights[_stage_key(tile)]
            self._stage = self._host.begin(tile.stage, xs, real, heights)
        result = self._stage.add(tile, views, is_kept=is_kept)
        if id(tile) in division.last:
            self._stage.begin()
        if tile.ends_stage and tile.kind is not None:
            self._bring_hosted(tile, passing, division)
            for chunk in passing:
                self._advance(tile, None, chunk, division, begins=False)
        return result

    def _bring_hosted(self, tile, passing, division):
        """At the end of a stage: waits for the products of the host, which programs then read."""
        if not division.shape(tile).hosted:
            return
        stage, self._stage = self._stage, None
        stage.settle()
        products = stage.on_device()
        for chunk in passing:
            chunk.flow["hosted"] = {"products": products, "row_of": chunk.row_of}

    def find_nonfinite(self, executor: Executor, parts: Sequence[Part]) -> CheckpointError:
        """Repeats a forward pass, checks the output of every layer, and says which one fails."""
        found = []

        def advance(tile, arrays, passing):
            outputs = self.advance(tile, arrays, passing)
            if tile.ends_layer and not found and not all(map(_is_finite, passing)):
                found.append(tile.layer)
            return outputs

        self.run(executor, parts, lambda *_: None, advance=advance)
        if found:
            return CheckpointError(
                f"layer {found[0]}: its output is not finite; its weights are damaged, or "
                f"overflow in {self.programs.dtype}: run jlayer verify (jlayer convert, if it "
                "is a published folder), or change --dtype"
            )
        return CheckpointError(
            "logits are not finite, though every layer's output is: the final norm or the head is "
            "damaged; run jlayer verify"
        )

    def _divide(self, tiles, hosted) -> Division:
        """The division of these tiles; drops all tables if the tiles have changed."""
        if tiles is not self._tiles:
            self._tiles, self._divisions, self._ready = tiles, {}, {}
        if hosted not in self._divisions:
            self._divisions[hosted] = divided(tiles, hosted)
        return self._divisions[hosted]

    def _advance(self, tile, arrays, chunk, division, *, begins=True, ends=True):
        """`begins`, `ends`: whether the calls at the begin and the end of the stage are made, of a
        tile that the host multiplies."""
        output, layers = None, self._caches.layers
        for call in self._calls(
            tile, chunk.part.size, chunk.part.n_wanted, division, self._landing
        ):
            if not (ends if call.ends_stage else begins):
                continue
            given = {name: chunk.flow[name] for name in call.reads if name in chunk.flow}
            if "weights" in call.reads:
                given["weights"] = arrays
            if "wanted" in call.reads:
                given["wanted"] = chunk.wanted
            if "whole" in call.reads:
                leaves = self._residents.of(tile.layer)
                given["whole"] = {name: leaves[name] for name in call.whole}
            if "products" in call.reads:
                given["products"], chunk.products = chunk.products, {}
            if call.ends_stage:  # its function may give the next stage's x
                chunk.flow.pop("x")
                chunk.flow.pop("hosted", None)
            if call.uses_cache and layers[tile.layer] is None:  # without an executor's steps
                self._caches.put(tile.layer)
            consumed = {"cache": layers[tile.layer]} if call.uses_cache else {}
            results = call.program(given, consumed)
            if call.uses_cache:
                layers[tile.layer] = results.pop("cache")
            for name, part in results.pop("products", {}).items():
                chunk.products.setdefault(name, []).append(part)
                output = part
            output = results.pop("logits", output)
            chunk.flow |= results
            output = output if output is not None else chunk.flow["hidden"]
        return output

    def _calls(self, tile, size, n_wanted, division, landing):
        """The calls for a chunk at a tile. Only the head needs `n_wanted`. `landing`: the rows of
        what the host multiplied."""
        wanted = n_wanted if tile.kind is None else 0
        landing = landing if division.hosted else 0
        key = (id(tile), size, wanted, division.hosted, landing)
        if key not in self._ready:
            shape, on_host = division.shape(tile), id(tile) in division.tiles
            self._ready[key] = self.programs.calls(
                tile, size, shape=shape, wanted=wanted, on_host=on_host, landing=landing
            )
        return self._ready[key]

    def _embed(self, tokens):
        """tokens [R] -> [R, D] on the device, in the compute dtype; padding gets any row."""
        real, row_of = tokens >= 0, np.zeros(tokens.shape, np.int32)
        ids, row_of[real] = np.unique(tokens[real], return_inverse=True)
        rows = {leaf: unique[row_of] for leaf, unique in self._embedding.read(ids).items()}
        program = self.programs.embed(self._embedding.parts, n_rows=len(tokens))
        return program(jax.device_put(rows, self.programs.device))

    def _note_activations(self, passing, outgoing):
        shared = {id(leaf): leaf for chunk in passing for leaf in jax.tree.leaves(chunk.flow)}
        held = sum(leaf.nbytes for leaf in shared.values()) + outgoing.device_bytes
        held += sum(part.nbytes for chunk in passing for part in jax.tree.leaves(chunk.products))
        self.most_activation_bytes = max(self.most_activation_bytes, held)


def _stage_key(tile):
    return (tile.layer, tile.stage and tile.stage.name)


NO_SHAPE = StageShape()
NO_ROW = 1 << 30  # of padding: it reads zeros


def divided(tiles: Sequence[Tile], hosted: frozenset[int]) -> Division:
    """The division of tiles; widths and heights are in their order."""
    widths: dict = {}
    of_host: dict = {}
    for index, tile in enumerate(tiles):
        if tile.stage is None:
            continue
        if index in hosted:
            of_host.setdefault(_stage_key(tile), []).append(tile)
        elif tile.stage.finish:
            of_stage = widths.setdefault(_stage_key(tile), {})
            for name, width in tile.products().items():
                of_stage[name] = (*of_stage.get(name, ()), width)
    stages = {_stage_key(tile): tile.stage for tile in tiles if tile.stage is not None}
    heights = {key: hosted_heights(found, stages[key]) for key, found in of_host.items()}
    shapes = {
        key: StageShape(
            widths=tuple(widths.get(key, {}).items()),
            hosted=tuple(heights.get(key, {}).items()),
        )
        for key, stage in stages.items()
        if stage.finish
    }
    ids = frozenset(id(tiles[index]) for index in hosted)
    last = frozenset(id(found[-1]) for found in of_host.values())
    return Division(hosted, ids, shapes, heights, last)


def count_rows(parts: Sequence[Part]) -> int:
    """The rows of a forward pass, without padding."""
    return sum(len(part.real) for part in parts)


def _inputs(passing, *, of_head):
    """The input of a stage, and its rows that are not padding, of each chunk. The head's is that of
    the wanted rows alone."""
    if not of_head:
        return [chunk.flow["x"] for chunk in passing], [chunk.part.real for chunk in passing]
    chunks = [chunk for chunk in passing if chunk.part.n_wanted]
    wanted = [np.arange(len(chunk.part.wanted)) for chunk in chunks]
    return [chunk.flow.pop("x") for chunk in chunks], wanted


def _hosted_logits(stage, tile):
    stage.settle()
    return stage.logits(tile)


def _is_finite(chunk):
    """Whether the hidden states of real rows are finite; padding may hold anything."""
    real = chunk.part.tokens >= 0
    return bool(np.isfinite(np.asarray(chunk.flow["hidden"])[real].astype(np.float32)).all())
