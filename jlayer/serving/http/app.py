"""The application: a table of paths, and what each does with a request."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jlayer.errors import JlayerError
from jlayer.serving.http import batches, metrics
from jlayer.serving.http.answering import StreamAnswer, WholeAnswer, as_json, while_there
from jlayer.serving.http.events import EventsAnswer
from jlayer.serving.http.guard import Guard, refuse
from jlayer.serving.http.lasting import Lastings
from jlayer.serving.http.requests import Requests, is_retry, take
from jlayer.serving.http.site import Site, health
from jlayer.serving.http.work import Work
from jlayer.serving.page import page
from jlayer.serving.wire.asked import Asked
from jlayer.serving.wire.chat import read_chat
from jlayer.serving.wire.completions import read_completion
from jlayer.serving.wire.embeddings import read_embeddings
from jlayer.serving.wire.errors import Refused, invalid, refused
from jlayer.serving.wire.estimate import estimated_of
from jlayer.serving.wire.fields import parse_body
from jlayer.serving.wire.messages import count_tokens, read_messages
from jlayer.serving.wire.served import Served
from jlayer.serving.wire.tokens import (
    detokenize,
    model_list,
    one_model,
    tokenize,
    tokenizer_info,
)

BODY_SILENCE_S = 30.0  # between two parts of a body
MOST_BODIES = 256 << 20  # bytes of all bodies that are being read
EMBEDDINGS = "/v1/embeddings"
PREFIXES = ("/v1/models/", "/v1/requests/", *batches.PATHS)  # of paths that are counted together

Reads = Callable[..., Asked]
# path -> what reads a body to it as orders
GENERATES: dict[str, Reads] = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_completion,
    "/v1/messages": read_messages,
}


def application(site: Site):
    """The ASGI application of a site, with its guard around it."""
    site.lastings = Lastings(site, GENERATES, site.journal)
    handlers, requests = Handlers(site, site.lastings), Requests(site, site.lastings)
    table = [
        ("/", {"GET": handlers.page}),
        ("/favicon.ico", {"GET": handlers.icon}),
        ("/health", {"GET": handlers.health}),
        ("/metrics", {"GET": handlers.metrics}),
        ("/events", {"GET": handlers.events}),
        ("/v1/models", {"GET": handlers.models}),
        ("/v1/models/{name:path}", {"GET": handlers.model}),
        ("/tokenize", {"POST": partial(handlers.plain, tokenize)}),
        ("/v1/messages/count_tokens", {"POST": partial(handlers.plain, count_tokens)}),
        ("/detokenize", {"POST": partial(handlers.plain, detokenize)}),
        ("/tokenizer_info", {"GET": handlers.tokenizer_info}),
        (EMBEDDINGS, {"POST": handlers.embeddings}),
        ("/v1/estimate", {"POST": handlers.estimate}),
        ("/v1/requests/{id}", {"GET": requests.get, "DELETE": requests.delete}),
        ("/v1/requests/{id}/stream", {"GET": requests.stream}),
        *batches.table(site, handlers.body),
        *(
            (path, {"POST": partial(handlers.generate, path, reads)})
            for path, reads in GENERATES.items()
        ),
    ]
    app = Starlette(
        routes=[_route(path, methods) for path, methods in table],
        exception_handlers={
            JlayerError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False
    return Guard(_counted(app, site, [path for path, _ in table]), site.rules)


def _route(path, methods):
    async def dispatch(request: Request):
        method = "GET" if request.method == "HEAD" else request.method
        return await methods[method](request)

    return Route(path, dispatch, methods=list(methods))


class Handlers:
    def __init__(self, site: Site, lastings: Lastings):
        self._site, self._lastings = site, lastings
        self._n_body_bytes = 0

    # What is asked again and again, answered on the loop.

    async def page(self, request):
        return Response(page.html(), headers=page.headers())

    async def icon(self, request):
        return Response(page.icon(), headers=page.icon_headers())

    async def health(self, request):
        status, body = health(self._site)
        return as_json(body, status)

    async def metrics(self, request):
        try:
            status = self._site.status()
        except Refused:
            status = None
        words = metrics.text(status, self._site.answered, connections=self._site.n_running)
        return Response(words, headers={"content-type": metrics.CONTENT_TYPE})

    async def events(self, request):
        self._site.check_ready()
        return EventsAnswer(self._site)

    async def models(self, request):
        served, _ = self._site.check_ready()
        return as_json(model_list(served))

    async def model(self, request):
        served, _ = self._site.check_ready()
        return as_json(one_model(served, request.path_params["name"]))

    async def tokenizer_info(self, request):
        served, _ = self._site.check_ready()
        return as_json(tokenizer_info(served))

    # What has a body.

    async def plain(self, answer: Callable[[dict, Served], dict], request):
        """A body in, an object out, and nothing of the engine."""
        served, _ = self._site.check_ready()
        raw = await self.body(request)
        work = self._site.workers.run(lambda: answer(parse_body(raw), served))
        return as_json(await while_there(work, request.receive))

    async def estimate(self, request):
        served, desk = self._site.check_ready()
        raw = await self.body(request)
        work = self._site.workers.run(lambda: estimated_of(parse_body(raw), served, desk.estimate))
        return as_json(await while_there(work, request.receive))

    async def generate(self, path: str, reads: Reads, request):
        self._site.check_ready()
        raw = await self.body(request)
        found = await take(self._lastings, path, request, raw, client=client_of(request))
        if found is not None:
            return found
        return await self._answer(path, reads, raw, request)

    async def embeddings(self, request):
        """On its connection alone: there is no text that could be taken up later."""
        self._site.check_ready()
        raw = await self.body(request)
        return await self._answer(EMBEDDINGS, read_embeddings, raw, request)

    async def _answer(self, path, reads, raw, request):
        site, client = self._site, client_of(request)
        digest = hashlib.sha256(path.encode() + b"\0" + raw).hexdigest()
        work = site.same(digest) if is_retry(request) else None
        if work is None:
            work = await while_there(self.begun(reads, raw, client=client), request.receive)
        answer = StreamAnswer if work.asked.stream else WholeAnswer
        return _Forgetting(answer(work, site.stopping), site.remember(digest, work))

    async def begun(self, reads: Reads, raw: bytes, *, client: str) -> Work:
        return await self.submitted(await self.read(reads, raw, client=client))

    async def read(self, reads: Reads, raw: bytes, *, client: str) -> Asked:
        served, _ = self._site.check_ready()
        return await self._site.workers.run(lambda: reads(parse_body(raw), served, client=client))

    async def submitted(self, asked: Asked) -> Work:
        _, desk = self._site.check_ready()
        loop = asyncio.get_running_loop()
        work = Work(asked, loop)
        try:
            await self._site.workers.run(work.submit, desk)
        except asyncio.CancelledError:  # the client has left; the desk may have it already
            loop.run_in_executor(None, work.give_up)
            raise
        return work

    async def body(self, request: Request) -> bytes:
        """All of it. Raises Refused: it does not come, or too much comes from everybody."""
        if request.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise Refused(415, "Content-Encoding: found a compressed body; send it as it is")
        parts, n_bytes = [], 0
        chunks = request.stream()
        try:
            while True:
                async with asyncio.timeout(BODY_SILENCE_S):
                    part = await anext(chunks, None)
                if part is None:
                    return b"".join(parts)
                n_bytes += len(part)
                self._n_body_bytes += len(part)
                parts.append(part)
                if self._n_body_bytes > MOST_BODIES:
                    raise Refused(503, "too many large bodies at a time; try again", code="busy")
        except TimeoutError:
            raise Refused(
                408, f"the body: nothing came for {BODY_SILENCE_S:.0f} s", code="timeout"
            ) from None
        finally:
            self._n_body_bytes -= n_bytes


def client_of(request: Request) -> str:
    return "" if request.client is None else request.client.host


class _Forgetting:
    """An answer, after which its work is remembered no longer."""

    def __init__(self, answer, forget):
        self._answer, self._forget = answer, forget

    async def __call__(self, scope, receive, send):
        try:
            await self._answer(scope, receive, send)
        finally:
            self._forget()


def _counted(app, site, paths):
    """Counts answers by path and status; of unknown paths only that there were some."""

    async def counting(scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                site.answered[known, message["status"]] += 1
            await send(message)

        path = scope["path"]
        known = path if path in paths else next((p for p in PREFIXES if path.startswith(p)), "*")
        site.n_running += 1
        try:
            await app(scope, receive, sending)
        finally:
            site.n_running -= 1

    return counting


class _ErrorAnswer:
    def __init__(self, error: Refused):
        self._error = error

    async def __call__(self, scope, receive, send):
        await refuse(scope, receive, send, self._error)


async def _on_error(request, error):
    return _ErrorAnswer(refused(error))


async def _on_http_error(request, error):
    headers, path = dict(error.headers or {}), request.scope["path"][:200]
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(headers.get("Allow", "").split(", ")))
        message = f"{request.method} {path}: not a method of this path"
        return _ErrorAnswer(Refused(405, message, code="method_not_allowed", headers=headers))
    if error.status_code == 404:
        message = f"{path}: there is no such path"
        return _ErrorAnswer(Refused(404, message, code="unknown_path"))
    return _ErrorAnswer(Refused(error.status_code, str(error.detail), headers=headers))


async def _on_disconnect(request, error):
    return _ErrorAnswer(invalid("the client left", param=None))


async def _on_bug(request, error):
    """It is raised again, so the log has its traceback."""
    return _ErrorAnswer(
        Refused(500, f"a bug in jlayer ({type(error).__name__}); see the server's log", code="bug")
    )
