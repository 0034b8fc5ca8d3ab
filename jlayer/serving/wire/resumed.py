"""A stream that goes on after some tokens: what was told before is not told again.

A position is a number of tokens for each choice. Whatever the passes that a text came in, and even
where it was drawn again after a restart, its tokens are the same; so a position holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jlayer.engine.lane import Step
from jlayer.engine.sample import Choice
from jlayer.errors import JlayerError
from jlayer.serving.wire.asked import Asked, Reader, Texts
from jlayer.serving.wire.errors import invalid
from jlayer.text.stream import StopWatcher, TextStream
from jlayer.text.tokenizer import Tokenizer


def read_position(word: str, n_choices: int) -> list[int]:
    """ "12" or "12,7": of each choice. Raises Refused."""
    parts = word.split(",") if word else ["0"] * n_choices
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise invalid(f"after: found {word[:60]!r}, expected numbers of tokens", param="after")
    if len(parts) != n_choices:
        raise invalid(
            f"after: found {len(parts)} numbers, expected {n_choices}, one a choice", param="after"
        )
    return [int(part) for part in parts]


class ResumedReader(Reader):
    """Tells what comes after `position`, and in each event the position after it."""

    def __init__(
        self,
        asked: Asked,
        jobs: Sequence[Texts],
        position: Sequence[int],
        tokenizer: Tokenizer | None,
    ):
        super().__init__(asked, jobs)
        self._after, self._text = list(position), tokenizer
        self._told = [0] * len(asked.views)  # tokens that the teller has had

    def begin(self):
        events = [self.marked(event) for event in super().begin()]
        return [] if any(self._after) else events

    def marked(self, event: dict) -> dict:
        told = [max(pair) for pair in zip(self._told, self._after, strict=True)]
        return {**event, "jlayer": {"after": told[0] if len(told) == 1 else told}}

    def take(self) -> Iterator[dict]:
        for event in super().take():
            yield self.marked(event)

    def prompt(self, choice, logprobs):
        events = super().prompt(choice, logprobs)
        return events if self._after[choice] == 0 else []

    def step(self, choice, step):
        n, start = len(step.token_ids), self._told[choice]
        n_old = min(n, max(0, self._after[choice] - start))
        if 0 < n_old < n:
            old, step = self._split(choice, step, n_old)
            self.teller.step(choice, old)
        elif n_old:
            self.teller.step(choice, step)
            self._told[choice] = start + n
            return []
        events = self.teller.step(choice, step)
        self._told[choice] = start + n
        return events

    def _split(self, choice, step, n_old):
        """A step as it would have come in two passes."""
        order, sequence = self._asked.views[choice]
        steps = self._jobs[order].sequences[sequence].steps
        before = steps[: next(n for n, each in enumerate(steps) if each is step)]
        ids = [*(token for each in before for token in each.token_ids), *step.token_ids[:n_old]]
        text = _text_after(self._asked.orders[order], ids, self._text)
        text = text[sum(len(each.text) for each in before) :]
        return (
            Step(text, step.token_ids[:n_old], None, step.choices[:n_old]),
            Step(
                step.text[len(text) :],
                step.token_ids[n_old:],
                step.finish_reason,
                step.choices[n_old:],
            ),
        )


def _text_after(order, ids, tokenizer):
    """What of a text is certain after these of its tokens."""
    if tokenizer is None:
        return ""
    stream = TextStream(tokenizer, continues=bool(tokenizer.decode(order.ids)))
    watcher = StopWatcher(order.options.stop)
    return "".join(watcher.feed(stream.step(token)) for token in ids)


# Texts that are over, as they are kept


@dataclass(frozen=True)
class KeptText:
    steps: list[Step]
    finish_reason: str | None


@dataclass(frozen=True)
class KeptJob:
    """In a job's place, for readers."""

    sequences: list[KeptText]
    prompt_logprobs: list | None
    stats: dict = field(default_factory=dict)
    error: JlayerError | None = None
    is_over: bool = True


def kept(job: Texts) -> dict:
    """A job that is over, as JSON."""
    return {
        "sequences": [
            {
                "text": text.text,
                "token_ids": text.token_ids,
                "finish_reason": text.finish_reason,
                "choices": [
                    [choice.token_id, choice.logprob, choice.top]
                    for step in text.steps
                    for choice in step.choices
                ],
            }
            for text in job.sequences
        ],
        "prompt_logprobs": job.prompt_logprobs,
        "stats": {"kept_tokens": (job.stats or {}).get("kept_tokens", 0)},
    }


def kept_job(body: dict) -> KeptJob:
    texts = []
    for text in body["sequences"]:
        choices = tuple(
            Choice(token, logprob, tuple((t, p) for t, p in top))
            for token, logprob, top in text["choices"]
        )
        step = Step(text["text"], tuple(text["token_ids"]), text["finish_reason"], choices)
        texts.append(KeptText([step] if step.token_ids else [], text["finish_reason"]))
    return KeptJob(texts, body["prompt_logprobs"], body["stats"])
