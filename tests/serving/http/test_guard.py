"""Who may ask: hosts, origins, keys and sizes, refused before a body is read."""

import asyncio
import json

import pytest

from jlayer.serving.http.guard import Guard, Rules

KEY = "s3cret-key"
PAGE = "https://app.example.com"


class Inner:
    """The application behind the guard: says that it was reached, and what of a body."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Answer:
    def __init__(self, sent, inner, n_read):
        self.status = sent[0]["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in sent[1:])
        self.is_through, self.n_read = bool(inner.bodies), n_read

    @property
    def error(self):
        return json.loads(self.body)["error"]


def ask(rules=Rules(), headers=(), *, path="/v1/models", method="GET", parts=(b"",), http="1.1"):  # noqa: B008
    """One request through a guard. `parts`: of its body, as they come."""
    inner, sent, left = Inner(), [], list(parts)

    async def receive():
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:8080", **dict(headers)}
    scope = {
        "type": "http",
        "http_version": http,
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items() if v is not None],
    }
    asyncio.run(Guard(inner, rules)(scope, receive, send))
    return Answer(sent, inner, len(parts) - len(left))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:8080", "localhost", "LOCALHOST:1", "localhost.:80", "[::1]"),
        "[::1]:8080",
    ],
)
def test_the_machines_own_names_are_answered(host):
    assert ask(headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example.com", "localhost.evil.com", "127.0.0.1.evil.com", "evil.com:127.0.0.1"),
        *("127.0.0.1@evil.com", "evil.com#127.0.0.1", "127.0.0.2", "0.0.0.0", "[::2]", "", " "),
        *("127.0.0.1:80:80", "127.0.0.1/evil.com", "localhost:123456", "[::1", "\xff"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/"])
def test_another_name_is_refused(host, path):
    found = ask(headers={"host": host}, path=path)
    assert (found.status, found.error["code"], found.is_through) == (403, "host_not_allowed", False)


def test_a_name_that_is_allowed_is_answered():
    rules = Rules(hosts=("llm.example.com",))
    assert ask(rules, {"host": "LLM.example.com:443"}).status == 200
    assert ask(rules, {"host": "example.com"}).status == 403
    assert ask(Rules(hosts=("*",)), {"host": "anything.example.com"}).status == 200


def test_clients_of_http_1_0_need_no_host():
    assert ask(headers={"host": None}, http="1.0").status == 200
    assert ask(headers={"host": None}).status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example.com"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},  # another port is another origin
        {"origin": "http://127.0.0.1:8080.evil.com"},
        {"origin": "file://"},
        {"origin": "chrome-extension://abc"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "CROSS-SITE"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_others_are_refused_also_simple_posts(headers, method):
    found = ask(headers={**headers, "content-type": "text/plain"}, method=method)
    assert (found.status, found.is_through) == (403, False)
    assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-origin"},
        {"origin": "https://127.0.0.1:8080"},  # behind a proxy with TLS
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin"},
    ],
)
def test_the_own_page_and_programs_are_answered_without_cors(headers):
    found = ask(headers=headers)
    assert found.status == 200
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_a_page_that_is_allowed_may_ask_and_read():
    rules = Rules(origins=(PAGE + "/",), key=KEY)
    asked = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    found = ask(rules, {**asked, "authorization": f"Bearer {KEY}"})
    assert found.status == 200
    assert found.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-credentials" not in found.headers
    refused = ask(rules, asked)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    assert ask(rules, {"origin": PAGE + ".evil.com"}).status == 403


def test_a_preflight_is_answered_without_a_key_to_whom_is_allowed():
    rules = Rules(origins=(PAGE,), key=KEY)
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-os",
    }
    found = ask(rules, {"origin": PAGE, **preflight}, method="OPTIONS")
    assert (found.status, found.is_through) == (204, False)
    assert found.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "DELETE" in found.headers["access-control-allow-methods"]
    found = ask(rules, {"origin": "https://evil.com", **preflight}, method="OPTIONS")
    assert found.status == 403
    assert not [name for name in found.headers if name.startswith("access-control")]
    assert ask(Rules(), {"origin": PAGE, **preflight}, method="OPTIONS").status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY} "},
        {"x-api-key": KEY},
    ],
)
def test_the_key_is_taken_in_the_forms_of_clients(headers):
    assert ask(Rules(key=KEY), headers).status == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Bearer"}, "missing_api_key"),
        ({"authorization": KEY}, "missing_api_key"),
        ({"authorization": f"Basic {KEY}"}, "missing_api_key"),
        ({"authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"authorization": f"Bearer {KEY}x"}, "invalid_api_key"),
        ({"authorization": f"Bearer {KEY[:-1]}"}, "invalid_api_key"),
        ({"authorization": "Bearer \xff\xfe"}, "invalid_api_key"),
        ({"authorization": "Bearer " + "k" * 5000}, "invalid_api_key"),
        ({"x-api-key": "wrong"}, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/metrics", "/events", "/healthy"])
def test_without_the_key_nothing_is_read(headers, code, path):
    found = ask(Rules(key=KEY), headers, path=path, method="POST", parts=[b"x"] * 5)
    assert (found.status, found.error["code"]) == (401, code)
    assert found.error["type"] == "authentication_error"
    assert found.headers["www-authenticate"].startswith("Bearer")
    assert not found.is_through
    assert KEY not in found.body.decode()


@pytest.mark.parametrize("path", ["/", "/health", "/favicon.ico"])
def test_the_page_and_the_health_need_no_key(path):
    assert ask(Rules(key=KEY), path=path).status == 200


def test_an_empty_bearer_is_fine_where_no_key_is_needed():
    assert ask(headers={"authorization": "Bearer "}).status == 200


MIB = 1 << 20


@pytest.mark.parametrize("length", [str(8 * MIB + 1), "9" * 15, "9" * 30])
def test_a_length_beyond_the_limit_is_refused_before_the_body_is_read(length):
    sent = [b"x" * 10] * 3
    found = ask(headers={"content-length": length}, method="POST", parts=sent)
    assert (found.status, found.error["code"], found.is_through) == (
        413,
        "request_too_large",
        False,
    )


def test_parts_are_counted_where_no_length_is_told():
    parts = [b"x" * MIB] * 8
    assert ask(method="POST", parts=parts).status == 200
    reached = []

    async def app(scope, receive, send):
        while True:
            reached.append(len((await receive())["body"]))

    async def run():
        left = [b"x" * MIB] * 20

        async def receive():
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/x"}
        scope["headers"] = [(b"host", b"localhost")]
        await Guard(app, Rules())(scope, receive, None)

    with pytest.raises(Exception, match="larger than 8 MiB"):
        asyncio.run(run())
    assert len(reached) == 8


def test_files_may_be_larger():
    assert ask(path="/v1/files", headers={"content-length": str(100 * MIB)}).status == 200
    assert ask(path="/v1/files", headers={"content-length": str(300 * MIB)}).status == 413


def test_every_answer_has_an_id_which_a_client_may_give():
    found = ask()
    assert found.headers["x-request-id"].startswith("req_")
    assert ask().headers["x-request-id"] != found.headers["x-request-id"]
    assert ask(headers={"x-request-id": "my-1.2"}).headers["x-request-id"] == "my-1.2"
    for odd in ("a b", "a" * 129, "ä", ""):
        assert ask(headers={"x-request-id": odd}).headers["x-request-id"].startswith("req_")
    assert ask(headers={"host": "evil.com"}).headers["x-request-id"].startswith("req_")


def test_keys_are_compared_in_constant_time_whatever_their_length(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    for given in (KEY, "x", "y" * 5000):
        ask(Rules(key=KEY), {"authorization": f"Bearer {given}"})
    assert len(compared) == 3
    assert len({len(side) for pair in compared for side in pair}) == 1
    assert KEY.encode() not in {side for pair in compared for side in pair}
