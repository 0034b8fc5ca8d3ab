"""Continues prompts together: prefill, decode, stop.

One loop serves generate, stream, transformers' interface and the command line. Encoding prompts,
forward passes and sampling are in other modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from jlayer.engine.engine import Engine
from jlayer.engine.lane import Lane, Step
from jlayer.engine.options import SamplingOptions
from jlayer.engine.report import Clock, Stats
from jlayer.errors import UsageError
from jlayer.plan.shapes import RunShape
from jlayer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """A finished text.

    `token_ids`: the new tokens only. `logprobs`: if asked for, a row for each new token, with the
    likeliest tokens. `stats`, `memory`, `plan`: as `generate --json` prints them.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    device: str
    dtype: str
    seed: int | None
    logprobs: list[dict] | None
    stats: dict
    memory: dict
    plan: dict

    def as_dict(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Decoding:
    """One run: prompts that are continued together and share every forward pass.

    Iterate for the steps, then call `generations`. `text`: the tokenizer, if text is wanted. The
    run is admitted when it is made: it must fit the budgets together with all live runs. It holds
    its cache until it ends, is closed or is dropped.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        options: SamplingOptions,
        *,
        text: Tokenizer | None = None,
    ):
        self._engine, self.options = engine, options.seeded() if not options.is_greedy else options
        for prompt in prompts:
            engine.check_ids(prompt)
        limits = []
        for prompt in prompts:
            engine.check_length(len(prompt))
            limits.append(options.new_tokens_limit(len(prompt), context=engine.context_limit))
        if options.stop and text is None:
            raise UsageError(
                "stop: the model has no tokenizer, so text cannot be watched; leave it out"
            )
        # A sequence is numbered among those of its prompt, not in the batch. So the other prompts
        # of the batch do not change it.
        self.lanes = [
            Lane(prompt, options=self.options, limit=limit, number=number, text=text)
            for prompt, limit in zip(prompts, limits, strict=True)
            for number in range(options.num_return_sequences)
        ]
        self._longest = max(map(len, prompts))
        self._forward = engine.start(
            RunShape(
                batch=len(self.lanes),
                longest=self._longest,
                context=max(len(p) + limit for p, limit in zip(prompts, limits, strict=True)),
                sweeps=max(1, *limits),
            )
        )
        self.plan = self._forward.plan
        self.stats = Stats(load_s=engine.load_s, sweep_bytes=self.plan.tiling.n_bytes)
        self._compiles_before = dict(engine.compiles)

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
                seed=self.options.seed,
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
