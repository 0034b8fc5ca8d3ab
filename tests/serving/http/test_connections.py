"""Connections: silence, haste, slowness and absence of clients, and the server's own end."""

import json
import socket
import threading
import time
from contextlib import closing, contextmanager
from xml.etree import ElementTree

import httpx
import pytest

from jlayer.errors import CheckpointError
from jlayer.serving.http import answering, running
from jlayer.serving.http.running import Serving, listen
from jlayer.serving.http.site import Site
from jlayer.serving.http.workers import Workers
from jlayer.serving.queue import Limits
from tests.serving.http.conftest import client_of, held, served

PATIENCE_S = 60
LONG = {"prompt": "Once upon a time", "max_tokens": 240, "ignore_eos": True}
KINDS = {"streamed": True, "whole": False}


def until(condition, words="it did not come"):
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, words
        time.sleep(0.002)


def address(serving):
    host, _, port = serving.address.removeprefix("http://").partition(":")
    return host, int(port)


@contextmanager
def raw(serving, *, version="1.1", method="POST", path="/v1/completions", body=None, headers=()):
    """A connection on which a request was sent."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    lines += [f"Content-Length: {len(content)}", "", ""]
    with closing(socket.create_connection(address(serving), timeout=PATIENCE_S)) as found:
        found.sendall("\r\n".join(lines).encode() + content)
        yield found


def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_until(connection, words):
    found = b""
    while words not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


@pytest.mark.parametrize("stream", KINDS.values(), ids=KINDS)
def test_work_ends_when_its_client_leaves(serving, desk, stream):
    n_before = desk.status().cancelled_total
    with raw(serving, body={**LONG, "stream": stream}):
        until(lambda: desk.status().riders)
    until(lambda: desk.status().cancelled_total > n_before)
    until(lambda: not desk.status().riders)


@pytest.mark.parametrize("stream", KINDS.values(), ids=KINDS)
def test_also_in_its_prompt_and_in_the_queue(model, desk, serving, stream):
    gate = threading.Event()
    n_before = desk.status().cancelled_total
    with held(model, gate):
        with raw(serving, body={**LONG, "stream": stream}):
            until(lambda: desk.status().riders)
            with raw(serving, body={**LONG, "stream": stream}):
                until(lambda: desk.status().queued)
            until(lambda: not desk.status().queued, "one that waits is gone at once")
        until(lambda: desk.status().cancelled_total == n_before + 2)
    until(lambda: not desk.status().riders)


class Late(Workers):
    """All that they do waits for `gate`."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    async def run(self, work, *arguments):
        def later():
            self.gate.wait(PATIENCE_S)
            return work(*arguments)

        return await super().run(later)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_one_who_leaves_while_the_request_is_read(serving, desk, path, monkeypatch):
    gate, n_before = threading.Event(), desk.status().requests_total
    monkeypatch.setattr(serving.site, "workers", Late(gate))
    try:
        with raw(serving, body=LONG, path=path):
            until(lambda: serving.site.n_running)
        until(lambda: not serving.site.n_running, "nobody waits for it, so it is forgotten")
    finally:
        gate.set()
        serving.site.workers.close()
    assert desk.status().requests_total == n_before


def test_one_who_leaves_while_the_request_is_submitted(serving, desk, monkeypatch):
    gate, submit, begun = threading.Event(), desk.submit, threading.Event()

    def late(*arguments):
        begun.set()
        gate.wait(60)
        return submit(*arguments)

    monkeypatch.setattr(desk, "submit", late)
    n_before = desk.status().cancelled_total
    with raw(serving, body=LONG):
        assert begun.wait(60)
    until(lambda: not serving.site.n_running)
    gate.set()
    until(lambda: desk.status().cancelled_total > n_before)
    until(lambda: not desk.status().riders)


