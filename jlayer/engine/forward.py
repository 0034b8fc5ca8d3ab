"""One run through the model: moves columns of tokens, in chunks, through every tile, and holds the
caches of a batch of sequences.

Each sequence has its own positions. Rows are padded on the left, so the last column has the last
token of every sequence. Padding has a position beyond the cache: it is never written there, and its
result is not used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import jax
import numpy as np

from jlayer.engine.outgoing import Outgoing
from jlayer.engine.programs import Programs, Size
from jlayer.engine.residents import Residents
from jlayer.errors import CheckpointError, UsageError
from jlayer.families.registry import layer_kinds
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import LEAST_COLUMNS, chunks
from jlayer.plan.tiles import Tile
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor


def columns(ids: list[list[int]], starts: list[int], sizes: tuple[int, ...], capacity: int):
    """Token ids and positions, each int32 [B, sum(sizes)], padded on the left with id -1 at
    position `capacity`.

    Row b holds `ids[b]` at positions `starts[b]`, `starts[b] + 1`, ...
    """
    width = sum(sizes)
    tokens = np.full((len(ids), width), -1, np.int32)
    positions = np.full((len(ids), width), capacity, np.int32)
    for row, (sequence, start) in enumerate(zip(ids, starts, strict=True)):
        if sequence:
            first = width - len(sequence)
            tokens[row, first:] = sequence
            positions[row, first:] = np.arange(start, start + len(sequence))
    return tokens, positions


@dataclass
class Chunk:
    """Some columns between two tiles.

    `flow`: the values that stages pass on (hidden [B, T, D], positions [B, T], a stage's input x).
    `products`: those of the current stage, by name, as lists of the parts of row ranges. `last`:
    how many of its last columns the head reads.
    """

    flow: dict[str, jax.Array]
    last: int
    products: dict[str, list[jax.Array]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.flow["hidden"].shape[1]

    @property
    def n_bytes(self) -> int:
        """Bytes of the chunk on the device now."""
        parts = (part for parts in self.products.values() for part in parts)
        return sum(array.nbytes for array in (*self.flow.values(), *parts))


class Forward:
    """A run: the caches of a batch of sequences, and forward passes of more tokens.

    `plan`: the plan by which the run was admitted. `turn`: a context manager that gives the
    executor for a forward pass. `release`: called once when the run is closed or dropped. `noted`:
    called after every forward pass. Close the run to free its cache.
    """

    def __init__(
        self,
        plan: Plan,
        programs: Programs,
        embedding: Embedding,
        residents: Residents,
        *,
        turn: Callable[[], AbstractContextManager[Executor]],
        release: Callable[[], None],
        noted: Callable[[Forward], None],
    ):
        self.plan = plan
        self.batch, self.capacity, self._most = plan.shapes.batch, plan.capacity, plan.chunk
        self.moved: dict[str, float] = {}  # by its own forward passes, see Totals.since
        self._turn, self._noted = turn, noted
        self._programs, self._embedding, self._residents = programs, embedding, residents
        self._kinds = layer_kinds(programs.cfg)
        self._make_caches = [
            programs.empty_cache(kind, batch=self.batch, capacity=self.capacity)
            for kind in self._kinds
        ]
        self._caches: list | None = None
        self._tiles: tuple[Tile, ...] = ()  # the tiles of the next two tables
        self._widths: dict = {}  # see _product_widths
        self._ready: dict = {}  # (tile, tokens, last) -> its calls, looked up in a sweep
        self._most_activation_bytes = 0
        self._end = weakref.finalize(self, release)

    @property
    def cache_bytes(self) -> int:
        """Bytes of this run's caches on the device now."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._caches))

    @property
    def activation_bytes(self) -> int:
        """The most bytes of activations and logits on the device in a forward pass."""
        return self._most_activation_bytes

    @property
    def reads_directly(self) -> bool:
        with self._entered() as executor:
            return executor.reads_directly

    def close(self) -> None:
        """Frees the caches. The run cannot be used afterwards."""
        self._caches = None
        self._end()

    def fill(self):
        """Starts reading the first weights, ahead of the first forward pass."""
        with self._entered() as executor:
            executor.fill()

    def stream(self):
        """One sweep without arithmetic: all weights move, none is used."""
        with self._entered() as executor:
            executor.sweep(lambda tile, arrays: arrays)

    def slot(self, number: int) -> np.ndarray:
        """The memory of a host slot; see `Executor.slot`."""
        with self._entered() as executor:
            return executor.slot(number)

    def settle(self):
        """Waits for all reads in progress."""
        self._embedding.settle()
        with self._entered() as executor:
            executor.settle()

    def compile(self, n_tokens: int, *, all_logits: bool = False):
        """Compiles all programs of a forward pass of `n_tokens` tokens, ahead of it."""
        with self._entered() as executor:
            self._compile(executor, self._sizes(n_tokens), all_logits)

    def sweep(
        self, ids: list[list[int]], starts: list[int], *, all_logits: bool = False
    ) -> np.ndarray:
        """One forward pass over `ids[b]` at positions from `starts[b]` on -> float32 logits on the
        host.

        [B, 1, V] of the last token of each sequence; with `all_logits` [B, longest, V] of all
        tokens, aligned at the end. Raises CheckpointError for values that are not finite, with the
        first layer that gives one.
        """
        longest = max(map(len, ids))
        width = self.n_columns(longest) if all_logits else LEAST_COLUMNS
        padded = np.empty((self.batch, width, self._programs.cfg.vocab_size), np.float32)

        def take(output, column, row):
            n_columns, n_rows = output.shape[1:]
            padded[:, column : column + n_columns, row : row + n_rows] = output

        self._sweep(ids, starts, all_logits, self.advance, take)
        logits = padded[:, -(longest if all_logits else 1) :]
        if not np.isfinite(logits).all():
            self._find_nonfinite(ids, starts)
        return logits

    def score(self, ids: list[list[int]], scores) -> None:
        """One forward pass over `ids[b]` from position 0 on; passes slices of the logits to
        `scores.add(output [B, columns, rows], first column, first vocabulary row)`.

        Columns are counted with the padding on the left. Raises what `sweep` raises.
        """
        starts = [0] * len(ids)
        self._sweep(ids, starts, True, self.advance, scores.add)
        if not scores.are_finite:
            self._find_nonfinite(ids, starts)

    def n_columns(self, longest: int) -> int:
        """Columns, padding included, of a forward pass whose longest row has `longest` tokens."""
        return sum(self._sizes(longest))

    def enter(
        self, ids: list[list[int]], starts: list[int], *, all_logits: bool = False
    ) -> list[Chunk]:
        """Embeds the columns of a forward pass: the chunks for the first layer, on the device."""
        if self._caches is None:
            self._caches = [make() for make in self._make_caches]
        sizes = self._sizes(max(map(len, ids)))
        tokens, positions = columns(ids, starts, sizes, self.capacity)
        return [
            Chunk(
                {"hidden": self._embed(tokens[:, a:b]), "positions": self._put(positions[:, a:b])},
                last=_last(index, sizes, all_logits),
            )
            for index, (a, b) in enumerate(pairwise(np.cumsum((0, *sizes))))
        ]

    def advance(self, tile: Tile, arrays, passing: list[Chunk]) -> list:
        """Moves every chunk through a tile.

        Returns the last output of each chunk, to wait for; at a tile of the head its logits.
        """
        return [self._advance(tile, arrays, chunk) for chunk in passing]

    def _entered(self):
        if not self._end.alive:
            raise UsageError("this run is closed; start another one")
        return self._turn()

    def _sizes(self, n_tokens):
        return chunks(n_tokens, self._most)

    def _compile(self, executor, sizes, all_logits):
        self._know(executor.tiles)
        for size in set(sizes):
            self._programs.embed(self._embedding.parts, batch=self.batch, tokens=size)
        for tile in executor.tiles:
            for index, size in enumerate(sizes):
                self._calls(tile, size, _last(index, sizes, all_logits))

    def _know(self, tiles):
        """Drops the tables of calls and widths if the tiles have changed."""
        if tiles is not self._tiles:
            self._tiles, self._widths, self._ready = tiles, _product_widths(tiles), {}

    def _sweep(self, ids, starts, all_logits, advance, take):
        with self._entered() as executor:
            self._compile(executor, self._sizes(max(map(len, ids))), all_logits)
            passing = self.enter(ids, starts, all_logits=all_logits)
            outgoing = Outgoing(take)

            def run(tile, arrays):
                outputs = advance(tile, arrays, passing)
                if tile.kind is None:
                    _send(outgoing, tile, outputs, passing)
                self._note_activations(passing, outgoing)
                return outputs

            before = replace(executor.totals)
            executor.sweep(run)
            for name, value in executor.totals.since(before).items():
                self.moved[name] = self.moved.get(name, 0) + value
            outgoing.finish()
            self._embedding.settle()
            self._noted(self)

    def _advance(self, tile, arrays, chunk):
        output = None
        for call in self._calls(tile, chunk.tokens, chunk.last):
            given = {name: chunk.flow[name] for name in call.reads if name in chunk.flow}
            if "weights" in call.reads:
                given["weights"] = arrays
            if "whole" in call.reads:
                leaves = self._residents.of(tile.layer)
                given["whole"] = {name: leaves[name] for name in call.whole}
            if "products" in call.reads:
                given["products"], chunk.products = chunk.products, {}
                chunk.flow.pop("x")  # the stage ends; its function may give the next stage's x
            consumed = {"cache": self._caches[tile.layer]} if call.uses_cache else {}
            results = call.program(given, consumed)
            if call.uses_cache:
                self._caches[tile.layer] = results.pop("cache")
            for name, part in results.pop("products", {}).items():
                chunk.products.setdefault(name, []).append(part)
                output = part
            output = results.pop("logits", output)
            chunk.flow |= results
            output = output if output is not None else chunk.flow["hidden"]
        return output

    def _calls(self, tile, tokens, last):
        """The calls for a chunk at a tile. Only the head uses `last`."""
        last = last if tile.kind is None else 0
        key = (id(tile), tokens, last)
        if key not in self._ready:
            size = Size(self.batch, tokens, self.capacity)
            widths = self._widths.get(_stage_key(tile), {})
            self._ready[key] = self._programs.calls(tile, size, widths=widths, last=last)
        return self._ready[key]

    def _find_nonfinite(self, ids, starts):
        """Repeats the forward pass, checks the output of every layer, and raises.

        The pass overwrites the same positions of the cache.
        """

        def advance(tile, arrays, passing):
            outputs = self.advance(tile, arrays, passing)
            if tile.ends_layer and not all(_is_finite(chunk, self.capacity) for chunk in passing):
                raise CheckpointError(
                    f"layer {tile.layer}: its output is not finite; its weights are damaged, or "
                    f"overflow in {self._programs.dtype}: run jlayer verify (jlayer convert, if it "
                    "is a published folder), or change --dtype"
                )
            return outputs

        self._sweep(ids, starts, False, advance, lambda *_: None)
        raise CheckpointError(
            "logits are not finite, though every layer's output is: the final norm or the head is "
            "damaged; run jlayer verify"
        )

    def _embed(self, tokens):
        """tokens [B, T] -> [B, T, D] on the device, in the compute dtype; padding gets any row."""
        batch, size = tokens.shape
        real, row_of = tokens >= 0, np.zeros(tokens.shape, np.int32)
        ids, row_of[real] = np.unique(tokens[real], return_inverse=True)
        rows = {leaf: unique[row_of] for leaf, unique in self._embedding.read(ids).items()}
        program = self._programs.embed(self._embedding.parts, batch=batch, tokens=size)
        return program(self._put(rows))

    def _put(self, arrays):
        return jax.device_put(arrays, self._programs.device)

    def _note_activations(self, passing, outgoing):
        held = sum(chunk.n_bytes for chunk in passing) + outgoing.device_bytes
        self._most_activation_bytes = max(self._most_activation_bytes, held)


def _last(index, sizes, all_logits):
    """Columns of a chunk that the head reads: all, or the last of the last chunk."""
    if all_logits:
        return sizes[index]
    return LEAST_COLUMNS if index == len(sizes) - 1 else 0


def _send(outgoing, tile, outputs, passing):
    column = 0
    for output, chunk in zip(outputs, passing, strict=True):
        if chunk.last:
            outgoing.add(output, column, tile.parts[0].first_row)
            column += chunk.last


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


def _is_finite(chunk, capacity):
    """Whether the hidden states of real tokens are finite; padding may hold anything."""
    real = np.asarray(chunk.flow["positions"]) < capacity
    return bool(np.isfinite(np.asarray(chunk.flow["hidden"])[real].astype(np.float32)).all())
