"""A server on this machine that speaks what the page asks for, and says what a test tells it to."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from jlayer.serving.page import page

GIB = 2**30
PATIENCE_S = 20.0  # of a test for what must come; nothing that works takes so long
PROGRESS = {
    "place": None,
    "pass": 12,
    "layer": 0,
    "n_layers": 80,
    "seconds_a_pass": 2.4,
    "riders": 1,
    "tokens": 0,
    "max_tokens": 200,
    "eta_s": None,
}


def status(**changes) -> dict:
    """What GET /events says first: 80 layers in all three tiers."""
    return {
        "model": "/models/made-up-70b",
        "context": 8192,
        "n_layers": 80,
        "tiers": ["device"] * 10 + ["host"] * 42 + ["disk"] * 28,
        "pass": 1204,
        "layer": 31,
        "seconds_a_pass": 2.4,
        "riders": 3,
        "queued": 2,
        "queued_batch": 0,
        "tokens_per_s": 1.25,
        "phase": None,
        "memory": {
            "device": {"held": int(3.1 * GIB), "promised": 4 * GIB},
            "host": {"held": 12 * GIB, "promised": 16 * GIB},
        },
        "is_alive": True,
        **changes,
    }


class Asked:
    """One request, and the answer that a test gives it, a call at a time."""

    def __init__(self, number: int, path: str, body: dict, key: str | None):
        self.id, self.path, self.body, self.key = f"req_{number}", path, body, key
        self.is_chat = path.endswith("/chat/completions")
        self.chunks: list[str] = []
        self.is_over = self.is_deleted = False
        self.n_cuts = 0  # how often all its connections are to be dropped
        self.afters: list[str | None] = []  # of each connection: what it had already
        self.changed = threading.Condition()
        self._number = 0  # of the last chunk
        if self.is_chat:
            self.choice(delta={"role": "assistant", "content": ""})

    def progress(self, state: str, **changes) -> Asked:
        found = {"state": state, **PROGRESS, **changes}
        told = {"object": "jlayer.progress", "choices": [], "jlayer": found}
        return self._add(json.dumps(told))

    def say(self, *pieces: str) -> Asked:
        for piece in pieces:
            said = {"delta": {"content": piece}} if self.is_chat else {"text": piece}
            self.choice(**said, finish_reason=None)
        return self

    def reason(self, words: str) -> Asked:
        return self.choice(delta={"reasoning_content": words}, finish_reason=None)

    def choice(self, **choice) -> Asked:
        return self.chunk({"object": "chunk", "choices": [{"index": 0, **choice}]})

    def chunk(self, chunk: dict) -> Asked:
        self._number += 1
        return self._add(json.dumps({"id": self.id, "jlayer_seq": self._number, **chunk}))

    def fail(self, message: str) -> Asked:
        error = {"message": message, "type": "server_error", "param": None, "code": None}
        self._add(json.dumps({"error": error}))
        return self.end(done=False)

    def end(self, finish: str = "stop", *, done: bool = True) -> Asked:
        if done:
            self.choice(delta={}, finish_reason=finish)
            usage = {"prompt_tokens": 30, "completion_tokens": 12}
            self.chunk({"choices": [], "usage": usage})
            self._add("[DONE]")
        with self.changed:
            self.is_over = True
            self.changed.notify_all()
        return self

    def cut(self) -> None:
        """Every connection that reads it ends now, as a network does it."""
        with self.changed:
            self.n_cuts += 1
            self.changed.notify_all()

    def delete(self) -> None:
        with self.changed:
            self.is_deleted = self.is_over = True
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), PATIENCE_S)

    def _add(self, data: str) -> Asked:
        with self.changed:
            self.chunks.append(data)
            self.changed.notify_all()
        return self


@dataclass
class Stub:
    """What the server is to do, and what it was asked.

    `models`: the names that are served. `refusals`: answers (status, message, code) that the next
    posts get. `answers`: what each request that is taken gets at once. `n_lost`: posts that are
    taken, but whose answers are lost on the way. `is_open`: cleared, posts wait until it is set.
    """

    key: str | None = None
    models: tuple[str, ...] = ("made-up-70b",)
    refusals: list[tuple[int, str, str | None]] = field(default_factory=list)
    answers: Callable[[Asked], object] | None = None
    n_lost: int = 0
    is_open: threading.Event = field(default_factory=threading.Event)
    status: dict = field(default_factory=status)
    asked: list[Asked] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    n_watchers: int = 0
    url: str = ""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self):
        self.is_open.set()

    def tell(self, **changes) -> None:
        """To whoever reads /events."""
        with self.changed:
            self.status.update(changes)
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), PATIENCE_S)

    def wait_for_request(self, number: int = 1) -> Asked:
        self.wait(lambda stub: len(stub.asked) >= number)
        return self.asked[number - 1]


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        self.stub.paths.append(url.path)
        if url.path == "/":
            return self._send(200, page.html(), page.headers())
        if url.path == "/favicon.ico":
            return self._send(204, b"", {})
        if self._is_refused():
            return None
        if url.path == "/v1/models":
            return self._json(200, {"data": [{"id": name} for name in self.stub.models]})
        if url.path == "/events":
            return self._events()
        for asked in self.stub.asked:
            if url.path == f"/v1/requests/{asked.id}/stream" and not asked.is_deleted:
                return self._stream(asked, parse_qs(url.query).get("after", [None])[0])
        return self._error(404, "no such path", None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub, key = self.stub, self.headers.get("Idempotency-Key")
        if self._is_refused():
            return None
        assert self.headers["Prefer"] == "respond-async"
        if stub.refusals:
            return self._error(*stub.refusals.pop(0))
        with stub.changed:
            asked = next((each for each in stub.asked if each.key == key), None)
            if asked is None:
                asked = Asked(len(stub.asked) + 1, self.path, body, key)
                if stub.answers is not None:
                    stub.answers(asked)
                stub.asked.append(asked)
                stub.changed.notify_all()
        stub.is_open.wait(PATIENCE_S)
        if stub.n_lost:
            stub.n_lost -= 1
            self.close_connection = True
            return None
        return self._json(202, {"id": asked.id, "status": "queued", "eta_s": None})

    def do_DELETE(self):
        if self._is_refused():
            return None
        for asked in self.stub.asked:
            if self.path == f"/v1/requests/{asked.id}":
                asked.delete()
        return self._json(200, {})

    def _is_refused(self):
        if self.stub.key and self.headers.get("Authorization") != f"Bearer {self.stub.key}":
            self._error(401, "a key is needed", "invalid_api_key")
            return True
        return False

    def _events(self):
        stub, told = self.stub, None
        self._begin_stream()
        with stub.changed:
            stub.n_watchers += 1
            stub.changed.notify_all()
        try:
            while not self._is_gone():
                if told != stub.status:
                    event = "hello" if told is None else "status"
                    told = dict(stub.status)
                    self._write(f": sweep\n\nevent: {event}\ndata: {json.dumps(told)}\n\n")
                with stub.changed:
                    stub.changed.wait(0.02)
        finally:
            with stub.changed:
                stub.n_watchers -= 1
                stub.changed.notify_all()

    def _stream(self, asked, after):
        self._begin_stream()
        with asked.changed:
            asked.afters.append(after)
            n_cuts, at = asked.n_cuts, 0
            asked.changed.notify_all()
        while not self._is_gone():
            with asked.changed:
                fresh, at, is_over = asked.chunks[at:], len(asked.chunks), asked.is_over
                if not fresh and not is_over and asked.n_cuts == n_cuts:
                    asked.changed.wait(0.02)
            for chunk in fresh:
                number = json.loads(chunk).get("jlayer_seq") if chunk != "[DONE]" else None
                # The one that it had already is sent too: it must not be shown twice.
                if after is None or number is None or number >= int(after):
                    self._write(f": a comment\n\ndata: {chunk}\n\n")
            if asked.n_cuts != n_cuts or (is_over and not fresh):
                return

    def _is_gone(self):
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and not self.connection.recv(1)

    def _begin_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()

    def _write(self, words):
        self.wfile.write(words.encode())
        self.wfile.flush()

    def _error(self, code, message, kind):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": kind}
        headers = {"Retry-After": "12"} if code == 429 else {}
        self._json(code, {"error": error}, headers)

    def _json(self, code, found, headers=None):
        self._send(code, json.dumps(found).encode(), headers or {})

    def _send(self, code, body, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A browser that went away is what some tests are about."""


@contextmanager
def serving(**options):
    """Yields a Stub that is served at its `url`."""
    stub = Stub(**options)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        for asked in stub.asked:
            with suppress(Exception):
                asked.delete()
        server.server_close()
        thread.join()
