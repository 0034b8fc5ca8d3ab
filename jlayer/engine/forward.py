"""Forward passes of a caller's own: a fixed batch of lanes whose tokens are given, not drawn.

For logits, evaluation and measurements. Lanes that are continued are in `scheduler`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np

from jlayer.engine.alone import layer_seconds, stream
from jlayer.engine.batch import NONE, Entry, arrange
from jlayer.engine.chunk import Chunk
from jlayer.engine.home import Home
from jlayer.engine.ledger import Ticket
from jlayer.errors import StorageError, UsageError
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import capacity_for
from jlayer.plan.tiles import Tile

Vectors = Sequence[np.ndarray | None] | None  # of each lane


class Forward:
    """A run of a caller: the tables of its lanes, and forward passes of more tokens.

    Close it to free its cache entries.
    """

    def __init__(self, engine: Home, ticket: Ticket, *, adapter: int = NONE):
        """`adapter`: the number of the one that its rows are computed with."""
        self.plan: Plan = ticket.plan
        self._adapter = adapter
        self._engine, self._ticket = engine, ticket
        self._tables = [ticket.table() for _ in range(ticket.shape.batch)]
        self._capacity = capacity_for(ticket.shape.context)
        self._end = weakref.finalize(self, ticket.close)

    def close(self) -> None:
        """Frees the cache entries. The run cannot be used afterwards."""
        self._end()

    @property
    def rows(self) -> np.ndarray:
        """The pool rows of the first lane's entries."""
        return self._tables[0].rows

    def fill(self):
        """Starts reading the first weights, ahead of the first forward pass."""
        with self._entered() as executor:
            executor.fill()

    def stream(self):
        """One sweep without arithmetic: all weights move, none is used."""
        with self._entered() as executor:
            stream(executor)

    def layer_seconds(self, n_tokens: int) -> list[float]:
        """See `alone.layer_seconds`: with so many tokens, after `compile`."""
        ids = [(7 * i) % self._engine.cfg.vocab_size for i in range(n_tokens)]
        with self._entered() as executor:
            parts, new = self._parts([ids], [0], False)
            try:
                return layer_seconds(self._engine, executor, parts)
            finally:
                for rows in new:
                    self._engine.caches.pool.release(rows)

    def settle(self):
        """Waits for all reads in progress."""
        self._engine.embedding.settle()
        with self._entered() as executor:
            executor.settle()

    def compile(self, n_tokens: int, *, all_logits: bool = False):
        """Compiles all programs of a forward pass of `n_tokens` tokens a lane, ahead of it."""
        with self._entered() as executor:
            parts = self._stand_in(n_tokens, all_logits)
            self._engine.sweeper.compile(executor, parts)

    def pretend(self, n_positions: int) -> None:
        """Fills every lane up to `n_positions` with entries of zeros, as if so many tokens had gone
        before: for measurements."""
        with self._entered():
            for table in self._tables:
                n_more = n_positions - len(table)
                if n_more > 0:
                    pool = self._engine.caches.pool
                    most = max((window.n_behind for window in pool.windows), default=0)
                    table.commit(pool.take(n_more, n_seen=most))

    def sweep(
        self,
        ids: Sequence[list[int]],
        starts: Sequence[int],
        *,
        all_logits: bool = False,
        vectors: Vectors = None,
    ) -> np.ndarray:
        """One forward pass over `ids[b]` at positions from `starts[b]` on -> float32 logits on the
        host.

        [B, 1, V] of the last token of each lane; with `all_logits` [B, T, V] of all tokens, of
        lanes with the same number of them. Entries from `starts[b]` on are replaced. `vectors`: of
        each lane [T, D] in place of its ids, or None.
        Raises CheckpointError for values that are not finite, with the first layer that gives one.
        """
        n_wanted = len(ids[0]) if all_logits else 1
        logits = np.empty((len(ids) * n_wanted, self._engine.cfg.vocab_size), np.float32)

        def take(output, places, row):
            logits[places, row : row + output.shape[1]] = output

        how = {"all_logits": all_logits, "vectors": vectors}
        self._run(ids, starts, take, lambda: np.isfinite(logits).all(), **how)
        return logits.reshape(len(ids), n_wanted, -1)

    def verify(self, tokens: Sequence[int], parents: Sequence[int]) -> np.ndarray:
        """One forward pass over a tree below the entries of the first lane, as one that verifies
        guesses: float32 logits [rows, V]. The lane stays as it was.

        `parents`: of each token the number of its parent, an earlier one, or -1.
        """
        engine, table = self._engine, self._tables[0]
        logits = np.empty((len(tokens), engine.cfg.vocab_size), np.float32)

        def take(output, places, row):
            logits[places, row : row + output.shape[1]] = output

        with self._entered() as executor:
            pool = engine.caches.pool
            engine.caches.make_room()
            new = pool.take(len(tokens))
            try:
                entry = Entry(
                    *(tokens, table.rows, new, self._capacity, len(tokens), tuple(parents)),
                    is_long=self._is_long(len(table) + 1),
                    source=table.source,
                    target=table.target,
                    adapter=self._adapter,
                )
                parts = self._arrange([entry])
                engine.sweeper.run(executor, parts, take)
            finally:
                pool.release(new)
            engine.note_peaks()
        return logits

    def score(
        self,
        ids: Sequence[list[int]],
        scores,
        *,
        vectors: Vectors = None,
        without: Sequence[frozenset[int]] = (),
    ) -> None:
        """One forward pass over `ids[b]` from position 0 on; passes slices of the logits to
        `scores.add(output [W, v], places [W], first vocabulary row)`: tokens are numbered lane by
        lane. `vectors`: as of `sweep`. `without`: of each lane, the layers that it passes over; the
        entries are not to be gone on from then. Raises what `sweep` raises.
        """
        how = {"all_logits": True, "vectors": vectors, "without": without}
        self._run(ids, [0] * len(ids), scores.add, lambda: scores.are_finite, **how)

    def observe(self, ids: Sequence[list[int]], seen: Callable[[int, Chunk], None]) -> None:
        """One forward pass over `ids[b]` from position 0 on, all on the device. Calls `seen(layer,
        chunk)` for each chunk after each layer, and before the first one with layer -1:
        `chunk.flow["hidden"]` [R, D] is what comes out, of padding too. Raises what `sweep` raises.
        """

        def advance(tile, arrays, passing):
            if tile is executor.tiles[0]:
                for chunk in passing:
                    seen(-1, chunk)
            found = self.advance(tile, arrays, passing)
            if tile.ends_layer and tile.kind is not None:
                for chunk in passing:
                    seen(tile.layer, chunk)
            return found

        with self._entered() as executor:
            parts, new = self._parts(ids, [0] * len(ids), False)
            finite = []

            def take(logits, places, row):
                finite.append(bool(np.isfinite(logits[: len(places)]).all()))

            try:
                self._engine.sweeper.run(executor, parts, take, advance=advance)
                if not all(finite):
                    raise self._engine.sweeper.find_nonfinite(executor, parts)
            finally:
                for rows in new:
                    self._engine.caches.pool.release(rows)
            self._engine.note_peaks()

    def enter(
        self, ids: Sequence[list[int]], starts: Sequence[int], *, all_logits: bool = False
    ) -> list[Chunk]:
        """Embeds the rows of a forward pass: the chunks for the first layer, on the device. The
        entries are committed."""
        with self._entered() as executor:
            parts, new = self._parts(ids, starts, all_logits)
            self._commit(new)
            return self._engine.sweeper.begin(executor, parts)

    def advance(self, tile: Tile, arrays, passing: Sequence[Chunk]) -> list:
        """Moves every chunk through a tile; see `Sweeper.advance`."""
        return self._engine.sweeper.advance(tile, arrays, passing)

    @contextmanager
    def _entered(self):
        if not self._end.alive:
            raise UsageError("this run is closed; start another one")
        with self._engine.turn() as executor:
            yield executor

    def _run(self, ids, starts, take, are_finite, **how):
        engine = self._engine
        with self._entered() as executor:
            parts, new = self._parts(ids, starts, **how)
            try:
                engine.sweeper.run(executor, parts, take)
                if not are_finite():
                    raise engine.sweeper.find_nonfinite(executor, parts)
            except BaseException:
                for rows in new:
                    engine.caches.pool.release(rows)
                raise
            self._commit(new)
            engine.note_peaks()

    def _parts(self, ids, starts, all_logits, *, vectors=None, without=()):
        """(the chunks of a forward pass, the pool rows that it writes to)."""
        pool = self._engine.caches.pool
        for table, start, tokens in zip(self._tables, starts, ids, strict=False):
            if start and self._is_long(start + len(tokens)) and not self._is_long(start):
                raise UsageError(
                    f"a text of more than {self._engine.cfg.switches_at} tokens has another rotary "
                    "embedding: compute all of it anew, from its first token"
                )
            table.cut(start)
            if len(table) < start or not table.can_go_on:
                raise StorageError(
                    "the cache was lost when the device failed, or a layer has kept no more than "
                    "its window or its state; start again from the first token"
                )
        self._engine.caches.make_room()
        chunk = self._engine.plan.chunk
        new = [pool.take(len(tokens), chunk=chunk) for tokens in ids]
        entries = [
            Entry(
                *(tokens, table.rows, rows, self._capacity),
                wanted=len(tokens) if all_logits else 1,
                is_long=self._is_long(len(table) + len(tokens)),
                source=table.source,
                target=table.target,
                n_kept=len(tokens),
                adapter=self._adapter,
                vectors=own,
                without=passed,
            )
            for tokens, table, rows, own, passed in zip(
                *(ids, self._tables, new, vectors or [None] * len(ids)),
                without or [frozenset()] * len(ids),
                strict=False,
            )
        ]
        return self._arrange(entries), new

    def _is_long(self, n_tokens):
        limit = self._engine.cfg.switches_at
        return limit is not None and n_tokens > limit

    def _arrange(self, entries):
        pool, engine = self._engine.caches.pool, self._engine
        return arrange(
            entries,
            pool=pool.n_rows,
            most=engine.plan.chunk,
            windows=pool.windows,
            switches=engine.cfg.switches_at is not None,
            slots=pool.n_slots * pool.has_state,
        )

    def _commit(self, new):
        for table, rows in zip(self._tables, new, strict=False):
            table.commit(rows)

    def _stand_in(self, n_tokens, all_logits):
        """Chunks of the same shapes as those of a pass of `n_tokens` tokens a lane."""
        none = np.zeros(0, np.int32)
        entry = Entry(
            [0] * n_tokens,
            none,
            np.zeros(n_tokens, np.int32),
            self._capacity,
            wanted=n_tokens if all_logits else 1,
        )
        return self._arrange([entry] * len(self._tables))
