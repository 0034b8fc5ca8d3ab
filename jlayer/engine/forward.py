"""One sweep's arithmetic: columns of tokens, in chunks, through every tile; the caches of one batch
of sequences.

Each sequence has its own positions. Columns are padded on the left, so that the last column is
every sequence's last token; a padded column has a position beyond the cache, is never written
there, and what it computes is not looked at.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import jax
import numpy as np

from jlayer.engine.programs import Programs
from jlayer.errors import CheckpointError
from jlayer.plan.plan import OUTGOING, Plan, chunks
from jlayer.plan.tiles import STAGES, Tile
from jlayer.stream.embedding import Embedding
from jlayer.stream.executor import Executor


def columns(ids: list[list[int]], starts: list[int], sizes: tuple[int, ...], capacity: int):
    """Token ids and positions, each int32 [B, sum(sizes)], padded on the left with id -1 at
    position `capacity`.

    Row b holds `ids[b]` at positions `starts[b]`, `starts[b] + 1`, ...
    """
    width = sum(sizes)
    tokens = np.full((len(ids), width), -1, np.int32)
    positions = np.full((len(ids), width), capacity, np.int32)
    for row, (own, start) in enumerate(zip(ids, starts, strict=True)):
        if own:
            tokens[row, width - len(own) :] = own
            positions[row, width - len(own) :] = np.arange(start, start + len(own))
    return tokens, positions


@dataclass
class Chunk:
    """Some columns on their way: hidden [B, T, D], positions [B, T], and the stage under way: its
    input `x` and the products so far, by leaf."""

    hidden: jax.Array
    positions: jax.Array
    x: jax.Array | None = None
    products: dict[str, list[jax.Array]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.hidden.shape[1]


@dataclass(frozen=True)
class Residents:
    """The small weights that stay on the device: each layer's norms by leaf, and the final one."""

    layers: list[dict[str, jax.Array]]
    final: jax.Array

    @property
    def n_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.layers, self.final)))


