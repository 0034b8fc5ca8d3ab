"""Feeds a batch's lines to the desk and writes each one down when it is answered.

Some hundreds of lines are asked ahead, so that every forward pass carries as many as there is room
for; people go before them. The reading of bodies and the form of answers are an Answerer's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Protocol

from jlayer.errors import JlayerError
from jlayer.interrupts import STOPS
from jlayer.serving.batch.journal import Journal
from jlayer.serving.batch.lines import Line, Lines
from jlayer.serving.batch.names import Names
from jlayer.serving.desk import Desk, Stopping
from jlayer.serving.job import DONE, Job, Order
from jlayer.serving.queue import QueueFull
from jlayer.serving.starts import GivenUp, PartStarts

MOST_AHEAD = 768  # texts asked and not yet answered: those that ride, and some that wait
MOST_UNWRITTEN = 256  # lines refused one after another, until they are written
LOOK_AGAIN_S = 0.1  # for a signal, or room in the queue


class Question(Protocol):
    """A request that was read."""

    @property
    def orders(self) -> Sequence[Order]: ...


class Answerer(Protocol):
    """What a request's body means, and what its answer looks like."""

    def ask(self, url: str, body: dict) -> Question:
        """Raises JlayerError where the body is wrong."""
        ...

    def tell(self, question: Question, jobs: Sequence[Job]) -> dict:
        """The body of the answer, once all jobs are done."""
        ...

    def refuse(self, error: JlayerError, *, has_begun: bool) -> tuple[int, dict]:
        """The status and OpenAI's body for an error. `has_begun`: of texts that had begun."""
        ...


@dataclass(eq=False)
class _Asked:
    """A line and what was asked for it: a job for each order, as far as the desk took them."""

    line: Line
    question: Question
    orders: list[Order]
    jobs: list[Job] = field(default_factory=list)

    @property
    def n_texts(self) -> int:
        return sum(order.options.num_return_sequences for order in self.orders)

    @property
    def is_over(self) -> bool:
        return len(self.jobs) == len(self.orders) and all(job.is_over for job in self.jobs)


