"""A request as its client sees it: what was asked for, and what has come of it so far."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from jlayer.engine.decoding import Decoding
from jlayer.engine.lane import Constraint, Step
from jlayer.engine.options import SamplingOptions
from jlayer.errors import JlayerError
from jlayer.serving.progress import Progress
from jlayer.serving.starts import Start

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
OVER = (DONE, FAILED, CANCELLED)


@dataclass(frozen=True)
class Order:
    """A prompt, and how it is continued; `options.num_return_sequences` texts of it.

    `constraint`: what each text may be. `shown`: special tokens that stand in the text all the
    same. `client`: whom fairness and limits count it for. `is_batch`: people come first. `keeps`:
    whether its cache entries stay for a prompt that goes on from it. `start`: what is written down
    before its first pass, where it outlives the server. `pooling`: of the prompt's final hidden
    states, where these are wanted. `is_counted`: in the limits of the queue; the first one of a
    request is, where its others may be many.
    """

    ids: tuple[int, ...]
    options: SamplingOptions
    constraint: Constraint | None = None
    shown: tuple[int, ...] = ()
    client: str = ""
    is_batch: bool = False
    keeps: bool = False
    start: Start | None = None
    pooling: str | None = None
    is_counted: bool = True

    @property
    def is_last_try(self) -> bool:
        return self.start is not None and self.start.is_last


@dataclass
class Text:
    """A text of a job: its steps so far. The list only grows, so any thread may read it."""

    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token for step in list(self.steps) for token in step.token_ids]

    @property
    def text(self) -> str:
        return "".join(step.text for step in list(self.steps))


class Job:
    """An order that was taken. Any thread may read it, wait for it or cancel it.

    `error`: why it has failed. `listener(job)` is called at news: it must not wait for anything.
    """

    def __init__(
        self,
        order: Order,
        *,
        limit: int,
        cancel: Callable[[Job], None],
        progress: Callable[[Job], Progress],
        listener: Callable[[Job], None] | None = None,
    ):
        self.id = secrets.token_hex(12)
        self.order, self.limit = order, limit
        self.state = QUEUED
        self.sequences = [Text() for _ in range(order.options.num_return_sequences)]
        self.error: JlayerError | None = None
        self.prompt_logprobs: list[dict | None] | None = None
        self.stats: dict | None = None  # once it is over, if it has begun
        self.seed: int | None = None  # that it was drawn with
        self.listener = listener
        self.decoding: Decoding | None = None  # the desk's
        self.n_suspended = 0
        self.is_noted = order.start is None  # its start is on disk, or `start_error` says why not
        self.start_error: JlayerError | None = None
        self._cancel, self._progress = cancel, progress
        self._ended = threading.Event()

    @property
    def client(self) -> str:
        return self.order.client

    @property
    def is_batch(self) -> bool:
        return self.order.is_batch

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def n_tokens(self) -> int:
        """New tokens of all its texts."""
        return sum(len(each.token_ids) for each in self.sequences)

    def cancel(self) -> None:
        """Ends it now, wherever it is; what there is of it stays."""
        self._cancel(self)

    def progress(self) -> Progress:
        return self._progress(self)

    def wait(self, timeout: float | None = None) -> Job:
        """Waits until it is over. Raises TimeoutError."""
        if not self._ended.wait(timeout):
            raise TimeoutError
        return self

    def end(self, state: str, error: JlayerError | None = None) -> None:
        """The desk's: it is over."""
        if self.is_over:
            return
        self.error, self.state, self.decoding = error, state, None
        self._ended.set()
        self.tell()

    def tell(self) -> None:
        if self.listener is not None:
            self.listener(self)