class Forward:
    """The state of a batch of sequences, and the way to push more tokens through the model."""

    def __init__(
        self,
        executor: Executor,
        programs: Programs,
        embedding: Embedding,
        residents: Residents,
        plan: Plan,
        *,
        batch: int,
    ):
        self.batch, self.capacity, self._most = batch, plan.capacity, plan.chunk
        self._executor, self._programs = executor, programs
        self._embedding = embedding
        self._residents = residents
        self._make_cache = programs.empty_cache(batch=batch, capacity=self.capacity)
        self._caches = None
        self._widths = _stage_widths(executor.tiles)
        self._ready: dict = {}  # (tile, tokens, last) -> its programs; a sweep only looks them up
        self._most_activation_bytes = 0

    @property
    def held_bytes(self) -> int:
        """The most that this batch held on the device beside weights and temporaries: caches,
        activations, logits."""
        caches = sum(leaf.nbytes for leaf in jax.tree.leaves(self._caches))
        return caches + self._most_activation_bytes + self._residents.n_bytes

    @property
    def reads_directly(self) -> bool:
        return self._executor.reads_directly

    def fill(self):
        """Starts the first weights on their way, ahead of the first sweep."""
        self._executor.fill()

    def stream(self):
        """One sweep of the weights alone: all of them move, none is used."""
        self._executor.sweep(lambda tile, arrays: arrays)

    def slot(self, number: int) -> np.ndarray:
        """Host memory of one of the ring's slots, before the first sweep."""
        return self._executor.slot(number)

    def settle(self):
        """Waits until nothing is being read."""
        self._embedding.settle()
        self._executor.settle()

    def compile(self, n_tokens: int, *, every: bool = False):
        """Compiles all that a sweep of `n_tokens` columns needs, ahead of the sweep."""
        sizes = chunks(n_tokens, self._most)
        for size in set(sizes):
            self._programs.embed(self._embedding.parts, batch=self.batch, tokens=size)
        for tile in self._executor.tiles:
            for index, size in enumerate(sizes):
                self._programs_of(tile, size, last=_last(index, sizes, every))

    def sweep(self, ids: list[list[int]], starts: list[int], *, every: bool = False) -> np.ndarray:
        """One sweep over `ids[b]` at positions from `starts[b]` on -> float32 logits on the host.

        [B, 1, V] of each sequence's last token or, with `every`, [B, longest, V] of all, aligned at
        the end. Raises CheckpointError, with the first layer where they appear, for numbers that
        are not finite.
        """
        longest = max(map(len, ids))
        width = self.n_columns(longest) if every else 2
        found = np.empty((self.batch, width, self._programs.cfg.vocab_size), np.float32)

        def take(output, column, row):
            n_columns, n_rows = output.shape[1:]
            found[:, column : column + n_columns, row : row + n_rows] = output

        self._sweep(ids, starts, every, self._run, take)
        self._embedding.settle()
        logits = found[:, -(longest if every else 1) :]
        if not np.isfinite(logits).all():
            self._find_nonfinite(ids, starts)
        return logits

    def score(self, ids: list[list[int]], scores) -> None:
        """One sweep over `ids[b]` from position 0 on, whose logits of all columns go to `scores`
        as they come: `scores.add(output [B, columns, rows], first column, first vocabulary row)`.

        Columns count from the left of the longest row, padding before it included. Raises as
        `sweep` does.
        """
        starts = [0] * len(ids)
        self._sweep(ids, starts, True, self._run, scores.add)
        self._embedding.settle()
        if not scores.are_finite:
            self._find_nonfinite(ids, starts)

    def n_columns(self, longest: int) -> int:
        """The columns of a sweep whose longest row has so many tokens, padding included."""
        return sum(chunks(longest, self._most))

    def _sweep(self, ids, starts, every, run, take):
        longest = max(map(len, ids))
        sizes = chunks(longest, self._most)
        self.compile(longest, every=every)
        passing = self.enter(ids, starts)
        outgoing = _Outgoing(take)
        self._executor.sweep(
            lambda tile, arrays: run(tile, arrays, passing, sizes, every, outgoing)
        )
        self._note_activations(passing, outgoing)
        outgoing.finish()

    def enter(self, ids: list[list[int]], starts: list[int]) -> list[Chunk]:
        """The columns of a sweep as they enter the first layer, on the device, in chunks."""
        if self._caches is None:
            self._caches = [self._make_cache() for _ in range(self._programs.cfg.num_hidden_layers)]
        sizes = chunks(max(map(len, ids)), self._most)
        tokens, positions = columns(ids, starts, sizes, self.capacity)
        return [
            Chunk(self._embed(tokens[:, a:b]), self._put(positions[:, a:b]))
            for a, b in pairwise(np.cumsum((0, *sizes)))
        ]

    def advance(self, tile: Tile, arrays, passing: list[Chunk]) -> list:
        """Every chunk through a layer's tile. Returns what can be waited for."""
        return [self._advance(tile, arrays, chunk) for chunk in passing]

    def _run(self, tile: Tile, arrays, passing, sizes, every, outgoing):
        """What the executor calls for each tile: every chunk through it. Returns what can be waited
        for."""
        if tile.stage == "head":
            return self._run_head(tile, arrays, passing, sizes, every, outgoing)
        return self.advance(tile, arrays, passing)

    def _advance(self, tile, arrays, chunk):
        programs = self._programs_of(tile, chunk.tokens)
        if tile.stage == "block":
            norms = self._residents.layers[tile.layer]
            chunk.hidden, self._caches[tile.layer] = programs["block"](
                arrays, norms, chunk.hidden, self._caches[tile.layer], chunk.positions
            )
            return chunk.hidden
        if tile.stage == "qkv" and chunk.x is None:
            norm = self._residents.layers[tile.layer]["input_layernorm"]
            chunk.x = programs["enter"](chunk.hidden, norm)
        found = programs["rows"](chunk.x, arrays)
        for name, product in zip(_product_names(tile), found, strict=True):
            chunk.products.setdefault(name, []).append(product)
        if tile.ends_stage:
            self._end_stage(tile, programs["end"], chunk)
        return found

    def _end_stage(self, tile, program, chunk):
        """All products of a stage are there: what becomes of them is the next stage's input."""
        products, chunk.products = chunk.products, {}
        if tile.stage == "qkv":
            cache = self._caches[tile.layer]
            chunk.x, self._caches[tile.layer] = program(products, cache, chunk.positions)
        elif tile.stage == "o":
            norm = self._residents.layers[tile.layer]["post_attention_layernorm"]
            chunk.hidden, chunk.x = program(chunk.hidden, products["o_proj"], norm)
        elif tile.stage == "gate_up":
            chunk.x = program(products["inner"])
        else:
            chunk.hidden, chunk.x = program(chunk.hidden, products["down_proj"]), None

    def _run_head(self, tile, arrays, passing, sizes, every, outgoing):
        column, outputs = 0, []
        for index, chunk in enumerate(passing):
            last = _last(index, sizes, every)
            if last:
                program = self._programs_of(tile, chunk.tokens, last=last)["head"]
                outputs.append(program(self._residents.final, arrays, chunk.hidden))
                outgoing.add(outputs[-1], column, tile.parts[0].first_row)
                column += last
        return outputs

    def _programs_of(self, tile, size, last=0):
        """The compiled programs that a chunk of `size` tokens needs at a tile, by what they are
        for."""
        key = (id(tile), size, last)
        if key not in self._ready:
            self._ready[key] = self._make_programs(tile, size, last)
        return self._ready[key]

    def _make_programs(self, tile, size, last):
        make, shape = self._programs, {"batch": self.batch, "tokens": size}
        if tile.stage == "head":
            return {"head": make.head(tile, last=last, **shape)} if last else {}
        if tile.stage == "block":
            return {"block": make.block(tile, capacity=self.capacity, **shape)}
        found = {"rows": make.rows(tile, **shape)}
        if tile.stage == "qkv":
            found["enter"] = make.enter(**shape)
        if tile.ends_stage:
            widths = self._widths[tile.layer, tile.stage]
            found["end"] = {
                "qkv": lambda: make.attend(widths, capacity=self.capacity, **shape),
                "o": lambda: make.project(widths.get("o_proj"), **shape),
                "gate_up": lambda: make.join(widths.get("inner"), **shape),
                "down": lambda: make.leave(widths.get("down_proj"), **shape),
            }[tile.stage]()
        return found

    def _find_nonfinite(self, ids, starts):
        """Runs the same sweep again, looking at every layer's output: it overwrites what it wrote
        before."""

        def run(tile, arrays, passing, *rest):
            output = self._run(tile, arrays, passing, *rest)
            ends_layer = tile.stage in ("block", "down") and tile.ends_stage
            if ends_layer and not all(_is_finite(chunk, self.capacity) for chunk in passing):
                raise CheckpointError(
                    f"layer {tile.layer}: its output is not finite; its weights are damaged, or "
                    f"overflow in {self._programs.dtype}: run jlayer verify (jlayer convert, if it "
                    "is a published folder), or change --dtype"
                )
            return output

        self._sweep(ids, starts, False, run, lambda *_: None)
        raise CheckpointError(
            "logits are not finite, though every layer's output is: the final norm or the head is "
            "damaged; run jlayer verify"
        )

    def _embed(self, tokens):
        """tokens [B, T] -> [B, T, D] on the device, in the run's dtype; padding is some row."""
        batch, size = tokens.shape
        real, row_of = tokens >= 0, np.zeros(tokens.shape, np.int32)
        ids, row_of[real] = np.unique(tokens[real], return_inverse=True)
        rows = {leaf: own[row_of] for leaf, own in self._embedding.read(ids).items()}
        program = self._programs.embed(self._embedding.parts, batch=batch, tokens=size)
        return program(self._put(rows))

    def _put(self, arrays):
        return jax.device_put(arrays, self._executor.device)

    def _note_activations(self, passing, outgoing):
        """A chunk's input and output live side by side; a stage in tiles also holds its input and
        products."""
        hidden = sum(chunk.hidden.nbytes for chunk in passing)
        cfg = self._programs.cfg
        held = 2 * hidden
        if self._executor.tiles[0].stage != "block":
            held += hidden * (cfg.intermediate_size + cfg.hidden_size) // cfg.hidden_size
        held += outgoing.most_device_bytes
        self._most_activation_bytes = max(self._most_activation_bytes, held)