@pytest.mark.slow
def test_one_who_does_not_read_holds_up_nobody(model, client, desk):
    """Its text waits in its job, and nowhere else."""
    body = {**LONG, "max_tokens": 60, "stream": True, "logprobs": 20, "n": 2, "temperature": 1}
    with served(model, desk=desk, sends=4096) as serving, closing(socket.socket()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(PATIENCE_S)
        slow.connect(address(serving))
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\n"
        slow.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        until(lambda: desk.status().riders)
        found = client.post("/v1/completions", json={"prompt": "The fox", "max_tokens": 5})
        assert found.status_code == 200
        until(lambda: not desk.status().riders, "its text is drawn whether it reads or not")
        assert serving.site.n_running == 1
        text = read_all(slow)
    assert text.endswith(b"data: [DONE]\n\n")
    assert len(text) > 60_000


def test_health_answers_while_a_pass_takes_long(model, client, serving, desk):
    gate = threading.Event()
    with held(model, gate), raw(serving, body=LONG):
        until(lambda: desk.status().riders)
        for path in ("/health", "/metrics", "/v1/models", "/"):
            assert client.get(path).status_code == 200
        assert desk.status().riders  # still
    until(lambda: not desk.status().riders)


def test_a_browser_finds_an_icon(client):
    found = client.get("/favicon.ico")
    assert (found.status_code, found.headers["content-type"]) == (200, "image/svg+xml")
    assert ElementTree.fromstring(found.content).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_stream_is_never_silent(model, serving, desk, monkeypatch):
    monkeypatch.setattr(answering, "SILENCE_S", 0.05)
    gate = threading.Event()
    with held(model, gate), raw(serving, body={**LONG, "stream": True}) as connection:
        found = b""
        while found.count(b"\r\n: ") < 5:
            found += connection.recv(65536)
    assert b"data:" not in found, "only comments, so far"
    assert b"sweep " in found
    assert b"/6" in found, "layers"
    until(lambda: not desk.status().riders)


def test_a_whole_answer_is_kept_up_by_blank_lines(model, serving, desk, monkeypatch):
    monkeypatch.setattr(answering, "PATIENCE_S", 0.05)
    gate, body = threading.Event(), {"prompt": "Once", "max_tokens": 2, "temperature": 0}
    with held(model, gate), raw(serving, body=body, version="1.0") as connection:
        found = read_until(connection, b"\n\n")
        assert b" 200 " in found.split(b"\r\n")[0]
        gate.set()
        found += read_all(connection)
    content = found.partition(b"\r\n\r\n")[2]
    assert content.startswith(b"\n")
    assert json.loads(content)["choices"][0]["finish_reason"] == "length"


def test_a_failure_after_a_blank_line_is_an_error_in_a_200(model, serving, desk, monkeypatch):
    monkeypatch.setattr(answering, "PATIENCE_S", 0.05)
    gate = threading.Event()

    def fail(step, tile):
        gate.wait(PATIENCE_S)
        raise CheckpointError("layer 3: damaged")

    with model.engine.watch.also(fail), raw(serving, body=LONG, version="1.0") as connection:
        read_until(connection, b"\n\n")
        gate.set()
        error = json.loads(read_all(connection))["error"]
    assert (error["type"], error["message"]) == ("server_error", "layer 3: damaged")


@pytest.mark.parametrize("stream", KINDS.values(), ids=KINDS)
def test_clients_of_http_1_0_get_no_chunks(serving, stream):
    body = {"prompt": "Once", "max_tokens": 3, "temperature": 0, "stream": stream}
    with raw(serving, body=body, version="1.0") as connection:
        head, _, content = read_all(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    if stream:
        assert content.endswith(b"data: [DONE]\n\n")
        assert content.startswith(b": ")
    else:
        assert json.loads(content)["choices"]


def test_idle_and_half_open_connections_stop_nobody(serving, client):
    begun = [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
    idle = [socket.create_connection(address(serving)) for _ in range(200)]
    try:
        for number, connection in enumerate(idle):
            connection.sendall(begun[number % len(begun)])
        for _ in range(3):
            with httpx.Client(base_url=serving.address, timeout=PATIENCE_S) as other:
                assert other.get("/health").status_code == 200
                body = {"prompt": "Once", "max_tokens": 2}
                assert other.post("/v1/completions", json=body).status_code == 200
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    "begun", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: "]
)
def test_a_request_whose_headers_do_not_come_is_ended(serving, monkeypatch, begun):
    monkeypatch.setattr(running, "HEADERS_S", 0.1)
    with closing(socket.create_connection(address(serving), timeout=PATIENCE_S)) as connection:
        connection.sendall(begun)
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_nor_does_the_second_request_of_a_connection_wait_for_ever(serving, monkeypatch):
    monkeypatch.setattr(running, "HEADERS_S", 0.1)
    with raw(serving, method="GET", path="/health") as connection:
        read_until(connection, b'"ok"')
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert b"408" in read_all(connection)


def test_a_body_that_does_not_come_is_ended(serving, monkeypatch):
    monkeypatch.setattr("jlayer.serving.http.app.BODY_SILENCE_S", 0.1)
    monkeypatch.setattr("jlayer.serving.http.guard.DRAIN_S", 0.1)
    with closing(socket.create_connection(address(serving), timeout=PATIENCE_S)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        )
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("as_chunks", [False, True], ids=["length", "chunks"])
def test_who_sends_too_much_reads_why(serving, as_chunks):
    part, count = b" " * (1 << 16), 160  # 10 MiB

    def parts():
        for _ in range(count):
            yield part

    with httpx.Client(base_url=serving.address, timeout=PATIENCE_S) as client:
        content = parts() if as_chunks else part * count
        found = client.post("/v1/completions", content=content)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "request_line",
    [
        *(b"nonsense\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        b"GET / HTTP/1.1\r\n\r\n",  # without a host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_our_form(serving, request_line):
    with closing(socket.create_connection(address(serving), timeout=PATIENCE_S)) as connection:
        connection.sendall(request_line)
        found = read_all(connection)
    assert found.startswith(b"HTTP/1.1 400 ")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_queue_that_is_full_says_when_to_come_back(model):
    gate = threading.Event()
    with served(model, limits=Limits(people=1)) as serving, client_of(serving) as client:
        with held(model, gate), raw(serving, body=LONG):
            until(lambda: serving.site.desk.status().riders)
            with raw(serving, body=LONG):
                until(lambda: serving.site.desk.status().queued)
                for stream in (True, False):
                    found = client.post("/v1/completions", json={**LONG, "stream": stream})
                    assert (found.status_code, found.json()["error"]["code"]) == (
                        429,
                        "queue_full",
                    )
                    assert 1 <= int(found.headers["retry-after"]) <= 120
                # Of several prompts none is taken where not all are.
                body = {**LONG, "prompt": ["a", "b"]}
                assert client.post("/v1/completions", json=body).status_code == 429
        until(lambda: not serving.site.desk.status().riders)


def test_a_retry_joins_the_first_while_it_runs(model, serving, client, desk):
    gate = threading.Event()
    body = {"prompt": "There", "max_tokens": 4, "temperature": 1}
    answers = []

    def ask(headers):
        answers.append(client.post("/v1/completions", json=body, headers=headers).json())

    n_before = desk.status().requests_total
    threads = [
        threading.Thread(target=ask, args=[{"x-stainless-retry-count": str(count)}])
        for count in (0, 1, 2)
    ]
    with held(model, gate):
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: serving.site.n_running > number)
            until(lambda: desk.status().requests_total > n_before)
        gate.set()
    for thread in threads:
        thread.join()
    assert desk.status().requests_total == n_before + 1
    assert answers[0] == answers[1] == answers[2]
    ask({"x-stainless-retry-count": "1"})
    assert desk.status().requests_total == n_before + 2, "the first is over"


def test_before_the_model_is_open_everything_is_503(model):
    with Serving(Site(), listen("127.0.0.1", 0)) as serving, client_of(serving) as client:
        assert client.get("/").status_code == 200
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/tokenize")):
            found = client.request(method, path)
            assert (found.status_code, found.json()["error"]["code"]) == (503, "loading")
        assert client.get("/metrics").status_code == 200
        assert client.get("/nowhere").status_code == 404


def test_an_engine_that_has_died_is_told_and_nothing_hangs(model):
    with served(model) as serving, client_of(serving) as client:
        assert client.get("/health").status_code == 200
        serving.site.desk.stop()
        found = client.get("/health")
        assert (found.status_code, found.json()["error"]["code"]) == (503, "engine_dead")
        found = client.post("/v1/completions", json=LONG)
        assert found.status_code == 503


def test_at_the_servers_end_streams_say_so(model):
    gate, found = threading.Event(), {}
    with served(model) as serving:
        desk = serving.site.desk

        def ask(name, **more):
            with raw(serving, version="1.0", body={**LONG, **more}) as connection:
                found[name] = read_all(connection)

        with held(model, gate):
            threads = [
                threading.Thread(target=ask, args=["streamed"], kwargs={"stream": True}),
                threading.Thread(target=ask, args=["whole"]),
                threading.Thread(target=ask, args=["queued"], kwargs={"stream": True}),
            ]
            for number, thread in enumerate(threads, 1):
                thread.start()
                until(lambda number=number: desk.status().requests_total == number)
            began = time.monotonic()
            serving.stop()
            assert time.monotonic() - began < running.GRACE_S
            for thread in threads:
                thread.join()
    for name in ("streamed", "queued"):
        last = found[name].rstrip().split(b"\n")[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stopping"
        assert b"[DONE]" not in found[name]
    assert found["whole"].startswith(b"HTTP/1.1 503 ")


def test_events_begin_with_everything_and_go_on_with_what_changes(serving, desk, client):
    with raw(serving, method="GET", path="/events", version="1.0") as connection:
        begun = read_until(connection, b"\n\n")
        begun += b"" if b"event: hello" in begun else read_until(connection, b"\n\n")
        hello = json.loads(begun.split(b"data: ")[1].split(b"\n")[0])
        assert (hello["model"], hello["n_layers"], len(hello["tiers"])) == ("fable-3m", 6, 6)
        thread = threading.Thread(
            target=client.post,
            args=["/v1/completions"],
            kwargs={"json": {**LONG, "max_tokens": 60}},
        )
        thread.start()
        found = b""
        while b'"riders":1' not in found:
            found += connection.recv(65536)
        thread.join()
    for block in found.split(b"\n\n")[:-1]:
        if block.startswith(b"event"):
            name, data = block.split(b"\n")
            assert name == b"event: status"
            assert set(json.loads(data.removeprefix(b"data: "))) < set(hello)
