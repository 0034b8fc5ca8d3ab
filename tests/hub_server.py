"""A small server on this machine that speaks the hub's endpoints, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")


@dataclass
class Hub:
    """What the server holds, how it is to fail, and what it was asked.

    `models`: repository -> file name -> bytes. `denies`: a path's part -> (status, headers, how
    many times). `cuts`: file name -> after how many bytes the connection is closed, once. `holds`:
    file name -> what is waited for in the middle of it.
    """

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", "v1")
    token: str | None = None
    denies: dict[str, tuple[int, dict[str, str], int]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    holds: dict[str, threading.Event] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""

    def fetched(self) -> set[str]:
        """Names of files of which bytes were sent."""
        return {name for name, n_bytes in self.sent.items() if n_bytes}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        for part, (status, headers, left) in list(self.hub.denies.items()):
            if part in path and left:
                self.hub.denies[part] = (status, headers, left - 1)
                return self._refuse(status, headers)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, {"X-Error-Code": "GatedRepo"})
        found = _INFO.fullmatch(path) or _RESOLVE.fullmatch(path)
        if found is None or found["repo"] not in self.hub.models:
            return self._refuse(404, {"X-Error-Code": "RepoNotFound"})
        if found["revision"] not in (*self.hub.revisions, COMMIT):
            return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.models[found["repo"]]
        if found.re is _INFO:
            return self._send(200, json.dumps(_info(found["repo"], files)).encode(), {}, "")
        if found["name"] not in files:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        return self._file(found["name"], files[found["name"]], with_body=with_body)

    def _file(self, name, data, *, with_body):
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if not with_body:
            return self._send(200, data, headers, "")
        status, asked = 200, self.headers.get("Range")
        if asked:
            begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[begin:]
        return self._send(status, data, headers, name)

    def _refuse(self, status, headers):
        self._send(status, b"", {**headers, "X-Error-Message": "no"}, "")

    def _send(self, status, data, headers, name):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(name, None)
        data = data[:cut]
        if name in self.hub.holds:
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.hub.sent[name] = self.hub.sent.get(name, 0) + half
            self.hub.holds[name].wait(60)
            data = data[half:]
        with suppress(ConnectionError):  # a client may leave
            self.wfile.write(data)
        if name:
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(data)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _info(repo, files):
    siblings = []
    for name, data in files.items():
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        siblings.append({"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs})
    return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}


def serve(hub: Hub):
    """Starts it; returns what stops it."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    return stop


@contextmanager
def library_turned_to(hub: Hub, cache, monkeypatch):
    """The server, with huggingface_hub in this process turned to it, and a cache of its own."""
    from huggingface_hub import constants

    stop = serve(hub)
    for name, value in {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # what lies between two tries
    # What the library asks of the hub on its own account, it would ask of the real one here. It
    # has no public switch for that, so this is the one private name that the tests set.
    nothing = {"standardEnvVars": [], "harnesses": {}}
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", nothing, raising=False)
    try:
        yield hub
    finally:
        stop()
