"""A request that was accepted: its jobs, and all who wait for news of them.

Jobs tell their news in the desk's thread; here it reaches the loop. When the last one who waits has
left, the jobs are cancelled, unless the request outlives its connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from jlayer.errors import JlayerError
from jlayer.serving.desk import Desk
from jlayer.serving.job import CANCELLED, Job
from jlayer.serving.progress import Progress
from jlayer.serving.wire.asked import Asked, Reader
from jlayer.serving.wire.errors import Refused

GONE = "cancelled"


class Work:
    """See the module. `outlives`: its connections."""

    def __init__(self, asked: Asked, loop: asyncio.AbstractEventLoop, *, outlives: bool = False):
        self.asked, self.outlives = asked, outlives
        self.jobs: list[Job] = []
        self.n_watchers = 0
        self._loop, self._waiting = loop, set()
        self._is_noted = self._is_given_up = False

    def submit(self, desk: Desk) -> None:
        """Hands all orders to the desk, or none; in any thread. Raises what `Desk.submit` does."""
        try:
            for order in self.asked.orders:
                self.jobs.append(desk.submit(order, self._on_news))
            if self._is_given_up:
                self.cancel()
        except BaseException:
            self.cancel()
            raise

    @property
    def is_over(self) -> bool:
        return all(job.is_over for job in self.jobs)

    @property
    def error(self) -> JlayerError | None:
        """Why there will be no more text than there is."""
        for job in self.jobs:
            if job.error is not None:
                return job.error
            if job.state == CANCELLED:
                return Refused(409, "the request was cancelled", code=GONE)
        return None

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    def give_up(self) -> None:
        """Cancels it, also where another thread is still submitting it."""
        self._is_given_up = True
        self.cancel()

    def progress(self) -> Progress:
        """Of the job that ends last, as far as is known."""
        alive = [job for job in self.jobs if not job.is_over] or self.jobs
        found = [job.progress() for job in alive]
        return max(found, key=lambda one: -1.0 if one.eta_s is None else one.eta_s)

    def words(self) -> str:
        """How far it is, for a person."""
        return self.progress().words()

    def reader(self) -> Reader:
        return Reader(self.asked, self.jobs)

    # Who waits, in the loop.

    @contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        """Yields an event that news sets. The last one who leaves ends what nobody waits for."""
        news = asyncio.Event()
        self._waiting.add(news)
        self.n_watchers += 1
        try:
            yield news
        finally:
            self._waiting.discard(news)
            self.n_watchers -= 1
            if not (self.n_watchers or self.outlives or self.is_over):
                # The desk may hold its lock for a while: nothing for the loop to wait on.
                self._loop.run_in_executor(None, self.cancel)

    def _on_news(self, job):
        if not self._is_noted:
            self._is_noted = True
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self):
        self._is_noted = False
        for news in self._waiting:
            news.set()


@dataclass(frozen=True)
class Ended:
    """In the place of work that was over long ago."""

    asked: Asked
    is_over: bool = True
    error: JlayerError | None = None

    @contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        yield asyncio.Event()

    def words(self) -> str:
        return "done"


async def wait_for(news: asyncio.Event, *others: asyncio.Event, seconds: float) -> None:
    """Waits for news, or for one of the others, at most so long; news is taken."""
    waits = [asyncio.ensure_future(event.wait()) for event in (news, *others)]
    try:
        await asyncio.wait(waits, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    news.clear()
