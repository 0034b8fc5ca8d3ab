"""A request that was read: its orders, and how what comes of them is told, at once or as it comes.

One way of telling serves both, so a streamed text is the plain one.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from jlayer.engine.lane import Step
from jlayer.errors import JlayerError
from jlayer.serving.job import Order
from jlayer.serving.wire.errors import Refused

encode = msgspec.json.encode


class Texts(Protocol):
    """What is read of a job: see `serving.job.Job`."""

    sequences: list
    prompt_logprobs: list | None
    error: JlayerError | None

    @property
    def is_over(self) -> bool: ...


@dataclass(frozen=True)
class Identity:
    """Of an answer: all its chunks have the same. `created`: when, in seconds."""

    id: str
    created: int


NONE = Identity("", 0)


def new_identity(prefix: str) -> Identity:
    return Identity(f"{prefix}-{secrets.token_hex(12)}", int(time.time()))


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_dict(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Teller(ABC):
    """How the texts of one request become events of a stream, and then one object. Each choice has
    a number; its events come in order."""

    @abstractmethod
    def begin(self) -> list[dict]:
        """Before any text."""

    def prompt(self, choice: int, logprobs: list | None) -> list[dict]:
        """Once the prompt is through, before the steps of this choice."""
        return []

    @abstractmethod
    def step(self, choice: int, step: Step) -> list[dict]: ...

    @abstractmethod
    def finish(self, choice: int, reason: str) -> list[dict]: ...

    @abstractmethod
    def end(self, usage: Usage) -> list[dict]:
        """After all choices."""

    @abstractmethod
    def whole(self, usage: Usage) -> dict:
        """All that was told, as the answer to a request that is not streamed."""

    def framed(self, event: dict) -> bytes:
        """An event as it stands in a stream of server-sent events."""
        return b"data: " + encode(event) + b"\n\n"

    def framed_error(self, error: Refused) -> bytes:
        return self.framed(error.as_dict())

    def body_error(self, error: Refused) -> dict:
        return error.as_dict()

    last: bytes = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Asked:
    """`views`: of each choice, the order and the sequence of it that it shows. `teller`: makes one
    for a reader. `waits_for_prompt`: whether log-probabilities of the prompt are told. `model`: the
    name that it is answered under."""

    orders: tuple[Order, ...]
    views: tuple[tuple[int, int], ...]
    teller: Callable[[], Teller]
    stream: bool = False
    progress: bool = False
    waits_for_prompt: bool = False
    identity: Identity = NONE
    model: str = ""


class Reader:
    """Tells one client what has come of a request since it last looked. Any number may read the
    same jobs, each at its own pace."""

    def __init__(self, asked: Asked, jobs: Sequence[Texts], teller: Teller | None = None):
        self.asked, self.jobs = asked, jobs
        self.teller = asked.teller() if teller is None else teller
        self._read = [0] * len(asked.views)
        self._is_prompt_told = [False] * len(asked.views)
        self._is_finished = [False] * len(asked.views)

    @property
    def is_over(self) -> bool:
        """Whether all is told."""
        return all(self._is_finished)

    @property
    def error(self) -> JlayerError | None:
        """Why nothing more will come, where a text has failed."""
        return next((job.error for job in self.jobs if job.error is not None), None)

    def begin(self) -> list[dict]:
        """Before any text."""
        return self.teller.begin()

    def prompt(self, choice: int, logprobs: list | None) -> list[dict]:
        return self.teller.prompt(choice, logprobs)

    def step(self, choice: int, step: Step) -> list[dict]:
        return self.teller.step(choice, step)

    def finish(self, choice: int, reason: str) -> list[dict]:
        return self.teller.finish(choice, reason)

    def end(self, usage: Usage) -> list[dict]:
        """After all choices."""
        return self.teller.end(usage)

    def take(self) -> Iterator[dict]:
        """The events of what is new."""
        for choice, (order, sequence) in enumerate(self.asked.views):
            if not self._is_finished[choice]:
                yield from self._take(choice, self.jobs[order], sequence)

    def _take(self, choice, job, sequence):
        is_over, text = job.is_over, job.sequences[sequence]
        reason = text.finish_reason  # read before the steps, which are there when it is
        if not self._is_prompt_told[choice]:
            if self.asked.waits_for_prompt and job.prompt_logprobs is None and not is_over:
                return
            self._is_prompt_told[choice] = True
            yield from self.prompt(choice, job.prompt_logprobs)
        for step in text.steps[self._read[choice] :]:
            self._read[choice] += 1
            yield from self.step(choice, step)
        if reason is not None or (is_over and job.error is None):
            self._is_finished[choice] = True
            yield from self.finish(choice, reason or "stop")

    def usage(self) -> Usage:
        """Of what was told."""
        asked = self.asked
        texts = [self.jobs[order].sequences[sequence] for order, sequence in asked.views]
        kept = sum((getattr(job, "stats", None) or {}).get("kept_tokens", 0) for job in self.jobs)
        return Usage(
            sum(len(order.ids) for order in asked.orders),
            sum(
                len(step.token_ids)
                for text, n_read in zip(texts, self._read, strict=True)
                for step in text.steps[:n_read]
            ),
            kept,
        )
