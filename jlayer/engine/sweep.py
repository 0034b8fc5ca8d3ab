"""One forward pass: moves chunks of rows through every tile, and brings logits to the host.

Which rows these are, and what follows from their logits, is for others to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jlayer.engine.batch import VECTOR, Part, count_rows
from jlayer.engine.caches import Caches
from jlayer.engine.choosing import Chooser
from jlayer.engine.chunk import (
    OF_STAGE,
    BoundCall,
    Chunk,
    final_hidden,
    inputs_of,
    is_finite,
    tables_bytes,
)
from jlayer.engine.deciding import after_it, step
from jlayer.engine.division import Division, divided
from jlayer.engine.hosting import Host, HostedStage, hosted_logits, landing_rows
from jlayer.engine.left_out import LeftOut, some_pass_over
from jlayer.engine.messages import packed_parts
from jlayer.engine.outgoing import Outgoing
from jlayer.engine.picking import ADAPTERS, picked_lengths
from jlayer.engine.programs import Programs
from jlayer.engine.residents import Residents
from jlayer.engine.size import Size
from jlayer.errors import CheckpointError
from jlayer.plan.experts import at_once
from jlayer.plan.tiles import Tile
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor

# `take(logits [W, v], places [W], first vocabulary row)`: places among the wanted rows of the pass.
Take = Callable[[np.ndarray, np.ndarray, int], None]
# `take_hidden(final hidden states float32 [W, D], places [W])`: among the rows that want them.
TakeHidden = Callable[[np.ndarray, np.ndarray], None]
NO_ROW = 1 << 30  # of padding: it reads zeros


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
        self.chooser, self._put = Chooser(programs, residents), programs.devices.put
        self._left_out = LeftOut(programs, residents)
        self.most_activation_bytes = 0
        self._tiles: tuple[Tile, ...] = ()  # the tiles of the next four tables
        self._divisions: dict[frozenset[int], Division] = {}
        self._calls: dict[tuple, dict[int, tuple]] = {}  # see `_calls_of`
        self._held: dict[tuple, int] = {}  # shape of a pass -> the most bytes that its chunks hold
        self._prepared: set[tuple] = set()  # shapes of passes whose programs are there
        self._stage: HostedStage | None = None  # that the host is at
        self._numbers: dict[int, jax.Array] = {}  # of experts, on the device

    def compile(self, executor: Executor, parts: Sequence[Part]) -> None:
        """Compiles all programs of a forward pass of chunks like these."""
        with step("compile", lambda: [packed_parts(parts)]):
            self._compile(executor, parts, self._hosted_in(parts))

    def fill(self, executor: Executor, parts: Sequence[Part]) -> None:
        """Starts reading the first weights, ahead of a forward pass of chunks like these."""
        with step("fill", lambda: [packed_parts(parts)]):
            executor.fill(self._hosted_in(parts))

    def _hosted_in(self, parts):
        return frozenset() if some_pass_over(parts) else self._hosted(count_rows(parts))

    def _compile(self, executor, parts, hosted):
        division = self._divide(executor.tiles, hosted)
        shapes = frozenset((part.size, part.n_wanted, part.n_hidden) for part in parts)
        entering = frozenset((part.size.rows, part.vectors is not None) for part in parts)
        landing, guesses = landing_rows(count_rows(parts)), executor.has_guesses
        passed = frozenset((part.size, part.without) for part in parts)
        states = hosted, landing, guesses, self._caches.sizes, self._caches.tier
        key = (shapes, entering, passed, *states)
        if key not in self._prepared:
            with self.programs.together():
                for n_rows, has_vectors in entering:
                    self._embed_program(n_rows, has_vectors)
                    if guesses:
                        self.chooser.compile(self._tiles, n_rows)
                for size, n_wanted, n_hidden in sorted(shapes, key=str):
                    self._caches.compile(size)
                    if n_hidden:
                        self._hidden_call(size, n_hidden)
                    self._make_calls(self._tiles, size, n_wanted, division, landing)
                self._left_out.compile(self._tiles, parts)
            self._prepared.add(key)
        return division

    def run(
        self,
        executor: Executor,
        parts: Sequence[Part],
        take: Take,
        *,
        take_hidden: TakeHidden = lambda *_: None,
        advance=None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """One forward pass. `advance`: instead of the method of this name, for all tiles, on the
        device. `check`: called at every tile; what it raises ends the pass.

        The rows are written to the pools; nothing else of the pools changes, so a pass that is
        repeated or given up leaves the committed rows as they were.
        """
        takes = after_it(take), after_it(take_hidden)
        with takes[0] as one, takes[1] as other, step("run", lambda: [packed_parts(parts)]):
            self._run(executor, parts, one, other, advance, check)

    def _run(self, executor, parts, take, take_hidden, advance, check):
        n_rows = count_rows(parts)
        hosted = frozenset() if advance else self._hosted_in(parts)
        division = self._compile(executor, parts, hosted)
        outgoing, most_held = Outgoing(take), 0
        shape = (hosted, *((part.size, part.n_wanted) for part in parts))
        is_known = shape in self._held

        def run(tile, arrays):
            nonlocal most_held
            check()
            outputs = (advance or self.advance)(tile, arrays, passing)
            if tile.kind is None:
                ranges = self._vocabulary(tile)
                for output, chunk in zip(outputs, passing, strict=True):
                    if chunk.part.n_wanted:
                        outgoing.add(output, chunk.part.places, ranges)
            if not is_known:
                held = outgoing.device_bytes + sum(chunk.n_bytes for chunk in passing)
                most_held = max(most_held, held)
            return outputs

        def run_together(tiles, arrays):
            check()
            return self.advance_together(tiles, arrays, passing)

        def multiply(tile, views, is_kept):
            check()
            result = self._begin_on_host(tile, views, is_kept, passing, division)
            if tile.kind is None and self._stage.n_columns:
                places = np.concatenate([chunk.part.places for chunk in passing])
                fetch = partial(hosted_logits, self._stage, tile)
                outgoing.add_hosted(fetch, places, tile.parts[0].first_row)
            return result

        caches, guard = self._caches, executor.guard
        try:
            passing = self._begin(parts, division)
            caches.begin([(chunk.flow["rows"], chunk.part.rows) for chunk in passing])
            executor.sweep(
                *(run, caches),
                run_together=run_together,
                multiply=multiply,
                hosted=hosted,
                decide=partial(self._left_out.decide, self.chooser, passing),
                guesses=executor.has_guesses and not some_pass_over(parts),
                n_rows=n_rows,
            )
            with guard.step("the logits"):
                outgoing.finish()
                self._bring_hidden(passing, take_hidden)
            with guard.step("the cache"):
                caches.finish()
            held = tables_bytes(passing) + self._held.setdefault(shape, most_held)
            self.most_activation_bytes = max(self.most_activation_bytes, held)
        except BaseException:
            caches.give_up()
            raise
        finally:
            self._stage = None
            if self._host is not None:
                self._host.leave()
        self._embedding.settle()

    def begin(self, executor: Executor, parts: Sequence[Part]) -> list[Chunk]:
        """Embeds the rows of a forward pass on the device: the chunks for the first tile."""
        return self._begin(parts, self._compile(executor, parts, frozenset()))

    def _begin(self, parts, division):
        self._caches.ready()
        known: dict = {}

        def put(array):
            """Puts an array once: chunks of a lane share its table."""
            key = (array.shape, array.dtype, array.tobytes())
            if key not in known:
                known[key] = self._put(array)
            return known[key]

        landing = landing_rows(count_rows(parts))
        chunks, first = [], 0
        for part in parts:
            row_of = np.full(part.size.rows, NO_ROW, np.int32)
            row_of[part.real] = np.arange(first, first + len(part.real))
            first += len(part.real)
            padded = np.zeros(part.n_wanted, np.int32)
            padded[: len(part.wanted)] = part.wanted
            flow = {"rows": jax.tree.map(put, part.rows), "wanted": put(padded)}
            if self.programs.chooses:
                flow[ADAPTERS] = put(part.adapters)
            calls = self._calls_of(part.size, part.n_wanted, division, landing)
            chunks.append(Chunk(part, flow | self._embed(part), put(row_of), calls))
        return chunks

    def advance(self, tile: Tile, arrays, passing: Sequence[Chunk]) -> list:
        """Moves every chunk through a tile on the device.

        Returns an output of each chunk, to wait for; at a tile of the head its logits.
        """
        if self._stage is not None and tile.uncut:
            return self._end_stage(tile, passing, arrays)
        passing = self._left_out.at(tile, passing)
        calls = [chunk.calls_at(tile) for chunk in passing]
        found = [
            self._call(tile, arrays, chunk, of_chunk[0]) if of_chunk else None
            for chunk, of_chunk in zip(passing, calls, strict=True)
        ]
        self._end_stage(tile, passing)
        return found

    def advance_together(
        self, tiles: Sequence[Tile], arrays: Sequence, passing: Sequence[Chunk]
    ) -> list:
        """Moves every chunk through several experts of a layer, at most those of one call."""
        outputs, n = [], at_once(tiles[0])
        for chunk in self._left_out.at(tiles[0], passing):
            found = chunk.together(tiles)
            if found is None:
                continue
            bound, chosen = found
            n_left = n - len(chosen)
            given = {name: chunk.flow[name] for name in bound.call.reads}
            given["weights"] = [arrays[place] for place in chosen] + [arrays[chosen[0]]] * n_left
            numbers = [tiles[place].expert for place in chosen]
            numbers += [tiles[0].kind.n_experts] * n_left
            given["experts"] = [self._number(number) for number in numbers]
            results, _ = bound.call.program(given, {})
            chunk.flow |= results
            outputs.append(chunk.flow["mixed"])
        return outputs

    def _hidden_call(self, size, n_hidden):
        """What gives the final hidden states of some rows of a chunk."""
        head = next(tile for tile in self._tiles if tile.kind is None)
        call = self.programs.head_input(head, size, n_hidden)
        return BoundCall(call, self._leaves_of(head, call))

    def _bring_hidden(self, passing, take):
        """Gives `take` the final hidden states that are wanted, after the last layer."""
        for chunk in passing:
            if n_hidden := chunk.part.n_hidden:
                bound = self._hidden_call(chunk.part.size, n_hidden)
                take(final_hidden(chunk, bound, self._put), chunk.part.hidden_places)

    def _vocabulary(self, tile):
        """(columns of a head tile's logits, the first row of the vocabulary) of each range."""
        part = tile.parts[0]
        if part.hosts is None:
            return [(slice(None), part.first_row)]
        at = part.first_row - part.hosts.first(self.programs.devices.number)
        return part.hosts.of_all(at, part.n_rows)

    def _end_stage(self, tile, passing, arrays=None):
        """Ends a stage of which the host multiplies some rows, at its last tile -> its outputs."""
        if self._stage is None or tile.kind is None or not tile.ends_stage:
            return None
        self._bring_hosted(passing)
        return [self._call(tile, arrays, chunk, chunk.calls[id(tile)][-1]) for chunk in passing]

    def _begin_on_host(self, tile, views, is_kept, passing, division):
        """Has the host multiply a tile where it lies, once all of the stage are known -> what can
        be waited for. Ends the stage where the tile is its last."""
        is_head = tile.kind is None
        if self._stage is None:
            if is_head:
                self.advance(tile, None, passing)
            given = inputs_of(passing, None if is_head else tile.stage)
            self._stage = self._host.begin(tile.stage, *given, division.heights_of(tile))
        result = self._stage.add(tile, views, is_kept=is_kept)
        if id(tile) in division.last:
            self._stage.begin()
        self._end_stage(tile, passing)
        return result

    def _bring_hosted(self, passing):
        """Waits for the products of the host, which programs then read."""
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
            if tile.ends_layer and not found and not all(map(is_finite, passing)):
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
            self._tiles, self._divisions, self._calls, self._held = tiles, {}, {}, {}
            self._prepared.clear()
        if hosted not in self._divisions:
            self._divisions[hosted] = divided(tiles, hosted)
        return self._divisions[hosted]

    def _call(self, tile, arrays, chunk, bound):
        """Makes a call for a chunk at a tile -> something to wait for, or the head's logits."""
        call, flow, consumed = bound.call, chunk.flow, {}
        if tile.expert is not None:
            flow["expert"] = self._number(tile.expert)
        given = bound.leaves | {name: flow[name] for name in call.reads}
        if call.uses_weights:
            given["weights"] = arrays
        if call.uses_cache:
            layers = self._caches.layers
            if layers[tile.layer] is None:  # without an executor's steps
                self._caches.put(tile.layer)
            consumed["cache"] = layers[tile.layer]
        results, cache = call.program(given, consumed)
        if call.uses_cache:
            layers[tile.layer] = cache
        if "logits" in results:
            return results["logits"]
        if "products" in results:
            parts = flow.setdefault("products", {})
            for name, part in results["products"].items():
                parts.setdefault(name, []).append(part)
            return part
        if call.ends_stage:
            for name in (*OF_STAGE, *tile.stage.drops):
                flow.pop(name, None)
        flow |= results
        return next(iter(results.values()))

    def _number(self, expert):
        """The number of an expert on the device."""
        if expert not in self._numbers:
            self._numbers[expert] = self._put(np.asarray(expert, np.int32))
        return self._numbers[expert]

    def _calls_of(self, size: Size, n_wanted: int, division: Division, landing: int):
        """What is done with a chunk of this size, by the id of the tile. `landing`: the rows of
        what the host multiplied. Only the head needs `n_wanted`."""
        key = (size, division.hosted, landing if division.hosted else 0)
        if key not in self._calls:
            of_layers = (tile for tile in self._tiles if tile.kind is not None)
            self._calls[key] = self._make_calls(of_layers, size, 0, division, landing)
        whole = (*key, n_wanted)
        if whole not in self._calls:
            of_head = (tile for tile in self._tiles if tile.kind is None)
            calls = self._make_calls(of_head, size, n_wanted, division, landing)
            self._calls[whole] = self._calls[key] | calls
        return self._calls[whole]

    def _make_calls(self, tiles, size, n_wanted, division, landing):
        calls, of_experts = {}, {}
        for tile in tiles:
            if tile.expert is None:
                calls[id(tile)] = self._bound(tile, size, n_wanted, division, landing)
                continue
            # Those of all experts are the same, and there are thousands.
            for length in (0, *picked_lengths(tile.kind.router, size.rows)):
                key = (tile.signature, tile.begins_stage, tile.ends_stage, length)
                if key not in of_experts:
                    of_experts[key] = self._bound(tile, size, 0, division, 0, length)
                calls[(id(tile), length) if length else id(tile)] = of_experts[key]
        return calls

    def _bound(self, tile, size, n_wanted, division, landing, picked=0):
        found = self._calls_at(tile, size, n_wanted, division, landing, picked)
        return tuple(BoundCall(call, self._leaves_of(tile, call)) for call in found)

    def _calls_at(self, tile, size, n_wanted, division, landing, picked=0):
        return self.programs.calls_at(
            tile,
            size,
            shape=division.shape(tile),
            wanted=0 if tile.kind is not None else n_wanted,
            on_host=id(tile) in division.tiles,
            landing=landing if division.hosted else 0,
            picked=picked,
        )

    def _leaves_of(self, tile, call):
        """The leaves that a call at a tile reads uncut."""
        own = self._whole("whole", tile.layer, call.whole)
        if not call.next_whole:
            return own
        return own | self._whole("next_whole", tile.layer + tile.ends_layer, call.next_whole)

    def _whole(self, key, layer, names):
        """Under this key, if any are named, leaves of a layer by name; layer None: of the head."""
        leaves = self._residents.of(layer)
        return {key: {name: leaves[name] for name in names}} if names else {}

    def _embed(self, part):
        """A chunk's tokens [R] -> hidden [R, D] on the device, in the compute dtype, and the first
        stage's input; padding gets any row."""
        given = {"rows": self._put(self._embedding.rows_of(part.tokens))}
        first, has_vectors = self._tiles[0], part.vectors is not None
        if has_vectors:
            given |= self._put({"vectors": part.vectors, "is_vector": part.tokens == VECTOR})
        wanted = first.stage and first.stage.input
        given |= self._whole("whole", first.layer, wanted.whole if wanted else ())
        return self._embed_program(part.size.rows, has_vectors)(given)

    def _embed_program(self, n_rows, has_vectors):
        parts, first = self._embedding.parts, self._tiles[0]
        return self.programs.embed(parts, first, n_rows=n_rows, has_vectors=has_vectors)
