"""No input gives a 5xx: requests of a grammar that starts from what is right and spoils it."""

import asyncio
import json
import random

import pytest

from jlayer.serving.http.app import application
from jlayer.serving.http.guard import Rules
from jlayer.serving.http.site import Site
from tests.serving.http.conftest import NAMES
from tests.serving.wire.bodies import (
    CHAT,
    COMPLETION,
    EMBEDDING,
    NO_JSON,
    SAMPLING,
    TEMPLATE,
    messages,
)

AT_ONCE = 64
KEY = "s3cr3t-k3y"
PATHS = {
    "/v1/completions": 12,
    "/v1/chat/completions": 2,  # a template takes a process
    "/v1/messages": 1,
    "/v1/embeddings": 6,
    "/v1/messages/count_tokens": 1,
    "/tokenize": 3,
    "/detokenize": 3,
    "/v1/estimate": 3,
    "/v1/models": 1,
    "/v1/models/fable": 1,
    "/v1/requests/x": 1,
    "/v1/requests/x/stream": 1,
    "/health": 1,
    "/metrics": 1,
    "/tokenizer_info": 1,
    "/": 1,
    "/nowhere": 1,
    "/v1/files": 1,
    "/v1/%00": 1,
}
# Of streams, of chats and of /v1/messages.
ENDS = (b"data: [DONE]\n\n", b'data: {"type":"message_stop"}\n\n')
METHODS = {"POST": 20, "GET": 3, "DELETE": 1, "PUT": 1, "OPTIONS": 1, "HEAD": 1, "BREW": 1}
ODD = [
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 63, 1 << 64, -(1 << 70), 0.0, 0.5, -0.5),
    *(1e308, 1e-308, 1e999, "", " ", "a", "\0", "\u2028", "🙂", "x" * 3000, [], {}, [None], [[]]),
    *([1, 2], [1.5], ["a", 1], {"a": 1}, {"type": "x"}, {"type": "json_object"}, [{}], "auto"),
    *([[5, 6], [7]], {"5": 1}, {"5": 100}, {"name": "x"}, [{"type": "function"}], "required"),
]
HEADERS = [
    *({"host": "evil.com"}, {"host": ""}, {"host": None}, {"origin": "null"}, {"origin": "x"}),
    *({"authorization": "Bearer x"}, {"authorization": ""}, {"content-length": "9" * 20}),
    *({"content-encoding": "gzip"}, {"content-type": "text/plain"}, {"prefer": "x"}),
    *({"x-stainless-retry-count": "9" * 40}, {"x-stainless-retry-count": "1"}, {"cookie": "\xff"}),
    *({"sec-fetch-site": "cross-site"}, {"x-request-id": "\n"}, {"transfer-encoding": "chunked"}),
]


def weighted(random, table):
    return random.choices(list(table), list(table.values()))[0]


def right(random):
    """A body that could be answered, by whatever path."""
    found = {"max_tokens": random.randrange(3), "prompt": "Once", "messages": messages("Hi")}
    found |= {"input": ["Once", "a"], "tokens": [5, 6], "ignore_eos": random.random() < 0.5}
    if random.random() < 0.5:
        found.pop(random.choice(["prompt", "messages"]))
    return found


def spoilt(random, value, depth=0):
    """`value` with something at some place in it changed."""
    if isinstance(value, dict) and value and depth < 4 and random.random() < 0.8:
        key = random.choice(list(value))
        return {**value, key: spoilt(random, value[key], depth + 1)}
    if isinstance(value, list) and value and depth < 4 and random.random() < 0.7:
        at = random.randrange(len(value))
        return [*value[:at], spoilt(random, value[at], depth + 1), *value[at + 1 :]]
    return random.choice(ODD)


def body(random):
    found = right(random)
    for _ in range(random.randrange(4)):
        wrong = random.choice([*SAMPLING, *CHAT, *COMPLETION, *EMBEDDING])
        if "messages" not in wrong.part or random.random() < 0.1:  # some of these are long
            found = {**found, **wrong.part}
    for _ in range(random.randrange(3)):
        found = spoilt(random, found)
        if not isinstance(found, dict):
            break
    if random.random() < 0.2 and isinstance(found, dict):
        found = {**found, "stream": True, "stream_options": random.choice(ODD)}
    raw = json.dumps(found).encode()
    if random.random() < 0.15:
        raw = random.choice(list(NO_JSON.values()))
    if random.random() < 0.15 and raw:
        at = random.randrange(len(raw))
        raw = raw[:at] + bytes([random.randrange(256)]) * random.randrange(3) + raw[at + 1 :]
    return raw


async def ask(app, random):
    """(what was asked, status, headers, body)"""
    headers = {"host": "localhost", "authorization": f"Bearer {KEY}"}
    for _ in range(random.randrange(2)):
        headers |= random.choice(HEADERS)
    path, method, raw = weighted(random, PATHS), weighted(random, METHODS), body(random)
    parts = [raw[:7], raw[7:]] if random.random() < 0.3 else [raw]
    sent, over = [], asyncio.Event()

    async def receive():
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": random.choice(["1.0", "1.1"]),
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": random.choice([b"", b"after=1", b"after=%ff", b"\xff"]),
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
        "headers": [
            (name.encode(), value.encode("latin-1"))
            for name, value in headers.items()
            if value is not None
        ],
    }
    try:
        async with asyncio.timeout(60):
            await app(scope, receive, send)
    finally:
        over.set()
    content = b"".join(message.get("body", b"") for message in sent[1:])
    told = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return (method, path, headers, raw), sent[0]["status"], told, content


def check(asked, status, headers, content):
    assert status < 500, (asked, content)
    if status >= 400:
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}, asked
        assert error["message"], asked
        assert len(content) < 4000, asked
    elif "event-stream" in headers.get("content-type", ""):
        assert content.endswith(ENDS) or b'"error"' in content, asked
    elif headers.get("content-type") == "application/json":
        json.loads(content)
    assert KEY.encode() not in content, asked
    return status


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 400), pytest.param(2, 100_000, marks=pytest.mark.slow)]
)
def test_no_input_gives_a_5xx(model, desk, seed, count):
    source = random.Random(seed)
    statuses = {}

    async def run():
        site = Site(Rules(key=KEY))
        app = application(site)
        site.opened(model, desk, names=NAMES, chat_template=TEMPLATE)
        for _ in range(0, count, AT_ONCE):
            asks = [ask(app, source) for _ in range(AT_ONCE)]
            for found in await asyncio.gather(*asks):
                status = check(*found)
                statuses[status] = statuses.get(status, 0) + 1
        site.workers.close()
        assert site.n_running == 0

    asyncio.run(run())
    assert desk.is_alive
    assert statuses[200] > count / 50, statuses
    assert {400, 401, 403, 404, 405, 413} <= set(statuses)
