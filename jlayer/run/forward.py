"""One sweep's arithmetic: columns of tokens, in chunks, through every tile; the caches of one batch
of sequences.

Each sequence has its own positions. Columns are padded on the left, so that the last column is
every sequence's last token; a padded column has a position beyond the cache, is never written
there, and what it computes is not looked at.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import jax
import numpy as np

from jlayer.model.params import Layer
from jlayer.run.executor import Executor
from jlayer.run.programs import Programs
from jlayer.weights.budget import capacity_for, chunks
from jlayer.weights.direct import RowReader
from jlayer.weights.store import Part, Tile


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


class Forward:
    """The state of a batch of sequences, and the way to push more tokens through the model.

    `embedding` gathers rows on the host; `norm` is the final norm on the device.
    """

    def __init__(
        self,
        executor: Executor,
        programs: Programs,
        embedding: RowReader,
        embedding_dtype: str,
        norm: tuple[Part, jax.Array],
        *,
        batch: int,
        context: int,
    ):
        self.batch = batch
        self.capacity = capacity_for(context)
        self._executor, self._programs = executor, programs
        self._embedding, self._embedding_dtype = embedding, np.dtype(embedding_dtype)
        self._norm_part, self._norm = norm
        self._layers = programs.cfg.num_hidden_layers
        self._make_cache = programs.empty_cache(batch=batch, capacity=self.capacity)
        self._caches = None
        self._most_activation_bytes = 0

    @property
    def held_bytes(self) -> int:
        """The most that this batch held on the device beside weights and temporaries: caches,
        activations, logits."""
        caches = sum(leaf.nbytes for leaf in jax.tree.leaves(self._caches))
        return caches + self._most_activation_bytes + self._norm.nbytes

    def compile(self, n_tokens: int, *, every: bool = False):
        """Compiles all that a sweep of `n_tokens` columns needs, ahead of the sweep."""
        sizes = chunks(n_tokens)
        for tile in self._executor.tiles:
            for index, size in enumerate(sizes):
                self._program(tile, size, last=self._last(index, sizes, every))

    def sweep(self, ids: list[list[int]], starts: list[int], *, every: bool = False) -> np.ndarray:
        """One sweep over `ids[b]` at positions from `starts[b]` on -> float32 logits on the host.

        [B, 1, V] of each sequence's last token or, with `every`, [B, longest, V] of all, aligned at
        the end.
        """
        longest = max(map(len, ids))
        sizes = chunks(longest)
        self.compile(longest, every=every)
        if self._caches is None:
            self._caches = [self._make_cache() for _ in range(self._layers)]
        tokens, positions = columns(ids, starts, sizes, self.capacity)
        bounds = np.cumsum((0, *sizes))
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        hidden = [self._put(self._embed(tokens[:, span])) for span in spans]
        places = [self._put(positions[:, span]) for span in spans]
        gathered = _Logits(self.batch, sum(sizes) if every else 2, self._programs.cfg.vocab_size)

        def run(tile: Tile, arrays):
            if tile.stage == "block":
                return self._run_block(tile, arrays, hidden, places)
            return self._run_head(tile, arrays, hidden, sizes, every, gathered)

        self._executor.sweep(run)
        # A chunk's input and output live side by side.
        activations = 2 * sum(array.nbytes for array in hidden) + gathered.most_device_bytes
        self._most_activation_bytes = max(self._most_activation_bytes, activations)
        return gathered.take()[:, -(longest if every else 1) :]

    def _run_block(self, tile, arrays, hidden, places):
        layer, cache = Layer(**arrays), self._caches[tile.layer]
        for index, chunk in enumerate(hidden):
            program = self._program(tile, chunk.shape[1])
            hidden[index], cache = program(layer, chunk, cache, places[index])
        self._caches[tile.layer] = cache
        return hidden

    def _run_head(self, tile, arrays, hidden, sizes, every, gathered):
        (part,) = tile.parts
        column, outputs = 0, []
        for index, chunk in enumerate(hidden):
            last = self._last(index, sizes, every)
            if last:
                program = self._program(tile, sizes[index], last=last)
                outputs.append(program(self._norm, arrays[part.leaf], chunk))
                gathered.add(outputs[-1], column, part.first_row)
                column += last
        return outputs

    def _program(self, tile, size, last=0):
        if tile.stage == "block":
            return self._programs.block(tile, batch=self.batch, tokens=size, capacity=self.capacity)
        return self._programs.head(tile, self._norm_part, batch=self.batch, tokens=size, last=last)

    @staticmethod
    def _last(index, sizes, every):
        """Columns of a chunk that the head looks at: all, or two of the last chunk (one row is slow
        on the CPU)."""
        return sizes[index] if every else 2 if index == len(sizes) - 1 else 0

    def _embed(self, tokens):
        """tokens [B, T] -> [B, T, D] in the run's dtype, padding as zeros."""
        found = np.zeros((*tokens.shape, self._programs.cfg.hidden_size), self._programs.dtype)
        real = tokens >= 0
        ids, inverse = np.unique(tokens[real], return_inverse=True)
        rows = self._embedding.read(ids).view(self._embedding_dtype)
        found[real] = rows.astype(self._programs.dtype)[inverse]
        return found

    def _put(self, array):
        return jax.device_put(array, self._executor.device)


class _Logits:
    """Gathers the head's outputs on the host; a few stay on the device, so that the transfer does
    not stop the stream."""

    def __init__(self, batch, n_columns, vocab):
        self._found = np.empty((batch, n_columns, vocab), np.float32)
        self._waiting = deque()
        self.most_device_bytes = 0

    def add(self, output, column, row):
        self._waiting.append((output, column, row))
        waiting = sum(output.nbytes for output, _, _ in self._waiting)
        self.most_device_bytes = max(self.most_device_bytes, waiting)
        while len(self._waiting) > 2:
            self._fetch()

    def _fetch(self):
        output, column, row = self._waiting.popleft()
        n_columns, n_rows = output.shape[1:]
        self._found[:, column : column + n_columns, row : row + n_rows] = output

    def take(self):
        while self._waiting:
            self._fetch()
        return self._found
