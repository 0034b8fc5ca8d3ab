"""A finished text, as whoever asked for it gets it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Generation:
    """A finished text. `token_ids` are the new ones only; `logprobs`, where asked for, has a row
    for each with the likeliest tokens beside it, and `prompt_logprobs` one for each token of the
    prompt, None where it was not scored; `seed` gives it again, None where none was needed;
    `stats`, `memory` and `plan` are as `generate --json` prints them. Printed without the last
    five."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    device: str
    dtype: str
    seed: int | None
    logprobs: list[dict] | None = field(repr=False)
    prompt_logprobs: list[dict | None] | None = field(repr=False)
    stats: dict = field(repr=False)
    memory: dict = field(repr=False)
    plan: dict = field(repr=False)

    def as_dict(self) -> dict:
        return {own.name: getattr(self, own.name) for own in fields(self)}
