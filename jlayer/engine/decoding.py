"""Continues prompts together: prefill, decode, stop.

One loop serves generate, stream, transformers' interface and the command line. Encoding prompts,
forward passes and sampling are in other modules.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from jlayer.engine.engine import Engine
from jlayer.engine.ids import Row
from jlayer.engine.lane import Lane, Step
from jlayer.engine.options import DEFAULT_NEW_TOKENS, SamplingOptions
from jlayer.engine.report import Clock, Stats
from jlayer.engine.stops import StopStrings
from jlayer.errors import UsageError
from jlayer.plan.shapes import RunShape
from jlayer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """A finished text. `token_ids` are the new ones only; `logprobs`, where asked for, has a row
    for each with the likeliest tokens beside it; `seed` gives it again, None where none was needed;
    `stats`, `memory` and `plan` are as `generate --json` prints them. Printed without the last
    four."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    device: str
    dtype: str
    seed: int | None
    logprobs: list[dict] | None = field(repr=False)
    stats: dict = field(repr=False)
    memory: dict = field(repr=False)
    plan: dict = field(repr=False)

    def as_dict(self) -> dict:
        return {own.name: getattr(self, own.name) for own in fields(self)}


class Decoding:
    """One run: prompts that are continued together and share every forward pass.

    `rows`: the prompts. `text`: the tokenizer, where text is wanted; `stop_text`: where it is not,
    and stop strings are looked for as in transformers. Without a seed in `options`,
    each prompt draws one of its own. Admitted against the budgets at once, beside the
    runs that are alive; it holds its cache until it has ended, is closed or is dropped.
    """

    def __init__(
        self,
        engine: Engine,
        rows: list[Row],
        options: SamplingOptions,
        *,
        text: Tokenizer | None = None,
        stop_text: Tokenizer | None = None,
    ):
        self._engine, self.options = engine, options
        for row in rows:
            engine.check_ids(row.ids, begin=options.bos_token_id)
        limits = []
        for row in rows:
            n_prompt = len(row.ids)
            engine.check_length(n_prompt)
            limits.append(
                options.new_tokens_limit(
                    n_prompt, context=engine.context_limit, width=len(row.given)
                )
            )
        if options.stop and text is None and stop_text is None:
            found = "stop: the model has no tokenizer, so text cannot be watched; leave "
            raise UsageError(
                f"{found}it out, or overrule the makers' with stop=None",
                command_line=f"{found}--stop out, or take stop_strings out of the makers' file",
            )
        self._longest = max(len(row.ids) for row in rows)
        n_lanes = len(rows) * options.num_return_sequences
        ends = [(len(row.ids), limit) for row, limit in zip(rows, limits, strict=True)]
        with engine.turn():  # what fits still does when the run is admitted
            most = self._most_that_fit(ends, n_lanes)
            self._forward = engine.start(self._shape(ends, n_lanes, most))
        # A sequence's number is its place among those of one prompt, not in the batch: so each is
        # what it would be alone.
        self.lanes = [
            Lane(
                row,
                options=own,
                limit=min(limit, most),
                number=number,
                text=text,
                stops=self._stops(row, stop_text),
            )
            for row, limit in zip(rows, limits, strict=True)
            for own in [options if options.is_greedy else options.seeded()]
            for number in range(options.num_return_sequences)
        ]
        self.plan = self._forward.plan
        self.stats = Stats(load_s=engine.load_s, sweep_bytes=self.plan.tiling.n_bytes)
        self._compiles_before = dict(engine.compiles)
        self.notes = self._what_was_cut(rows)

    def _stops(self, row, stop_text):
        if not self.options.stop or stop_text is None:
            return None
        return StopStrings(self.options.stop, text=stop_text, prompt=row.given)

    def _shape(self, ends, n_lanes, most):
        """`ends`: (prompt tokens, most new ones) of each prompt; `most`: of all of them."""
        return RunShape(
            batch=n_lanes,
            longest=self._longest,
            context=max(n_prompt + min(limit, most) for n_prompt, limit in ends),
            sweeps=max(1, *(min(limit, most) for _, limit in ends)),
        )

    def _most_that_fit(self, ends, n_lanes):
        """The most new tokens, which what the user did not ask for is cut to: as many as the
        budgets hold a cache for (to 1/256, since a plan of a large model takes a second), but no
        fewer than the default."""
        most = max(limit for _, limit in ends)

        def fits(number):
            return self._engine.plan_for(self._shape(ends, n_lanes, number)).fits

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
        wanted = min(options.new_tokens_limit(len(r.ids), width=len(r.given)) for r in rows)
        if cut == wanted:
            return ()
        return (
            f"{options.length_from}: {name} is {getattr(options, name)}, cut to {cut} new tokens, "
            "which the run has room for",
        )

    def __iter__(self) -> Iterator[list[Step | None]]:
        """Yields one list after each forward pass: a Step for each sequence, None if it has
        ended."""
        try:
            if not self._all_ended():
                yield from self._steps()
        finally:
            self.close()

    def close(self) -> None:
        """Ends the run now and frees its cache."""
        self._forward.close()

    def generations(self) -> list[Generation]:
        """The texts so far; sequences that have not ended are marked as interrupted."""
        for lane in self.lanes:
            lane.interrupt()
        engine, before = self._engine, self._compiles_before
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
                logprobs=_logprobs(lane.choices) if self.options.logprobs is not None else None,
                stats=self.stats.as_dict(),
                memory=memory,
                plan=self.plan.as_dict(),
            )
            for lane in self.lanes
        ]

    def _steps(self):
        clock, forward = Clock(), self._forward
        forward.compile(self._longest)
        forward.compile(1)
        forward.fill()
        self.stats.load_s += clock.lap()
        ids, starts = [lane.history for lane in self.lanes], [0] * len(self.lanes)
        while True:
            clock.lap()
            logits = forward.sweep(ids, starts)
            steps = [
                None if lane.finish_reason else lane.draw(row[-1])
                for lane, row in zip(self.lanes, logits, strict=True)
            ]
            self._count(clock.lap(), steps)
            if self._all_ended():
                forward.close()  # the cache is free when the caller gets the last step
                yield steps
                return
            yield steps
            # An ended sequence continues as padding: removing its row would change the shape.
            ids = [[] if lane.finish_reason else lane.history[-1:] for lane in self.lanes]
            starts = [len(lane.history) - 1 for lane in self.lanes]

    def _all_ended(self):
        return all(lane.finish_reason for lane in self.lanes)

    def _count(self, seconds, steps):
        stats = self.stats
        if stats.sweeps == 0:
            stats.prefill_s = seconds
        else:
            stats.decode_s += seconds
            stats.decode_sweeps += 1
        stats.sweeps += 1
        stats.new_tokens += sum(step is not None for step in steps)
        stats.moved = dict(self._forward.moved)
        stats.reads = "direct" if self._forward.reads_directly else "buffered"


def _logprobs(choices):
    return [
        {"token_id": c.token_id, "logprob": c.logprob, "top": [list(pair) for pair in c.top]}
        for c in choices
    ]
