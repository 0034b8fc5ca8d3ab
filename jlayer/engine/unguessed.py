"""What a user should hear of guesses that a run does without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from jlayer.engine.engine import Engine
from jlayer.engine.lane import Lane
from jlayer.engine.options import SamplingOptions
from jlayer.plan.shapes import RunShape


class Run(Protocol):
    """See `Decoding`."""

    engine: Engine
    options: SamplingOptions
    lanes: Sequence[Lane]

    @property
    def n_guesses(self) -> int: ...


def what_is_not_guessed(run: Run, shape: RunShape, *, is_admitted: bool) -> Iterator[str]:
    """That there is no room for the guesses that were asked for, or that the draft model's context
    is too short. `shape`: of the run with all the guesses that it asks for.
    `is_admitted`: whether some of its prompts are."""
    engine, options = run.engine, run.options
    wanted, found = shape.nodes // shape.batch, run.n_guesses
    is_asked = options.draft_tokens is not None or (engine.draft is not None and not found)
    if is_admitted and found < wanted and is_asked:
        missing = None if engine.n_alive > 1 else engine.shortage(shape)
        yield (
            f"draft_tokens: {found or 'no'} guesses a forward pass instead of {wanted}; "
            + (missing or "the other runs that are alive leave no room for more")
        )
    longest = max(lane.n_prompt + lane.limit for lane in run.lanes)
    drafts = engine.draft is not None and options.speculate in ("auto", "draft") and found
    if drafts and longest > engine.draft.context_limit:
        limit = engine.draft.context_limit
        rest = "come from the text alone" if options.speculate == "auto" else "end"
        yield (
            f"draft: {engine.draft.folder} has a context of {limit} tokens, the run of up to "
            f"{longest}: guesses {rest} after {limit}"
        )