def _last(index, sizes, every):
    """Columns of a chunk that the head looks at: all, or two of the last chunk (one row is slow on
    the CPU)."""
    return sizes[index] if every else 2 if index == len(sizes) - 1 else 0


def _product_names(tile):
    """What a tile's products are called, in the order that its program returns them."""
    if tile.stage == "gate_up":
        return ("inner",)
    return tuple(tile.heights)


def _stage_widths(tiles):
    """(layer, stage) -> by product, the widths that arrive one after another."""
    found = {}
    for tile in tiles:
        if tile.stage in dict(STAGES):
            own = found.setdefault((tile.layer, tile.stage), {})
            for name in _product_names(tile):
                leaf = "gate_proj" if name == "inner" else name
                own[name] = (*own.get(name, ()), tile.heights[leaf])
    return found


def _is_finite(chunk, capacity):
    """Whether the hidden states of real columns are; padding may hold anything."""
    real = np.asarray(chunk.positions) < capacity
    return bool(np.isfinite(np.asarray(chunk.hidden)[real].astype(np.float32)).all())


class _Outgoing:
    """The head's outputs on their way to the host, where `take(output, column, row)` gets them; a
    few stay on the device, so that the transfer does not stop the stream."""

    def __init__(self, take):
        self._take = take
        self._waiting = deque()
        self.most_device_bytes = 0

    def add(self, output, column, row):
        output.copy_to_host_async()
        self._waiting.append((output, column, row))
        waiting = sum(output.nbytes for output, _, _ in self._waiting)
        self.most_device_bytes = max(self.most_device_bytes, waiting)
        while len(self._waiting) >= OUTGOING:
            self._fetch()

    def _fetch(self):
        output, column, row = self._waiting.popleft()
        self._take(np.asarray(output), column, row)

    def finish(self):
        while self._waiting:
            self._fetch()
