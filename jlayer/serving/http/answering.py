"""How an answer flows: as a stream of server-sent events, or whole.

A stream is never silent for long: comments say how far the passes are. (openai-python breaks at
`id:` and `retry:` lines and at named events, so there are none.) A whole answer that takes long is
kept up by blank lines, which JSON allows. Both end the work as soon as their client has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jlayer.serving.http.work import Ended, Work, wait_for
from jlayer.serving.wire.asked import Reader, encode
from jlayer.serving.wire.errors import Refused, failed, unavailable

Result = TypeVar("Result")
Message = MutableMapping
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

SILENCE_S = 4.0  # of a stream: proxies and clients are promised 5
PATIENCE_S = 20.0  # of a whole answer, before and between blank lines
PROGRESS_S = 0.5  # between two reports as JSON
STUCK_S = 300.0  # a client that takes nothing for so long has left
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)
JSON_HEADERS = ((b"content-type", b"application/json"),)


def as_json(body: dict, status: int = 200, headers: dict | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")


class Left(Exception):
    """The client has gone, or takes nothing any more."""


def stopping_error() -> Refused:
    return unavailable("the server is stopping; ask again when it is back", code="stopping")


async def headers_only(send: Send) -> None:
    """The answer to HEAD where GET gives a stream: one without end would hold the connection."""
    await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def beside_disconnect(work: Awaitable, receive: Receive) -> None:
    """Awaits `work`, and gives it up when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        with suppress(Left, asyncio.CancelledError):
            await task


async def while_there(work: Awaitable[Result], receive: Receive) -> Result:
    """What `work` returns or raises. It is cancelled when the client leaves first, and
    ClientDisconnect is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class Writer:
    """Writes the body of an answer that takes long."""

    def __init__(self, send: Send):
        self._send = send
        self.has_begun = False
        self.written = monotonic()  # when

    async def begin(self, status: int, headers: tuple) -> None:
        self.has_begun = True
        message = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await self._write(message)

    async def write(self, body: bytes) -> None:
        await self._write({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        await self._write({"type": "http.response.body", "body": body, "more_body": False})

    async def _write(self, message):
        """A client may read slowly, which holds up nobody else: the texts wait in their jobs."""
        try:
            async with asyncio.timeout(STUCK_S):
                await self._send(message)
        except (TimeoutError, OSError):
            raise Left from None
        self.written = monotonic()

    def silent_until(self, seconds: float) -> float:
        """How long until nothing was written for `seconds`."""
        return self.written + seconds - monotonic()


class StreamAnswer:
    """An ASGI application that streams what comes of `work`. `reader`: where it goes on from."""

    def __init__(self, work: Work | Ended, stopping: asyncio.Event, reader: Reader | None = None):
        self._work, self._stopping = work, stopping
        self._reader = work.reader() if reader is None else reader
        self._progressed = 0.0

    async def __call__(self, scope, receive: Receive, send: Send):
        if scope["method"] == "HEAD":
            return await headers_only(send)
        await beside_disconnect(self._stream(Writer(send)), receive)

    async def _stream(self, out):
        with self._work.watched() as news:
            await out.begin(200, STREAM_HEADERS)
            await out.write(self._comment() + self._framed(self._reader.begin()))
            while not self._reader.is_over:
                fresh = self._framed(self._reader.take())
                if fresh:
                    await out.write(fresh)
                if fresh or self._reader.is_over:
                    continue
                error = self._error()
                if error is not None:
                    await out.end(self._reader.teller.framed_error(error))
                    return
                await wait_for(news, self._stopping, seconds=self._silent_for(out))
                await self._tell_progress(out)
            usage = self._reader.usage()
            await out.end(self._framed(self._reader.end(usage)) + self._reader.teller.last)

    def _error(self):
        if self._work.is_over and self._work.error is not None:
            return failed(self._work.error)
        return stopping_error() if self._stopping.is_set() else None

    def _silent_for(self, out):
        seconds = out.silent_until(SILENCE_S)
        return min(seconds, PROGRESS_S) if self._work.asked.progress else seconds

    async def _tell_progress(self, out):
        now = monotonic()
        if self._work.asked.progress and now - self._progressed >= PROGRESS_S:
            self._progressed = now
            await out.write(self._reader.teller.framed(self._progress()))
        elif out.silent_until(SILENCE_S) <= 0:
            await out.write(self._comment())

    def _progress(self):
        return {
            "id": self._work.asked.identity.id,
            "object": "jlayer.progress",
            "created": self._work.asked.identity.created,
            "choices": [],
            "jlayer": self._work.progress().as_dict(),
        }

    def _comment(self):
        return f": {self._work.words()}\n\n".encode()

    def _framed(self, events):
        return b"".join(self._reader.teller.framed(event) for event in events)


class WholeAnswer:
    """An ASGI application that answers once all of `work` is there."""

    def __init__(self, work: Work, stopping: asyncio.Event):
        self._work, self._stopping = work, stopping

    async def __call__(self, scope, receive: Receive, send: Send):
        await beside_disconnect(self._answer(Writer(send)), receive)

    async def _answer(self, out):
        work = self._work
        with work.watched() as news:
            while not (work.is_over or self._stopping.is_set()):
                await wait_for(news, self._stopping, seconds=out.silent_until(PATIENCE_S))
                if not work.is_over and out.silent_until(PATIENCE_S) <= 0:
                    if not out.has_begun:
                        await out.begin(200, JSON_HEADERS)
                    await out.write(b"\n")
            # Before it is cancelled, since nobody waits for it any more.
            is_over, error = work.is_over, work.error
        status, body, headers = 200, None, {}
        if is_over and error is None:
            body = whole(work)
        else:
            error = failed(error) if is_over else stopping_error()
            status, headers = error.status, error.headers
            body = work.reader().teller.body_error(error)
        raw = encode(body)
        if not out.has_begun:
            more = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            length = (b"content-length", str(len(raw)).encode())
            await out.begin(status, (*JSON_HEADERS, length, *more))
        await out.end(raw)


def whole(work: Work) -> dict:
    """All that has come of work that is over."""
    reader = work.reader()
    reader.begin()
    for _ in reader.take():
        pass
    return reader.teller.whole(reader.usage())
