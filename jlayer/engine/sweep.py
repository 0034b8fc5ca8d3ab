"""One forward pass: moves chunks of rows through every tile, and brings logits to the host.

Which rows these are, and what follows from their logits, is for others to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jlayer.engine.batch import Part
from jlayer.engine.caches import Caches
from jlayer.engine.outgoing import Outgoing
from jlayer.engine.programs import Programs, Size
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
    those of the current stage, by name, as lists of the parts of row ranges.
    """

    part: Part
    flow: dict
    wanted: jax.Array
    products: dict[str, list[jax.Array]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of the chunk on the device now."""
        return sum(array.nbytes for array in jax.tree.leaves((self.flow, self.products)))


class Sweeper:
    """Moves rows through the tiles of a model."""

    def __init__(
        self, programs: Programs, embedding: Embedding, residents: Residents, caches: Caches
    ):
        self.programs, self._embedding, self._residents = programs, embedding, residents
        self._caches = caches
        self.most_activation_bytes = 0
        self._tiles: tuple[Tile, ...] = ()  # the tiles of the next two tables
        self._widths: dict = {}  # see _product_widths
        self._ready: dict = {}  # (tile, size, wanted) -> its calls, looked up in a sweep

    def compile(self, executor: Executor, shapes: Iterable[tuple[Size, int]]) -> None:
        """Compiles all programs for chunks of these sizes, with so many wanted rows."""
        self._know(executor.tiles)
        shapes = set(shapes)
        for n_rows in {size.rows for size, _ in shapes}:
            self.programs.embed(self._embedding.parts, n_rows=n_rows)
            self._caches.compile(n_rows)
        for size, n_wanted in sorted(shapes, key=str):
            for tile in executor.tiles:
                self._calls(tile, size, n_wanted)

    def run(
        self,
        executor: Executor,
        parts: Sequence[Part],
        take: Take,
        *,
        advance=None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """One forward pass. `advance`: instead of the method of this name. `check`: called at every
        tile; what it raises ends the pass.

        The rows are written to the pools; nothing else of the pools changes, so a pass that is
        repeated or given up leaves the committed rows as they were.
        """
        advance = advance or self.advance
        self.compile(executor, ((part.size, part.n_wanted) for part in parts))
        outgoing = Outgoing(take)

        def run(tile, arrays):
            check()
            outputs = advance(tile, arrays, passing)
            if tile.kind is None:
                for output, chunk in zip(outputs, passing, strict=True):
                    if chunk.part.n_wanted:
                        outgoing.add(output, chunk.part.places, tile.parts[0].first_row)
            self._note_activations(passing, outgoing)
            return outputs

        caches = self._caches
        try:
            passing = self.begin(parts)
            caches.begin([(chunk.flow["rows"].write, chunk.part.rows.write) for chunk in passing])
            executor.sweep(run, caches)
            outgoing.finish()
            caches.finish()
        except BaseException:
            caches.give_up()
            raise
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

        chunks = []
        for part in parts:
            padded = np.zeros(part.n_wanted, np.int32)
            padded[: len(part.wanted)] = part.wanted
            flow = {"hidden": self._embed(part.tokens), "rows": jax.tree.map(put, part.rows)}
            chunks.append(Chunk(part, flow, put(padded)))
        return chunks

    def advance(self, tile: Tile, arrays, passing: Sequence[Chunk]) -> list:
        """Moves every chunk through a tile.

        Returns the last output of each chunk, to wait for; at a tile of the head its logits.
        """
        return [self._advance(tile, arrays, chunk) for chunk in passing]

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

    def _know(self, tiles):
        """Drops the tables of calls and widths if the tiles have changed."""
        if tiles is not self._tiles:
            self._tiles, self._widths, self._ready = tiles, _product_widths(tiles), {}

    def _advance(self, tile, arrays, chunk):
        output, layers = None, self._caches.layers
        for call in self._calls(tile, chunk.part.size, chunk.part.n_wanted):
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
                chunk.flow.pop("x")  # the stage ends; its function may give the next stage's x
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

    def _calls(self, tile, size, n_wanted):
        """The calls for a chunk at a tile. Only the head needs `n_wanted`."""
        key = (id(tile), size, n_wanted if tile.kind is None else 0)
        if key not in self._ready:
            widths = self._widths.get(_stage_key(tile), {})
            self._ready[key] = self.programs.calls(tile, size, widths=widths, wanted=key[-1])
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


def _product_widths(tiles):
    """(layer, stage) -> product -> the widths of its parts, in the order of the tiles."""
    widths = {}
    for tile in tiles:
        if tile.stage is not None and tile.stage.finish:
            of_stage = widths.setdefault(_stage_key(tile), {})
            for name, width in tile.products().items():
                of_stage[name] = (*of_stage.get(name, ()), width)
    return widths


def _is_finite(chunk):
    """Whether the hidden states of real rows are finite; padding may hold anything."""
    real = chunk.part.tokens >= 0
    return bool(np.isfinite(np.asarray(chunk.flow["hidden"])[real].astype(np.float32)).all())
