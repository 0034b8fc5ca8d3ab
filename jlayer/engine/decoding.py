"""Runs that continue prompts: admitted whole or in portions, read step by step.

One class serves generate, stream, submit, transformers' interface and the command line. Who rides
in a forward pass, and what is drawn from its logits, is in `scheduler`.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from jlayer.engine.engine import Engine
from jlayer.engine.functions import Functions
from jlayer.engine.generation import Generation
from jlayer.engine.ids import Row
from jlayer.engine.joining import comes_whole, join
from jlayer.engine.kept import Ended
from jlayer.engine.lane import Constraint, Lane, Step
from jlayer.engine.ledger import Ticket
from jlayer.engine.options import DEFAULT_NEW_TOKENS, SamplingOptions
from jlayer.engine.past import Past
from jlayer.engine.report import Account, Clock, Stats
from jlayer.engine.scores import PromptScores, as_json
from jlayer.engine.shaping import shape_of
from jlayer.engine.stops import StopStrings
from jlayer.engine.unguessed import what_is_not_guessed
from jlayer.engine.vectors import check_prompts
from jlayer.errors import DoesNotFitError, UsageError
from jlayer.plan.shapes import RunShape, capacity_for
from jlayer.text.tokenizer import Tokenizer

# Prompts that wait for other runs to end try again after so long.
LOOK_AGAIN_S = 0.05


@dataclass
class Group:
    """A prompt and the sequences that continue it. `shape`: of the run that they are by
    themselves."""

    lanes: list[Lane]
    shape: RunShape


class Decoding:
    """One run: prompts that are continued together, in the forward passes of all live runs.

    `rows`: the prompts. `text`: the tokenizer, where text is wanted; `stop_text`: where it is not,
    and stop strings are looked for as in transformers. Without a seed in `options`, each prompt
    draws one of its own. `most_unread`: so many steps of a sequence may wait to be taken; None: any
    number. `constraint`: what each text may be. `shown`: as of `Lane`.
    `past`: what it goes on from, where it was begun before.
    `functions`: the user's; with them a run has no guesses.

    `lanes`: the sequences that are asked for; `riding`: all that ride for these, such as the beams
    of a search.

    Admitted against the budgets at once, beside the runs that are alive; it holds its cache entries
    until it has ended, is closed or is dropped. Where the budgets hold some of the prompts, the
    others begin as these end. `waits`: even the first one may wait for other runs to end.
    """

    keeps = False  # whether iterating it ends with `keep`, for a run of one prompt
    before_end: Callable[[], None] | None = None  # called when iterating it ends, before `close`

    def __init__(
        self,
        engine: Engine,
        rows: list[Row],
        options: SamplingOptions,
        *,
        text: Tokenizer | None = None,
        stop_text: Tokenizer | None = None,
        most_unread: int | None = 1,
        waits: bool = False,
        constraint: Constraint | None = None,
        shown: Collection[int] = (),
        past: Past | None = None,
        functions: Functions | None = None,
    ):
        self.engine = self._engine = engine
        self.options, self.rows, self._past = options, rows, past
        self.functions, self._comes_whole = functions, comes_whole(options, functions)
        if functions is not None:
            functions.check(options)
        check_prompts(engine, rows, options)
        limits = []
        for row in rows:
            n_prompt = len(row.ids)
            engine.check_length(options.n_computed(n_prompt))
            limits.append(
                options.new_tokens_limit(n_prompt, context=engine.context_limit, width=row.width)
            )
        if options.stop and text is None and stop_text is None:
            found = "stop: the model has no tokenizer, so text cannot be watched; leave "
            raise UsageError(
                f"{found}it out, or overrule the makers' with stop=None",
                command_line=f"{found}--stop out, or take stop_strings out of the makers' file",
            )
        self.stats = Stats(load_s=engine.load_s)
        account, adapter = Account(self.stats), engine.store.adapter_number(options.adapter)
        self._tickets: list[Ticket] = []
        self._boarded, self._is_begun = [], False  # of each prompt the first lane; see `read_kept`
        with engine.turn():  # what fits still does when the run is admitted
            most = self._most_that_fit(rows, limits)
            n_shown = options.num_return_sequences
            # A sequence's number is its place among those of one prompt, not in the batch: so each
            # is what it would be alone.
            self._waiting = deque(
                Group(
                    [
                        Lane(
                            row,
                            options=own,
                            limit=min(limit, most),
                            number=number,
                            account=account,
                            most_unread=most_unread,
                            text=text,
                            stops=None if options.searches else self._stops(row, stop_text),
                            switches_at=engine.cfg.switches_at,
                            constraint=None if constraint is None else constraint.copy(),
                            shown=shown,
                            scores=None if number else PromptScores.of(row, options),
                            adapter=adapter,
                        )
                        for number in range(options.n_lanes)
                    ],
                    self._shape([row], [min(limit, most)]),
                )
                for row, limit in zip(rows, limits, strict=True)
                for own in [options if options.is_greedy else options.seeded()]
            )
            self.riding = [lane for group in self._waiting for lane in group.lanes]
            self.lanes = [lane for group in self._waiting for lane in group.lanes[:n_shown]]
            join(
                *([group.lanes for group in self._waiting], options, functions),
                text=text,
                stop_text=stop_text,
            )
            if past is not None:
                past.take_up(self.lanes)
            self._end = weakref.finalize(self, _leave, self.riding, self._tickets)
            self._begin(self._shape(rows, [min(limit, most) for limit in limits]), waits)
        self._compiles_before = dict(engine.compiles)
        each = options.num_return_sequences
        whole = self._shape(rows, [lane.limit for lane in self.lanes[::each]])
        self.notes = (
            *self._what_was_cut(rows),
            *what_is_not_guessed(self, whole, is_admitted=bool(self._tickets)),
        )

    def _begin(self, shape, waits):
        """Admits all prompts, or the first ones if there is no room for all."""
        try:
            self._admit(shape, list(self._waiting))
            self._waiting.clear()
        except DoesNotFitError:
            if self._comes_whole and len(self._waiting) > 1:
                raise  # rows that are decided together cannot wait for each other's end
            try:
                self._admit_next()
            except DoesNotFitError:
                if not waits or not self._engine.plan_for(shape, alone=True).fits:
                    raise
                self.plan = self._engine.plan
            self.admit_waiting()

    def admit_waiting(self) -> bool:
        """Admits the next prompts, as many as fit now; whether there were any."""
        n_before = len(self._waiting)
        with suppress(DoesNotFitError):
            while self._waiting and not self.is_closed:
                self._admit_next()
        return len(self._waiting) < n_before

    def _admit_next(self):
        group = self._waiting[0]
        self._admit(group.shape, [group])
        self._waiting.popleft()

    def _admit(self, shape, groups):
        lanes = [lane for group in groups for lane in group.lanes]
        with self._engine.turn():
            ticket, tables = self._board(shape, lanes)
        self._tickets.append(ticket)
        if self.is_closed:  # meanwhile, by another thread
            ticket.close()
        self.plan = ticket.plan
        self.stats.sweep_bytes = self.plan.tiling.n_bytes
        for lane, table in zip(lanes, tables, strict=True):
            lane.board(table, capacity_for(shape.context))
        self._boarded += [group.lanes[0] for group in groups]
        if self._is_begun:
            self.read_kept()
        ticket.on_end(lambda: all(not lane.is_alive for lane in lanes))
        self.stats.kept_tokens += len(tables[0])

    def _board(self, shape, lanes):
        """(a ticket, a table for each lane). The first one has the entries of a kept text that
        begins like its own, if there is one: takes over the table of one that it goes on from, and
        shares the rows of one that goes on in another way."""
        if self._past is not None:
            return self._past.board(self._engine, shape, lanes)
        engine, kept, first = self._engine, self._engine.kept, lanes[0]
        alike = first.history[: first.n_shareable + 1]
        how = {"is_long": first.has_switched, "adapter": first.adapter}
        ended, n_alike = kept.find(alike, **how) or (None, 0)
        goes_on = ended is not None and 2 * n_alike >= len(ended.tokens)
        if not goes_on:
            ticket = engine.admit(shape)
            tables = [ticket.table() for _ in lanes]
            if ended is not None and kept.has(ended):
                tables[0].share(ended.table, n_alike)
        else:
            kept.take(ended)
            try:
                ticket = engine.admit(shape, instead_of=ended.ticket)
            except BaseException:
                kept.put(ended)
                raise
            tables = [ticket.take_over(ended.table, ended.ticket)]
            tables[0].cut(n_alike)
            tables += [ticket.table() for _ in lanes[1:]]
        if not tables[0].can_go_on:  # a layer has no more than its window, or its state, at the end
            tables[0].cut(0)
        return ticket, tables

    def read_kept(self) -> None:
        """Begins: reads what is kept on disk of prompts, once they are admitted. Raises
        CheckpointError or StorageError."""
        self._is_begun, lanes, self._boarded = True, self._boarded, []
        if self._engine.prompt_cache is not None and self._past is None:
            clock = Clock()
            with self._engine.turn():
                beside = self._engine.scheduler.lanes
                self.stats.kept_tokens += self._engine.prompt_cache.admit(lanes, beside)
            self.stats.prefill_s += clock.lap()

    def _stops(self, row, stop_text):
        if not self.options.stop or stop_text is None:
            return None
        return StopStrings(self.options.stop, text=stop_text, prompt=row.given)

    def _shape(self, rows, limits):
        """The shape of a run of these prompts, with at most so many new tokens each."""
        batch, sweeps = self.options.n_lanes * len(rows), max(1, *limits)
        guesses, nodes = self._engine.speculation, 0
        if not self._comes_whole:
            nodes = guesses.nodes_for(self.options, batch=batch, sweeps=sweeps)
        return shape_of(self._engine.cfg, rows, limits, self.options, nodes=nodes)

    def _most_that_fit(self, rows, limits):
        """The most new tokens, which what the user did not ask for is cut to: as many as the
        budgets hold a cache for (to 1/256, since a plan of a large model takes a second), but no
        fewer than the default. Of the longest prompt by itself: others may wait for room."""
        most, longest = max(limits), max(rows, key=lambda row: len(row.ids))

        def fits(number):
            with self._engine.kept.aside():
                return self._engine.plan_for(self._shape([longest], [number])).fits

        least = min(most, DEFAULT_NEW_TOKENS)
        if not self.options.lengths_are_published or most == least or fits(most):
            return most
        step = max(1, (most - least) // 256)
        numbers = range(least, most, step)
        return numbers[max(0, bisect_left(numbers, True, key=lambda n: not fits(n)) - 1)]

    def _what_was_cut(self, rows):
        """What the user should hear: that the makers' length does not fit."""
        options = self.options
        if options.length_from is None:
            return ()
        name = "max_length" if options.max_new_tokens is None else "max_new_tokens"
        cut = min(lane.limit for lane in self.lanes)
        wanted = min(options.new_tokens_limit(len(r.ids), width=r.width) for r in rows)
        if cut == wanted:
            return ()
        return (
            f"{options.length_from}: {name} is {getattr(options, name)}, cut to {cut} new tokens, "
            "which the run has room for",
        )

    @property
    def n_guesses(self) -> int:
        """The most guesses of a lane in a forward pass, which there is room for."""
        if not self._tickets:
            return 0
        shape = self._tickets[0].shape
        return shape.nodes // shape.batch

    def __iter__(self) -> Iterator[list[Step | None]]:
        """Yields a list whenever a forward pass has given something: the Step of each sequence,
        None if it has none."""
        try:
            if not self._all_ended():
                yield from self._steps()
        finally:
            self._finish()

    def close(self) -> None:
        """Ends the run now and frees its cache entries."""
        self._end()

    def _finish(self):
        try:
            if self.before_end is not None and not self.is_closed:
                self.before_end()
        finally:
            self.keep() if self.keeps else self.close()

    def keep(self) -> None:
        """Ends a run of one prompt now, and keeps the entries of its first text for a prompt that
        goes on from it, as long as nothing else needs their room."""
        with self._engine.turn():
            (lane, *_), kept = self.lanes, self._engine.kept
            table, is_long = lane.table, lane.is_long
            # What stands for embeddings is known by this process alone, and nothing begins so.
            may_keep = kept.most and not lane.n_embedded
            if not self.is_closed and may_keep and table is not None and len(table):
                (ticket,) = self._tickets
                self._tickets.clear()
                ticket.keep(table, RunShape(context=lane.capacity, entries=len(table)))
                for each in self.riding:  # no other lane shares what will be another one's
                    each.leave_board()
                kept.put(Ended(lane.history[: len(table)], table, ticket, is_long, lane.adapter))
            self.close()

    def suspend(self) -> None:
        """Gives back the entries of a run of one prompt. The texts so far stay, and go on once
        `admit_waiting` finds room again: all their entries are computed anew then."""
        with self._engine.turn():
            if self.is_closed or self._waiting:
                return
            alive = [lane for lane in self.riding if lane.is_alive]
            if not alive:  # nothing goes on
                return
            for lane in self.riding:
                lane.leave_board()
            shape = self._tickets[0].shape
            for ticket in self._tickets:
                ticket.close()
            self._tickets.clear()
            longest = max(len(lane.history) for lane in alive)
            self._waiting.append(Group(alive, replace(shape, longest=longest)))

    @property
    def is_closed(self) -> bool:
        return not self._end.alive

    @property
    def is_waiting(self) -> bool:
        """Whether some of its prompts wait for room."""
        return bool(self._waiting) and not self.is_closed

    @property
    def prompt_logprobs(self) -> list[dict | None] | None:
        """Of the first prompt; None before all of them are there, and where none are wanted."""
        scores = self.lanes[0].scores
        return as_json(scores.found) if scores is not None and scores.is_done else None

    def generations(self) -> list[Generation]:
        """The texts so far; sequences that have not ended are marked as interrupted."""
        for lane in self.lanes:
            lane.interrupt()
        engine, before = self._engine, self._compiles_before
        self.stats.sharpness = engine.speculation.sharpness
        self.stats.reads = "direct" if engine.reads_directly else "buffered"
        self.stats.compiles = {
            shape: n - before.get(shape, 0)
            for shape, n in engine.compiles.items()
            if n > before.get(shape, 0)
        }
        memory = engine.memory()
        return [
            Generation(
                text=lane.text,
                token_ids=lane.token_ids,
                prompt_tokens=lane.n_prompt,
                finish_reason=lane.finish_reason,
                device=engine.device_name,
                dtype=engine.dtype,
                seed=None if lane.options.is_greedy else lane.options.seed,
                logprobs=as_json(lane.choices) if self.options.logprobs is not None else None,
                prompt_logprobs=as_json(scores.found) if scores is not None else None,
                stats=self.stats.as_dict(),
                memory=memory,
                plan=self.plan.as_dict(),
            )
            for lane, scores in zip(self.lanes, self._scores(), strict=True)
        ]

    def _scores(self):
        """Of each lane those of its prompt."""
        each = self.options.num_return_sequences
        return [lane.scores for lane in self.lanes[::each] for _ in range(each)]

    def _steps(self):
        self.read_kept()
        clock, scheduler = Clock(), self._engine.scheduler
        scheduler.join(self.riding)
        filled = scheduler.prepare()
        self.stats.load_read_bytes += filled["read_bytes"]
        self.stats.load_cached_bytes += filled["cached_bytes"]
        self.stats.load_s += clock.lap()
        while True:
            scheduler.advance(self.lanes, once=bool(self._waiting))
            for lane in self.lanes:
                if lane.error and not lane.unread:
                    raise lane.error
            steps = [lane.unread.popleft() if lane.unread else None for lane in self.lanes]
            if self._waiting:
                self._release_ended()
                self.admit_waiting()
            is_over = self._all_ended() and not any(lane.unread for lane in self.lanes)
            if is_over:
                self._finish()  # the entries are free when the caller gets the last step
            elif not any(steps):
                self._wait_for_room()
                continue
            yield steps
            if is_over:
                return

    def _wait_for_room(self):
        """Other runs hold what the next prompt needs: looks again when something has changed."""
        with suppress(TimeoutError):
            self._engine.scheduler.wait_until(lambda: False, timeout=LOOK_AGAIN_S)

    def _release_ended(self):
        """Gives back the entries of prompts that have ended, for those that wait."""
        for ticket in self._tickets:
            if ticket.has_ended():
                ticket.close()

    def _all_ended(self):
        return all(lane.finish_reason for lane in self.lanes)


def _leave(lanes, tickets):
    for lane in lanes:
        lane.has_left = True
    for ticket in tickets:
        ticket.close()
