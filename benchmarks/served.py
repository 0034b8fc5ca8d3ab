"""A real `jlayer serve` of the bundled model, and its clients: what serving.py measures with.

Everything stays on this machine: the server listens at 127.0.0.1, and the clients ask nobody else.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUNDLED = REPOSITORY / "jlayer" / "data" / "fable-3m"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PATIENCE_S = 120
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Server:
    """A process. A context manager: it is killed at the end. `state`: a folder, which another one
    may go on with. `slowed`: seconds that each layer takes longer."""

    def __init__(self, *words: str, state: str | None = None, slowed: float = 0.0):
        self._folder = tempfile.TemporaryDirectory(prefix="jlayer-soak-")
        template = Path(self._folder.name) / "template.jinja"
        template.write_text(TEMPLATE)
        self.state = state or str(Path(self._folder.name) / "state")
        options = ["--port", "0", "--device", "cpu", "--dtype", "float32"]
        options += ["--chat-template", str(template), "--state", self.state, *words]
        program = ["-m", "jlayer", "serve"]
        if slowed:
            program = [str(REPOSITORY / "benchmarks" / "slow_serve.py"), str(slowed)]
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, str(BUNDLED), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
            )
        self.host, self.port = "127.0.0.1", 0

    def __enter__(self) -> Server:
        try:
            found = until(lambda: self._alive(re.search(r"http://127\.0\.0\.1:(\d+)/ ", self.log)))
            self.port = int(found[1])
            until(lambda: self._alive(self.get("/health")[0] == 200))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """At once: it has no time to write anything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _alive(self, found):
        if self.process.poll() is not None:
            raise RuntimeError(f"the server has ended: {self.log}")
        return found

    @property
    def log(self) -> str:
        return self._log.read_text()

    # What its clients do.

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)

    def ask(self, method: str, path: str, body=None, headers=None, *, over=None) -> tuple:
        """(status, raw body); over a connection that stays, or one of its own."""
        connection = self.connect() if over is None else over
        try:
            raw = None if body is None else body if isinstance(body, bytes) else encode(body)
            connection.request(method, path, raw, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            if over is None:
                connection.close()

    def get(self, path: str, **options) -> tuple:
        return self.ask("GET", path, **options)

    def post(self, path: str, body, headers=None, **options) -> tuple:
        return self.ask("POST", path, body, headers, **options)

    def text(self, path: str, body: dict) -> list[str]:
        """The text of each choice, streamed or not. Raises AssertionError for an error."""
        status, raw = self.post(path, body)
        assert status == 200, raw[:500]
        return streamed_texts(raw) if body.get("stream") else texts(json.loads(raw))

    @contextmanager
    def raw(self, path: str, body: dict, *, receives: int | None = None):
        """A connection on which a request was sent in HTTP/1.0, so its answer has no chunks."""
        content = encode(body)
        head = f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        with closing(socket.socket()) as found:
            if receives is not None:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
            found.settimeout(PATIENCE_S)
            found.connect((self.host, self.port))
            found.sendall(head.encode() + content)
            yield found

    # What its process holds.

    def metric(self, name: str) -> float:
        found = re.search(rf"^jlayer_{name} (\S+)$", self.get("/metrics")[1].decode(), re.MULTILINE)
        return float(found[1])

    def is_idle(self) -> bool:
        """Nothing rides or waits, and only this question is being answered."""
        return (
            self.metric("riders") == self.metric("queued") == self.metric("queued_batch") == 0
            and self.metric("http_running") == 1
        )

    def held(self) -> dict:
        """Descriptors and threads of the process."""
        own = f"/proc/{self.process.pid}"
        return {
            "descriptors": len(os.listdir(f"{own}/fd")),
            "threads": len(os.listdir(f"{own}/task")),
        }

    def rss_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) << 10


def encode(body) -> bytes:
    return json.dumps(body).encode()


def texts(body: dict) -> list[str]:
    found = {}
    for choice in body["choices"]:
        found[choice["index"]] = (
            choice["text"] if "text" in choice else choice["message"]["content"]
        )
    return [found[index] for index in sorted(found)]


def streamed_texts(raw: bytes) -> list[str]:
    """Raises AssertionError where the stream has no regular end."""
    found: dict[int, str] = {}
    assert raw.endswith(b"data: [DONE]\n\n"), raw[-500:]
    for line in raw.splitlines():
        if not line.startswith(b"data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return [found[index] for index in sorted(found)]


def until(condition: Callable, words: str = "", *, seconds: float = PATIENCE_S):
    """What `condition` returns, once that is true. Raises TimeoutError."""
    ends = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except OSError:  # nobody listens yet
            found = None
        if found:
            return found
        if time.monotonic() > ends:
            raise TimeoutError(f"it did not come in {seconds} s; {words}")
        time.sleep(0.01)


def at_once(work: Callable, items: Iterable, *, clients: int) -> list:
    """What `work` returns for each item, so many at a time."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(work, items))


class Asking:
    """Asks for something again and again until the block ends; `seconds`: what each answer took.
    An answer with another status than `wanted` is noted in `wrong`."""

    def __init__(self, ask: Callable[[], tuple], *, every_s: float, wanted: int = 200):
        self._ask, self._every_s, self._wanted = ask, every_s, wanted
        self.seconds: list[float] = []
        self.wrong: list = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self._over.wait(self._every_s):
            began = time.monotonic()
            try:
                status, raw = self._ask()
            except (OSError, http.client.HTTPException) as error:
                status, raw = 0, repr(error).encode()
            self.seconds.append(time.monotonic() - began)
            if status != self._wanted:
                self.wrong.append((status, raw[:200]))

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
