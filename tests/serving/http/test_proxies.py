"""Who a request is counted for behind a proxy: only a proxy that is trusted is believed."""

import asyncio
import threading
from ipaddress import ip_network

import pytest

from jlayer.serving.http.guard import Guard, Rules
from jlayer.serving.http.proxies import MOST_PROXIES, client_behind
from jlayer.serving.queue import Limits
from jlayer.serving.wire.errors import Refused
from tests.serving.http.conftest import client_of, held, served
from tests.serving.http.test_connections import until

PROXIES = tuple(map(ip_network, ("127.0.0.1", "10.0.0.0/8", "fd00::/8")))
TEXT = {"prompt": "Once upon a time", "max_tokens": 3}


def client(*lines, peer="127.0.0.1", trusted=PROXIES):
    headers = [(b"host", b"x"), *((b"x-forwarded-for", line.encode("latin-1")) for line in lines)]
    return client_behind(peer, headers, trusted)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["192.0.2.7"], "192.0.2.7"),
        (["192.0.2.7, 10.1.2.3"], "192.0.2.7"),  # through two proxies
        (["203.0.113.1, 192.0.2.7"], "192.0.2.7"),  # what is left of it came with the request
        (["10.9.9.9, 192.0.2.7"], "192.0.2.7"),
        (["<script>, unknown, 192.0.2.7"], "192.0.2.7"),
        (["203.0.113.1", "192.0.2.7"], "192.0.2.7"),  # the proxy adds a line of its own
        (["192.0.2.7", "10.1.2.3,10.1.2.4"], "192.0.2.7"),
        (["192.0.2.7:4711"], "192.0.2.7"),
        (["2001:db8::7"], "2001:db8::7"),
        (["[2001:DB8:0::7]:4711"], "2001:db8::7"),
        (["::ffff:192.0.2.7"], "192.0.2.7"),
        (["fe80::7%eth0"], "fe80::7"),
        (["192.0.2.7,, fd00::1 ,"], "192.0.2.7"),
        (["10.1.2.3"], "10.1.2.3"),  # the proxies' own machines ask
        ([""], "127.0.0.1"),
        ([], "127.0.0.1"),
    ],
)
def test_the_right_most_address_of_no_trusted_proxy_is_the_client(lines, expected):
    assert client(*lines) == expected


@pytest.mark.parametrize("peer", ["192.0.2.1", "127.0.0.2", "::1", "testclient", ""])
def test_nobody_else_is_believed(peer):
    assert client("203.0.113.1", peer=peer) == peer
    assert client("nonsense", peer=peer) == peer
    assert client("203.0.113.1", peer="127.0.0.1", trusted=()) == "127.0.0.1"


def test_a_proxy_that_comes_by_ipv6_is_the_same_one():
    assert client("203.0.113.1", peer="::ffff:127.0.0.1") == "203.0.113.1"


@pytest.mark.parametrize(
    "line",
    [
        *("unknown", "_hidden", "example.com", "192.0.2.7.1", "192.0.2", "010.0.0.1", "1.2.3.4:x"),
        *("[::1]x", "\xb9.2.3.4", "192.0.2.7;", "for=192.0.2.7", "a" * 60_000, "1" * 60_000),
        *("unknown, 10.1.2.3", "192.0.2.7, unknown", "10.0.0.1," * 5000, "," * 60_000),
        "fe80::1%" + "x" * 100,
    ],
)
def test_what_is_no_address_at_its_place_is_refused(line):
    with pytest.raises(Refused, match="X-Forwarded-For: found") as caught:
        client(line)
    assert (caught.value.status, caught.value.code) == (400, "invalid_forwarded_for")
    assert len(str(caught.value)) < 300


def test_a_long_list_is_not_read_to_its_end():
    assert client(",".join(["nonsense"] * 5000) + ",192.0.2.7") == "192.0.2.7"
    row = ["192.0.2.7", *["10.0.0.1"] * (MOST_PROXIES - 1)]
    assert client(",".join(row)) == "192.0.2.7"
    with pytest.raises(Refused, match="more than"):
        client(",".join([*row, "10.0.0.1"]))


def seen(rules, headers):
    """(status, the client that an application behind the guard sees)"""
    found, sent = [None], []

    async def app(scope, receive, send):
        found.append(scope["client"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/v1/models"}
    scope |= {"client": ("127.0.0.1", 4711), "headers": [(b"host", b"localhost"), *headers]}
    asyncio.run(Guard(app, rules)(scope, None, send))
    return sent[0]["status"], found[-1]


def test_the_guard_tells_the_application_who_asks():
    headers = [(b"x-forwarded-for", b"192.0.2.7")]
    assert seen(Rules(proxies=PROXIES), headers) == (200, ("192.0.2.7", 4711))
    assert seen(Rules(), headers) == (200, ("127.0.0.1", 4711)), "nobody is believed by default"
    assert seen(Rules(proxies=PROXIES), [(b"x-forwarded-for", b"x")]) == (400, None)
    no_key = seen(Rules(proxies=PROXIES, key="k"), [(b"x-forwarded-for", b"x")])
    assert no_key == (401, None), "who has no key is told no more"


def test_people_behind_a_proxy_have_a_share_each(model):
    """With room for one of each client, another person's is taken, and a second one is refused."""
    rules, limits = Rules(proxies=PROXIES), Limits(client=1)
    with (
        served(model, rules=rules, limits=limits) as serving,
        client_of(serving) as http,
        held(model, threading.Event()),
    ):

        def post(address):
            headers = {"Prefer": "respond-async", "X-Forwarded-For": address}
            return http.post("/v1/completions", json=TEXT, headers=headers).status_code

        assert post("192.0.2.1") == 202
        until(lambda: serving.site.desk.status().riders)
        assert post("192.0.2.1") == 202
        assert post("192.0.2.1") == 429
        assert post("203.0.113.9, 192.0.2.1") == 429, "another name does not help"
        assert post("192.0.2.2") == 202
        assert post("192.0.2.3, 127.0.0.1") == 202
