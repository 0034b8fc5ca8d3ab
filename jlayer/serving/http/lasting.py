"""Requests that outlive their connections: accepted with an id, asked after as often as need be.

A client opts in by `Prefer: respond-async` or an `Idempotency-Key`. What was accepted is answered
once, whoever asks how often, and with a journal also after a crash: seeds are drawn on acceptance,
so a text that is drawn again is the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from jlayer.errors import JlayerError
from jlayer.serving.desk import Stopping
from jlayer.serving.http.answering import whole
from jlayer.serving.http.journal import Journal
from jlayer.serving.http.site import Site
from jlayer.serving.http.work import Work, wait_for
from jlayer.serving.queue import QueueFull
from jlayer.serving.starts import NotNoted
from jlayer.serving.wire.asked import Asked, Identity
from jlayer.serving.wire.errors import Refused, failed, invalid, refused
from jlayer.serving.wire.fields import parse_body
from jlayer.serving.wire.resumed import KeptJob, kept, kept_job

MOST_KEPT = 1000  # answers that nobody has deleted; the oldest go first
MOST_BYTES = 256 << 20  # of their requests
MOST_KEY = 255
LOOK_AGAIN_S = 2.0  # for room in the queue, of what was accepted before a restart
FULL_AGAIN_S = 10.0  # for room on a disk that was full


@dataclass
class Lasting:
    """One of them. `ended`: {"status", "body", "jobs"} once it is answered."""

    id: str
    path: str
    raw: str
    client: str
    key: str | None
    digest: str
    identity: Identity
    seeds: list[int | None]
    model: str
    ended: dict | None = None
    asked: Asked | None = None
    work: Work | None = None
    task: asyncio.Task | None = None
    is_forgotten: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # begun, or ended

    def as_record(self) -> dict:
        names = ("id", "path", "raw", "client", "key", "digest", "seeds", "model")
        found = {name: getattr(self, name) for name in names}
        return {**found, "identity": [self.identity.id, self.identity.created]}

    @classmethod
    def of_record(cls, record: dict) -> Lasting:
        rest = {**record, "identity": Identity(*record["identity"])}
        return cls(**rest)

    @property
    def status(self) -> str:
        if self.ended is not None:
            return "done" if self.ended["status"] == 200 else "failed"
        states = set() if self.work is None else {job.state for job in self.work.jobs}
        return "running" if states - {"queued", "failed"} else "queued"  # failed: the server ends

    def jobs(self) -> list | list[KeptJob]:
        """For a reader: of what runs, or of what was kept."""
        if self.ended is not None and self.ended.get("jobs") is not None:
            return [kept_job(each) for each in self.ended["jobs"]]
        return [] if self.work is None else self.work.jobs


class Lastings:
    """All of them. `reads`: by path, what reads a body; `journal`: None to keep them in memory."""

    def __init__(self, site: Site, reads: dict[str, Callable], journal: Journal | None = None):
        self._site, self._reads, self._journal = site, reads, journal
        self._starts = None if journal is None else journal.starts
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="jlayer-journal")
        self._by_id: dict[str, Lasting] = {}
        self._by_key: dict[str, asyncio.Future[Lasting]] = {}
        self._retries: dict[str, Lasting] = {}  # by digest, while they run

    def __len__(self) -> int:
        return len(self._by_id)

    def start(self) -> None:
        """Goes on with what the journal has; in the loop, once the model is open."""
        records = [] if self._journal is None else list(self._journal.requests.values())
        self._end_starts({record["id"] for record in records if "ended" in record})
        for record in records:
            one = Lasting.of_record(record)
            self._enter(one)
            if one.ended is None:
                one.task = asyncio.ensure_future(self._answer(one))

    def close(self) -> None:
        self._disk.shutdown()
        if self._journal is not None:
            self._journal.close()

    def find(self, request_id: str) -> Lasting:
        """Raises Refused where there is none."""
        found = self._by_id.get(request_id)
        if found is None:
            raise Refused(
                404, f"request {request_id[:100]!r} is not known here", code="request_not_found"
            )
        return found

    async def accept(
        self, path: str, raw: bytes, *, client: str, key: str | None, is_retry: bool
    ) -> Lasting:
        """A new one, or the one that this is a retry of. Raises what reading and submitting do, and
        Refused where the key stands for something else."""
        digest = hashlib.sha256(path.encode() + b"\0" + raw).hexdigest()
        if key is None:
            known = self._retries.get(digest) if is_retry else None
            return known or await self._accept(path, raw, digest, client=client, key=None)
        if not key.isprintable() or len(key) > MOST_KEY:
            raise invalid(f"Idempotency-Key: expected 1 to {MOST_KEY} characters", param=None)
        if key in self._by_key:
            known = await asyncio.shield(self._by_key[key])
            if known.digest != digest:
                raise Refused(
                    422,
                    "Idempotency-Key: was used with another request; take a new key for this one",
                    code="idempotency_key_reused",
                )
            return known
        waiting = self._by_key[key] = asyncio.get_running_loop().create_future()
        try:
            one = await self._accept(path, raw, digest, client=client, key=key)
        except BaseException as error:
            del self._by_key[key]
            waiting.set_exception(error if isinstance(error, JlayerError) else _again())
            waiting.exception()  # nobody may have waited for it
            raise
        waiting.set_result(one)
        return one

    async def _accept(self, path, raw, digest, *, client, key):
        site = self._site
        served, desk = site.check_ready()
        asked = await site.workers.run(
            lambda: self._reads[path](parse_body(raw), served, client=client)
        )
        asked, seeds = _seeded(asked)
        one = Lasting(
            f"req-{secrets.token_hex(12)}",
            path,
            raw.decode(),
            client,
            key,
            digest,
            asked.identity,
            seeds,
            asked.model,
            asked=asked,
        )
        work = self._work(one)
        await site.workers.run(work.submit, desk)
        try:
            await self._write(lambda journal: journal.accept(one.as_record()))
        except BaseException:
            await site.workers.run_later(work.cancel)
            raise
        one.work = work
        self._enter(one)
        self._retries[digest] = one
        one.task = asyncio.ensure_future(self._answer(one))
        await self._forget_oldest()
        return one

    def _enter(self, one):
        self._by_id[one.id] = one
        if one.key is not None and one.key not in self._by_key:
            done = asyncio.get_running_loop().create_future()
            done.set_result(one)
            self._by_key[one.key] = done

    async def _answer(self, one):
        """Sees one to its end, which is written down; nothing of it where the server ends first."""
        try:
            await self._work_through(one)
            if isinstance(one.work.error, Stopping):
                return
            error = None if one.work.error is None else failed(one.work.error)
            body = whole(one.work) if error is None else error.as_dict()
            jobs = [kept(job) for job in one.work.jobs]
        except JlayerError as found:
            if isinstance(found, Stopping) or refused(found).status == 503:
                return
            error = refused(found)
            body, jobs = error.as_dict(), None
        ended = {"status": 200 if error is None else error.status, "body": body, "jobs": jobs}
        if not one.is_forgotten:
            await self._write(lambda journal: journal.end(one.id, ended))
            self._end_starts({one.id})
            one.ended, one.work = ended, None
            one.changed.set()
        self._retries.pop(one.digest, None)

    async def _work_through(self, one):
        """Waits until its work is over."""
        while True:
            if one.work is None:
                one.work = await self._begun_again(one)
            one.changed.set()
            with one.work.watched() as news:
                while not one.work.is_over:
                    await wait_for(news, seconds=60)
            if one.is_forgotten or not isinstance(one.work.error, NotNoted):
                return
            one.work = None  # it was accepted, so it waits for room on the disk
            await wait_for(asyncio.Event(), self._site.stopping, seconds=FULL_AGAIN_S)

    async def _begun_again(self, one) -> Work:
        """After a restart."""
        site = self._site
        if self._starts is not None:
            self._starts.check(one.id)
        await self.read(one, begins=True)
        work = self._work(one)
        while True:
            try:
                _, desk = site.check_ready()
                await site.workers.run_later(work.submit, desk)
                return work
            except QueueFull as full:  # it was accepted, so it waits for room
                work.jobs.clear()
                seconds = min(LOOK_AGAIN_S, full.retry_after_s)
                await wait_for(asyncio.Event(), site.stopping, seconds=seconds)

    def _work(self, one):
        """Its start is written down before it begins."""
        asked, starts = one.asked, self._starts
        if starts is not None:
            orders = (replace(order, start=starts.of(one.id)) for order in asked.orders)
            asked = replace(asked, orders=tuple(orders))
        return Work(asked, asyncio.get_running_loop(), outlives=True)

    def _end_starts(self, ids):
        if self._starts is not None:
            self._starts.end_of(ids)

    async def read(self, one: Lasting, *, begins: bool = False) -> Asked:
        """The request as it was read when it came. `begins`: to be begun, so it counts as that."""
        if one.asked is not None:
            return one.asked
        served, _ = self._site.check_ready()

        def reading():
            counts = begins and self._starts is not None
            with self._starts.reading(one.id) if counts else nullcontext():
                body = parse_body(one.raw.encode())
                read = self._reads[one.path]
                return read(body, served, client=one.client, identity=one.identity)

        asked = await self._site.workers.run_later(reading)
        one.asked, _ = _seeded(asked, one.seeds)
        return one.asked

    async def forget(self, one: Lasting) -> None:
        """Ends it, wherever it is; nobody is told of it any more."""
        one.is_forgotten = True
        await self._write(lambda journal: journal.forget(one.id))
        self._by_id.pop(one.id, None)
        self._retries.pop(one.digest, None)
        if one.key is not None:
            self._by_key.pop(one.key, None)
        if one.work is not None and one.ended is None:
            await self._site.workers.run_later(one.work.cancel)
        self._end_starts({one.id})

    async def _forget_oldest(self):
        n_bytes = sum(len(one.raw) for one in self._by_id.values())
        for one in list(self._by_id.values()):
            if len(self._by_id) <= MOST_KEPT and n_bytes <= MOST_BYTES:
                return
            if one.ended is not None:
                n_bytes -= len(one.raw)
                await self.forget(one)

    async def _write(self, write: Callable[[Journal], None]):
        if self._journal is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._disk, write, self._journal)


def _seeded(asked, seeds=None):
    """What was asked with a seed for each prompt, so that it can be drawn again."""
    orders = []
    for number, order in enumerate(asked.orders):
        options = order.options
        if not options.is_greedy:
            own = options.seed if seeds is None else seeds[number]
            options = replace(options, seed=own).seeded()
        orders.append(replace(order, options=options))
    found = [order.options.seed for order in orders]
    return replace(asked, orders=tuple(orders)), found


def _again():
    return Refused(409, "the first request with this key has failed; send it again", code="again")
