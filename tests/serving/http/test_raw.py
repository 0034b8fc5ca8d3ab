"""HTTP as it may come over a socket: odd, half, doubled or hostile, and what is answered."""

import json
import socket
import threading
from contextlib import closing

import pytest

from jlayer.serving.http.guard import Rules
from tests.serving.http.conftest import served
from tests.serving.http.test_connections import PATIENCE_S, address, raw, read_all, until

BODY = b'{"prompt": "Once", "max_tokens": 1}'
HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"
LAST = b"GET /health HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"
PART = b"%x;name=value\r\n%s\r\n" % (len(BODY), BODY)


def get(target, *headers, version=b"1.1"):
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"GET %s HTTP/%s\r\n%s\r\n" % (target, version, HOST + CLOSE + lines)


def post(*headers, body=BODY, is_last=True):
    lines = b"".join(header + b"\r\n" for header in headers)
    close = CLOSE if is_last else b""
    return b"POST /v1/completions HTTP/1.1\r\n%s\r\n%s" % (HOST + close + lines, body)


def with_length(body=BODY, *headers, is_last=True):
    return post(b"Content-Length: %d" % len(body), *headers, body=body, is_last=is_last)


def exchanged(serving, sent):
    """All that comes until the server has closed the connection."""
    with closing(socket.create_connection(address(serving), timeout=PATIENCE_S)) as connection:
        connection.sendall(sent)
        return read_all(connection)


