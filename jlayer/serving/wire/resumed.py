"""A stream that goes on where another one broke off: what was told before is not told again.

A position counts tokens of each choice, and events after the last of them. Whatever passes a text
came in, and even where it was drawn again after a restart, its tokens are the same; so a position
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jlayer.engine.lane import Step
from jlayer.engine.sample import Choice
from jlayer.errors import JlayerError
from jlayer.serving.wire.asked import Asked, Reader, Texts
from jlayer.serving.wire.errors import invalid
from jlayer.text.stream import StopWatcher, TextStream
from jlayer.text.tokenizer import Tokenizer

PLACES = 64  # events of one token, at most, that are told apart


@dataclass
class Place:
    """How far a choice was told: `tokens`, and how many `events` since the last of them."""

    tokens: int = 0
    events: int = 0

    @property
    def number(self) -> int:
        return self.tokens * PLACES + min(self.events, PLACES - 1)


def read_position(word: str, n_choices: int) -> list[int]:
    """ "812" or "812,70": where each choice was told up to. Raises Refused."""
    parts = word.split(",") if word else ["0"] * n_choices
    if not all(part.isascii() and part.isdecimal() and len(part) < 12 for part in parts):
        raise invalid(f"after: found {word[:60]!r}, expected numbers of a chunk", param="after")
    if len(parts) != n_choices:
        raise invalid(
            f"after: found {len(parts)} numbers, expected {n_choices}, one a choice", param="after"
        )
    return [int(part) for part in parts]


class ResumedReader(Reader):
    """Tells what comes after `position`. Each event has the position after it, as jlayer_seq: a
    number, or one for each choice."""

    def __init__(
        self,
        asked: Asked,
        jobs: Sequence[Texts],
        position: Sequence[int],
        tokenizer: Tokenizer | None,
    ):
        super().__init__(asked, jobs)
        self._after, self._text = list(position), tokenizer
        self._places = [Place() for _ in asked.views]

    def begin(self):
        events = super().begin()
        return [told for n, event in enumerate(events) for told in self._marked(n, [event])]

    def prompt(self, choice, logprobs):
        return self._marked(choice, super().prompt(choice, logprobs))

    def step(self, choice, step):
        place, n = self._places[choice], len(step.token_ids)
        n_told = self._after[choice] // PLACES - place.tokens
        parts = self._split(choice, step, n_told) if 0 < n_told < n else [step]
        found = []
        for part in parts:
            events = super().step(choice, part)
            if part.token_ids:
                place.tokens, place.events = place.tokens + len(part.token_ids), 0
            found += self._marked(choice, events)
        return found

    def finish(self, choice, reason):
        return self._marked(choice, super().finish(choice, reason))

    def end(self, usage):
        """Of no choice, so it is told again and again."""
        events = super().end(usage)
        return [{**event, "jlayer_seq": self._position(0, places=1)} for event in events]

    def _marked(self, choice, events):
        found, place = [], self._places[choice]
        for event in events:
            place.events += 1
            if place.number > self._after[choice]:
                found.append({**event, "jlayer_seq": self._position(choice)})
        return found

    def _position(self, choice, places=0):
        numbers = [
            max(place.number, after) for place, after in zip(self._places, self._after, strict=True)
        ]
        return numbers[0] + places if len(numbers) == 1 else numbers

    def _split(self, choice, step, n_old):
        """A step as it would have come in two passes."""
        order, sequence = self.asked.views[choice]
        steps = self.jobs[order].sequences[sequence].steps
        before = steps[: next(n for n, each in enumerate(steps) if each is step)]
        ids = [*(token for each in before for token in each.token_ids), *step.token_ids[:n_old]]
        text = _text_after(self.asked.orders[order], ids, self._text)
        text = text[sum(len(each.text) for each in before) :]
        return [
            Step(text, step.token_ids[:n_old], None, step.choices[:n_old]),
            Step(
                step.text[len(text) :],
                step.token_ids[n_old:],
                step.finish_reason,
                step.choices[n_old:],
            ),
        ]


def _text_after(order, ids, tokenizer):
    """What of a text is certain after these of its tokens."""
    if tokenizer is None:
        return ""
    continues = bool(tokenizer.decode(order.ids))
    stream = TextStream(tokenizer, continues=continues, shown=order.shown)
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
