"""What all requests share: the model once it is open, its desk, and what is under way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from jlayer.api import Model
from jlayer.serving.batch.service import Service
from jlayer.serving.desk import Desk
from jlayer.serving.http.guard import Rules
from jlayer.serving.http.journal import Journal
from jlayer.serving.http.work import Work
from jlayer.serving.http.workers import Workers
from jlayer.serving.wire.errors import Refused, unavailable
from jlayer.serving.wire.served import Served

LOADING_RETRY_S = 5


class Site:
    """`rules`: see `guard`. `journal`: of requests that outlive the server."""

    def __init__(self, rules: Rules | None = None, journal: Journal | None = None):
        self.rules = rules or Rules()
        self.journal = journal
        self.lastings = None  # requests that outlive their connections; the application sets it
        self.batches: Service | None = None  # where there is a folder for them
        self.workers = Workers()
        self.served: Served | None = None
        self.desk: Desk | None = None
        self.phase = "starting"
        self.failure: str | None = None
        self.answered: Counter = Counter()  # by (path, status)
        self.n_running = 0
        self._stopping: asyncio.Event | None = None
        self._by_digest: dict[str, Work] = {}

    def opened(self, model: Model, desk: Desk, **of_served) -> None:
        """From now on requests are answered; called in the loop. `of_served`: see `Served.of`."""
        self.served = Served.of(model, **of_served)
        self.desk = desk
        if self.lastings is not None:
            self.lastings.start()

    def failed(self, message: str) -> None:
        """The model cannot be opened."""
        self.failure = message

    @property
    def stopping(self) -> asyncio.Event:
        """Set once the server is to end; of the loop that asks first."""
        if self._stopping is None:
            self._stopping = asyncio.Event()
        return self._stopping

    @property
    def is_alive(self) -> bool:
        return self.desk is not None and self.desk.is_alive

    def check_ready(self) -> tuple[Served, Desk]:
        """Raises Refused: 503 while the model is opened, when it has failed, at the end."""
        if self.stopping.is_set():
            raise unavailable("the server is stopping", code="stopping")
        if self.failure is not None:
            raise unavailable(f"the model cannot be opened: {self.failure}", code="failed")
        if self.served is None or self.desk is None:
            raise unavailable(
                f"the model is being opened ({self.phase}); try again soon",
                code="loading",
                retry_after_s=LOADING_RETRY_S,
            )
        if not self.desk.is_alive:
            cause = self.desk.failure
            words = "the engine has stopped" if cause is None else f"the engine has failed: {cause}"
            raise unavailable(words, code="engine_dead", retry_after_s=60)
        return self.served, self.desk

    def status(self) -> dict:
        """Of the desk, with the name that clients know. Raises Refused where there is none."""
        served, desk = self.check_ready()
        return {**desk.status().as_dict(), "model": served.name}

    # Works by what was asked, for those who ask again.

    def same(self, digest: str) -> Work | None:
        """What is under way for an equal request, if anybody still waits for it."""
        work = self._by_digest.get(digest)
        return work if work is not None and work.n_watchers and not work.is_over else None

    def remember(self, digest: str, work: Work) -> Callable[[], None]:
        """-> what forgets it again."""
        self._by_digest[digest] = work

        def forget():
            if self._by_digest.get(digest) is work and not work.n_watchers:
                del self._by_digest[digest]

        return forget


def health(site: Site) -> tuple[int, dict]:
    """A status and a body: 503 says why nothing can be asked."""
    try:
        served, _ = site.check_ready()
    except Refused as error:
        return error.status, {"status": error.code, **error.as_dict()}
    return 200, {"status": "ok", "model": served.name}