def answers(received):
    """[(status, headers, body)] of the answers in `received`, which have lengths or parts."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        status = int(status.split()[1])
        if status == 100:
            length = 0
        elif "content-length" in headers:
            length = int(headers["content-length"])
        else:
            length = rest.index(b"\r\n0\r\n\r\n") + 7
        found.append((status, headers, rest[:length]))
        received = rest[length:]
    return found


SENT = {
    "HTTP/1.0 without a host": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "HTTP/1.0 for another host": (b"GET /health HTTP/1.0\r\nHost: evil.com\r\n\r\n", 403),
    "HTTP/1.1 without a host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get(b"/health", b"Host: evil.com"), 400),
    "two lengths that differ": (post(b"Content-Length: 35", b"Content-Length: 5"), 400),
    "two lengths that agree": (post(b"Content-Length: 35", b"Content-Length: 35"), 200),
    "a length below zero": (post(b"Content-Length: -1"), 400),
    "a length that is no number": (post(b"Content-Length: 0x5"), 400),
    "a length of many digits": (post(b"Content-Length: " + b"9" * 18, body=b""), 413),
    "parts": (post(b"Transfer-Encoding: chunked", body=PART + b"0\r\nX: y\r\n\r\n"), 200),
    "parts that are none": (post(b"Transfer-Encoding: chunked", body=b"zz\r\nab\r\n"), 400),
    "another coding": (post(b"Transfer-Encoding: gzip, chunked"), 400),
    "no body": (post(body=b""), 400),
    "a form": (with_length(BODY, b"Content-Type: application/x-www-form-urlencoded"), 200),
    "whole address of its own": (get(b"http://localhost/v1/models"), 404),
    "whole address of another": (get(b"http://evil.com/v1/models"), 404),
    "a proxy's method": (b"CONNECT evil.com:80 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "no path": (b"OPTIONS * HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", 404),
    "a path that is escaped": (get(b"/v1%2Fmodels"), 200),
    "a path with a way up": (get(b"/v1/../health"), 404),
    "lines in a path": (get(b"/v1/a%0d%0aX-Evil:%201"), 404),
    "an odd path": (get(b"/v1/%zz%ff%00"), 404),
    "an odd query": (get(b"/v1/models?a=%ff&=[]&&"), 200),
    "bytes in a path": (b"GET /\xc3\xa4 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a zero in a header": (get(b"/health", b"X: a\0b"), 400),
    "a space in a header's name": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    "headers without end": (get(b"/health", *[b"X: " + b"y" * 1000] * 2000), 431),
    "another protocol": (b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(50), 400),
    "a web socket": (get(b"/v1/models", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"), 200),
    "a web socket of a page": (
        get(b"/", b"Origin: http://evil.com", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
        403,
    ),
    "another port's page": (with_length(BODY, b"Origin: http://localhost:3000"), 403),
    "no origin": (with_length(BODY, b"Origin: null", b"Content-Type: text/plain"), 403),
    "another site's link": (get(b"/", b"Sec-Fetch-Site: cross-site"), 403),
    "the own page": (get(b"/v1/models", b"Origin: http://localhost"), 200),
}


@pytest.mark.parametrize(("sent", "status"), SENT.values(), ids=SENT)
def test_each_is_answered_in_our_form_and_the_connection_ends(serving, sent, status):
    found = answers(exchanged(serving, sent))
    assert [each[0] for each in found][:1] == [status]
    assert len(found) == 1
    _, headers, body = found[0]
    assert not [name for name in headers if name.startswith("access-control")]
    assert "x-evil" not in headers
    if status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_requests_in_a_row_are_answered_in_their_order(serving):
    """Refused ones, too, where their body is known to be over."""
    stream = b'{"prompt": "Once", "max_tokens": 2, "stream": true}'
    sent = [
        (with_length(is_last=False), 200),
        (with_length(b"{", is_last=False), 400),
        (with_length(stream, is_last=False), 200),
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.com\r\n\r\n", 403),
        (LAST, 200),
    ]
    found = answers(exchanged(serving, b"".join(raw for raw, _ in sent)))
    assert [status for status, _, _ in found] == [status for _, status in sent]
    assert json.loads(found[0][2])["choices"]
    assert b"data: [DONE]" in found[2][2]
    assert json.loads(found[-1][2])["status"] == "ok"


def test_a_body_is_asked_for_only_where_it_would_be_read(serving):
    expect = b"Expect: 100-continue"
    found = answers(exchanged(serving, with_length(BODY, expect)))
    assert [status for status, _, _ in found] == [100, 200]
    found = answers(exchanged(serving, post(expect, b"Content-Length: 99999999", body=b"")))
    assert [status for status, _, _ in found] == [413]
    refused = post(expect, b"Content-Length: 50", b"Origin: null", body=b"")
    assert [status for status, _, _ in answers(exchanged(serving, refused))] == [403]


def test_the_path_that_needs_no_key_is_that_path_alone(model, desk):
    with served(model, desk=desk, rules=Rules(key="s3cret")) as found:
        for target in (b"/health", b"/health?a=b", b"/%68ealth"):
            assert answers(exchanged(found, get(target)))[0][0] == 200
        for target in (b"//health", b"/health/", b"/./health", b"/health/../v1/models", b"*"):
            assert answers(exchanged(found, get(target)))[0][0] == 401
        own = b"http://localhost/health"
        assert answers(exchanged(found, get(own)))[0][0] == 401
        keyed = get(b"/v1/models?key=s3cret&api_key=s3cret")
        assert answers(exchanged(found, keyed))[0][0] == 401


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/metrics", "/events"])
def test_head_gives_the_headers_of_get_and_ends(serving, path):
    """Also of what has no end."""
    with raw(serving, method="HEAD", path=path, headers=["Connection: close"]) as connection:
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert (head.split()[1], body) == (b"200", b"")
    until(lambda: not serving.site.n_running)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "post", "PATCH"])
def test_a_method_that_a_path_does_not_have_is_405_with_those_it_has(serving, method, path):
    with raw(serving, method=method, path=path, headers=["Connection: close"]) as connection:
        head, _, body = read_all(connection).decode().partition("\r\n\r\n")
    assert head.split()[1] == "405"
    assert "allow: POST" in head.lower().replace("post", "POST").split("\r\n")
    assert (body == "") == (method == "HEAD")


def test_health_answers_while_a_long_text_is_read(serving, client):
    """The tokenizer holds no thread of Python for long."""
    n_answered, over = 0, threading.Event()
    text = "a " * 1_000_000

    def ask():
        client.post("/tokenize", json={"prompt": text})
        over.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not over.is_set():
        with raw(serving, method="GET", path="/health", headers=["Connection: close"]) as found:
            assert b" 200 " in read_all(found)
        n_answered += not over.is_set()
    thread.join()
    assert n_answered > 1