class Run:
    """One pass through a batch's lines, from where its journal is.

    `client`: whom the desk counts its orders for. `starts`: of its lines, by number. `pause` is
    called many times a second, and ends the run by what it raises. Every thread may read the
    counts: `n_lines` of which `n_before` had their answer when it began, `n_done` that have it now,
    `n_refused` of these with an error.
    """

    def __init__(
        self,
        desk: Desk,
        answerer: Answerer,
        lines: Lines,
        journal: Journal,
        names: Names,
        *,
        client: str = "batch",
        starts: PartStarts | None = None,
        pause: Callable[[], None] = lambda: None,
        most_ahead: int | None = None,
    ):
        self._desk, self._answerer, self._journal, self._names = desk, answerer, journal, names
        self._client, self._pause, self._starts = client, pause, starts or PartStarts()
        self._most_ahead = most_ahead or MOST_AHEAD
        self._lines = (line for line in lines if line.custom_id not in journal.finished)
        self._again: deque[Line] = deque()
        self._asked: dict[_Asked, None] = {}  # in order
        self._waiting: _Asked | None = None  # for the queue to have room
        self._news: SimpleQueue[_Asked] = SimpleQueue()
        self._unwritten: list[tuple[int, dict]] = []  # by the number of its line
        self._n_good = 0
        self._failed_at: dict[int, int] = {}  # line -> how many were good when it failed
        self.n_lines, self.n_before = len(lines), len(journal.finished)
        self.prompt_tokens = self.new_tokens = 0
        self.first_refusal: str | None = None  # its line and what is wrong with it
        self.began = time.monotonic()

    @property
    def n_done(self) -> int:
        return len(self._journal.finished)

    @property
    def n_refused(self) -> int:
        return self._journal.n_refused

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def lines_per_s(self) -> float:
        return (self.n_done - self.n_before) / max(self.seconds, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """Until all lines are answered, at the speed so far; None before the first one is."""
        if self.n_done == self.n_before:
            return None
        return (self.n_lines - self.n_done) / self.lines_per_s

    def run(self) -> None:
        """Answers all lines. What is answered is written, also where this ends with an error."""
        try:
            while self._feed():
                self._gather(LOOK_AGAIN_S)
                self._pause()
        except STOPS:
            with suppress(JlayerError):  # the signal is what ends it
                self._gather(0)
            raise
        finally:
            for asked in self._asked:
                for job in asked.jobs:
                    job.cancel()

    def _feed(self):
        """Asks for as many lines as may be ahead; whether any is still to be answered."""
        ahead = sum(asked.n_texts for asked in self._asked)
        while self._waiting or ahead < self._most_ahead:
            asked, self._waiting = self._waiting or self._next(), None
            if asked is None:
                break
            if not self._submit(asked):
                self._waiting = asked
                break
            ahead += asked.n_texts
        if not self._asked:
            self._write()
        return bool(self._asked)

    def _next(self):
        """The next line whose body is right; those before it are refused."""
        while line := next(self._lines, None) or (self._again and self._again.popleft()):
            if len(self._unwritten) >= MOST_UNWRITTEN:
                self._write()
                self._pause()
            try:
                self._starts.check(line.number)
                with self._starts.reading(line.number):
                    question = self._answerer.ask(line.url, line.body)
            except JlayerError as error:
                self._refuse(line, error)
                continue
            orders = [self._own(line, n, order) for n, order in enumerate(question.orders)]
            return _Asked(line, question, orders)
        return None

    def _own(self, line, n, order):
        options = order.options
        if options.seed is None and not options.is_greedy:
            options = replace(options, seed=self._names.seed(line.custom_id, n))
        return replace(
            order,
            options=options,
            client=self._client,
            is_batch=True,
            keeps=False,
            start=self._starts.of(line.number),
        )

    def _submit(self, asked):
        """Whether the desk has taken, or refused, all of a line; False where it has no room."""
        self._asked[asked] = None

        def listen(job):
            if job.is_over:
                self._news.put(asked)

        try:
            for order in asked.orders[len(asked.jobs) :]:
                asked.jobs.append(self._desk.submit(order, listen))
        except QueueFull:
            return False
        except Stopping:
            raise
        except JlayerError as error:
            del self._asked[asked]
            for job in asked.jobs:
                job.cancel()
            self._refuse(asked.line, error)
        return True

    def _gather(self, wait_s):
        """Writes the lines that are answered, once there is one; those of a pass together."""
        news, failure = [], None
        try:
            news.append(self._news.get(timeout=wait_s) if wait_s else self._news.get_nowait())
            while True:
                news.append(self._news.get_nowait())
        except Empty:
            pass
        for asked in dict.fromkeys(news):
            if asked.is_over and asked in self._asked:
                del self._asked[asked]
                try:
                    self._finish(asked)
                except JlayerError as error:
                    failure = failure or error
        self._write()
        if failure is not None:
            raise failure

    def _finish(self, asked):
        error = next((job.error for job in asked.jobs if job.error is not None), None)
        if error is not None:
            self._refuse(asked.line, error, has_begun=True)
        elif all(job.state == DONE for job in asked.jobs):
            body = self._answerer.tell(asked.question, asked.jobs)
            body["id"] = self._names.answer(asked.line.custom_id, body["id"])
            self._answer(asked.line, 200, body)
            self._n_good += 1
            self.prompt_tokens += body["usage"]["prompt_tokens"]
            self.new_tokens += body["usage"]["completion_tokens"]

    def _refuse(self, line, error, *, has_begun=False):
        """Answers a line with its error. One that is not its fault, such as a disk's, has the line
        asked again after all others; if then nothing was answered meanwhile, it ends the run."""
        if isinstance(error, Stopping):
            raise error
        status, body = self._answerer.refuse(error, has_begun=has_begun)
        if status >= 500 and not isinstance(error, GivenUp):
            n_before = self._failed_at.get(line.number)
            if n_before is None:
                self._failed_at[line.number] = self._n_good
                self._again.append(line)
                return
            if n_before == self._n_good:
                raise error
        if self.first_refusal is None:
            self.first_refusal = f"line {line.number}: {status}, {body['error']['message']}"
        self._answer(line, status, body)

    def _answer(self, line, status, body):
        answer = {
            "id": self._names.line(line.custom_id),
            "custom_id": line.custom_id,
            "response": {
                "status_code": status,
                "request_id": self._names.request(line.custom_id),
                "body": body,
            },
            "error": None,
        }
        self._unwritten.append((line.number, answer))

    def _write(self):
        if self._unwritten:
            self._journal.add(answer for _, answer in self._unwritten)
            self._starts.end(number for number, _ in self._unwritten)
            self._unwritten = []
