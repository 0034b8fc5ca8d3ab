"""Many clients of one server: all at once, slow, absent, leaving, and 10,000 requests in a row.

Each campaign asserts what the server promises, and returns figures.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter

from benchmarks import common
from benchmarks.served import (
    CHAT,
    COMPLETIONS,
    PATIENCE_S,
    Asking,
    Server,
    at_once,
    streamed_texts,
    until,
)

LAZY_THREADS = 8  # of the pools of the server and of XLA
WORDS = ("fox", "girl", "tree", "boat", "king", "stone", "river", "cat", "moon", "house", "bird")
HEADERS_S = 20.0  # the server's limit, from a connection's beginning to the end of the headers
HEALTH_S = 1.0  # an answer of /health, at most
ASYNC = {"Prefer": "respond-async"}


def asked(number: int, *, tokens: int) -> tuple[str, dict]:
    """(path, body) of the request with this number: greedy and seeded, chats and completions,
    streamed and not, in turn."""
    words = f"The {WORDS[number % len(WORDS)]} number {number} went to the"
    body = {"max_tokens": tokens, "ignore_eos": True, "stream": bool(number & 2)}
    body |= {"temperature": 1.0, "seed": number} if number & 1 else {"temperature": 0}
    if number & 4:
        return CHAT, {**body, "messages": [{"role": "user", "content": words}]}
    return COMPLETIONS, {**body, "prompt": words}


def together(server: Server, *, clients: int = 64, tokens: int = 48, rounds: int = 6) -> dict:
    """(a) Each answer equals its run alone; tokens a second of all over those of one."""
    requests = [asked(number, tokens=tokens) for number in range(clients)]

    def answer(request):
        return server.text(*request)

    answer(requests[0])  # programs are compiled
    seconds, passes, alone_s = [], [], []

    def one_after_another():
        began = time.perf_counter()
        found = [answer(request) for request in requests]
        alone_s.append(time.perf_counter() - began)
        return found

    alone = one_after_another()
    for _ in range(rounds):  # in the first ones programs are compiled for so many rows
        before, began = server.metric("sweeps_total"), time.perf_counter()
        found = at_once(answer, requests, clients=clients)
        seconds.append(time.perf_counter() - began)
        passes.append(server.metric("sweeps_total") - before)
        wrong = [n for n in range(clients) if found[n] != alone[n]]
        assert not wrong, f"requests {wrong} differ from their runs alone"
    assert one_after_another() == alone
    n_tokens = clients * tokens
    return {
        "clients": clients,
        "equal": clients,
        "tokens_per_s": n_tokens / min(seconds),
        "one_client_tokens_per_s": n_tokens / min(alone_s),
        "ratio": min(alone_s) / min(seconds),
        "one_after_another_s": alone_s,
        "each_round_s": seconds,
        "sweeps": passes,
        "sweeps_alone": n_tokens,
    }


def slow_reader(server: Server, *, seconds: float = 20, tokens: int = 900, n: int = 8) -> dict:
    """(b) One who reads a byte a second holds up nobody, and loses nothing."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "n": n}
    body |= {"seed": 7, "temperature": 1.0, "stream": True, "logprobs": 20}
    expected = server.text(COMPLETIONS, body)  # read at once
    short = {"prompt": "The fox", "max_tokens": 8, "temperature": 0}
    server.text(COMPLETIONS, short)

    def others():
        with Asking(lambda: server.post(COMPLETIONS, short), every_s=0.1) as asking:
            time.sleep(seconds / 2)
        assert not asking.wrong, asking.wrong
        return asking.seconds

    with server.raw(COMPLETIONS, body, receives=4096) as slow:
        found = slow.recv(1)
        until(lambda: server.metric("riders") == 0)  # its texts are drawn whether it reads or not
        is_held = server.metric("http_running") == 2  # it waits for its reader
        over = threading.Event()

        def read_slowly():
            nonlocal found
            while not over.wait(1.0):
                found += slow.recv(1)

        reading = threading.Thread(target=read_slowly)
        reading.start()
        beside = others()
        over.set()
        reading.join()
        while part := slow.recv(1 << 20):
            found += part
    assert is_held, "the answer was not larger than what the system takes; ask for more"
    assert streamed_texts(found.partition(b"\r\n\r\n")[2]) == expected
    return {
        "bytes": len(found),
        "others_beside_it_s": common.summary(beside),
        "others_without_it_s": common.summary(others()),
    }


def half_open(server: Server, *, connections: int = 200) -> dict:
    """(c) Connections that begin a request and never end it: a third sends nothing, a third a part
    of the headers, a third a byte of them every second."""
    server.text(*asked(0, tokens=4))
    held = server.held()
    began = time.monotonic()
    opened = [
        socket.create_connection((server.host, server.port), timeout=HEADERS_S * 2)
        for _ in range(connections)
    ]
    for number, each in enumerate(opened):
        if number % 3:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    closed: dict[int, float] = {}

    def drip():
        for _ in range(int(HEADERS_S) + 10):
            for number, each in enumerate(opened):
                if number % 3 == 2 and number not in closed:
                    try:
                        each.sendall(b"x")
                    except OSError:  # it is closed
                        continue
            time.sleep(1)

    def wait_for(number):
        try:
            answer = b""
            while part := opened[number].recv(4096):
                answer += part
        except ConnectionResetError:  # a byte came after the end
            pass
        closed[number] = time.monotonic() - began
        return answer

    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    short = {"prompt": "The fox", "max_tokens": 8, "temperature": 0}
    with (
        Asking(lambda: server.get("/health"), every_s=0.1) as health,
        Asking(lambda: server.post(COMPLETIONS, short), every_s=0.1) as asking,
    ):
        answers = at_once(wait_for, range(connections), clients=connections)
    for each in opened:
        each.close()
    assert not health.wrong + asking.wrong, (health.wrong, asking.wrong)
    assert max(health.seconds) < HEALTH_S, max(health.seconds)
    assert max(closed.values()) < HEADERS_S + 5, max(closed.values())
    n_told = sum(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
    assert n_told == connections, f"{connections - n_told} were closed without a word"
    until(lambda: server.held()["descriptors"] <= held["descriptors"])
    return {
        "connections": connections,
        "closed_after_s": common.summary(list(closed.values())),
        "health_s": common.summary(health.seconds),
        "others_s": common.summary(asking.seconds),
    }


def leaving(server: Server, *, requests: int = 1000, clients: int = 48) -> dict:
    """(d) Clients that leave at random moments: before anything, in the queue, in the prompt, in
    the stream. Nothing of theirs is left. The server should have room for fewer than `clients`."""
    draw = random.Random(19)
    check = [asked(number, tokens=16) for number in range(4)]
    before = [server.text(*request) for request in check]
    where: Counter = Counter()
    most = {"queued": 0.0, "riders": 0.0}

    def one(wish):
        number, prompt, stream, delay, n_parts = wish
        body = {"prompt": prompt, "max_tokens": 300, "ignore_eos": True, "stream": stream}
        body |= {"temperature": 1.0, "seed": number}
        with server.raw(COMPLETIONS, body) as connection:
            if delay is None:
                where["at once"] += 1
                return
            connection.settimeout(delay)
            try:
                found = connection.recv(64)  # of a stream: with the first comment
                status = found[9:12].decode()
                for _ in range(n_parts if status == "200" else 0):
                    connection.recv(256)
                where[f"in a {status}"] += 1
            except TimeoutError:
                where["before all of it came"] += 1
            except ConnectionResetError:
                where["refused"] += 1

    def wishes(count):
        for number in range(count):
            prompt = f"Once {number} " * draw.choice((1, 20, 100))
            delay = draw.choice((None, 0.01, 0.1, 1.0, 4.0, 4.0))
            yield number, prompt, draw.random() < 0.5, delay, draw.choice((0, 1, 4, 40))

    at_once(one, wishes(requests // 2), clients=clients)  # all of the server's threads have begun
    until(server.is_idle)
    held, cancelled = server.held(), server.metric("requests_cancelled_total")

    def look():
        status, raw = server.get("/metrics")
        for name in most:
            found = raw.decode().partition(f"\njlayer_{name} ")[2].split("\n")[0]
            most[name] = max(most[name], float(found))
        return status, raw

    where.clear()
    with Asking(look, every_s=0.02) as looking:
        began = time.perf_counter()
        at_once(one, wishes(requests), clients=clients)
        seconds = time.perf_counter() - began
        began = last = time.perf_counter()
        compiling_s = 0.0
        while (status := server.status())["riders"] or status["queued"]:
            now = time.perf_counter()
            assert now - began < PATIENCE_S, status
            compiling_s += (now - last) * (status["phase"] is not None)  # nothing can end that
            last = now
        left_s = time.perf_counter() - began
    n_cancelled = server.metric("requests_cancelled_total") - cancelled
    assert not looking.wrong, looking.wrong
    until(server.is_idle)
    until(lambda: server.held()["descriptors"] <= held["descriptors"], f"{held} {server.held()}")
    after = server.held()
    # Pools start their threads one by one, as they are needed: a few more than before, never one a
    # request.
    assert after["threads"] <= held["threads"] + LAZY_THREADS, (held, after)
    assert [server.text(*request) for request in check] == before
    return {
        "requests": requests,
        "seconds": seconds,
        "cancelled_by_the_desk": n_cancelled,
        "left_when": dict(where),
        "most_queued": most["queued"],
        "most_riders": most["riders"],
        "nothing_runs_after_s": left_s,
        "of_it_compiling_s": compiling_s,
        "before": held,
        "after": after,
    }


def mixed(number: int) -> tuple[str, str, object, dict, int]:
    """(method, path, body, headers, status) of a short request, another kind each time."""
    words = f"{WORDS[number % len(WORDS)]} {number}"
    short = {"prompt": f"The {words}", "max_tokens": 1 + number % 4}
    chat = {"messages": [{"role": "user", "content": words}], "max_tokens": 2}
    name = WORDS[number % len(WORDS)]
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    kinds = (
        ("POST", COMPLETIONS, {**short, "temperature": 0}, {}, 200),
        ("POST", COMPLETIONS, {**short, "temperature": 1.0, "seed": number, "n": 2}, {}, 200),
        ("POST", COMPLETIONS, {**short, "stream": True}, {}, 200),
        ("POST", COMPLETIONS, {**short, "echo": True, "stop": ["."], "max_tokens": 3}, {}, 200),
        ("POST", CHAT, chat, {}, 200),
        ("POST", CHAT, {**chat, "stream": True, "logprobs": True, "top_logprobs": 2}, {}, 200),
        ("POST", CHAT, {**chat, "response_format": schema}, {}, 200),
        ("POST", COMPLETIONS, short, ASYNC, 202),
        ("POST", COMPLETIONS, short, {"Idempotency-Key": f"key-{number}"}, 202),
        ("POST", "/tokenize", {"prompt": words * 50}, {}, 200),
        ("POST", "/detokenize", {"tokens": [5, 6, 7]}, {}, 200),
        ("POST", "/v1/estimate", {"prompt_tokens": number % 900 + 1, "max_tokens": 9}, {}, 200),
        ("POST", COMPLETIONS, {**short, "max_tokens": -1}, {}, 400),
        ("POST", COMPLETIONS, b"{" * (number % 100 + 1), {}, 400),
        ("POST", CHAT, {**chat, "model": f"other-{number}"}, {}, 404),
        ("GET", f"/nowhere/{number}", None, {}, 404),
        ("GET", f"/v1/requests/req-{number}", None, {}, 404),
        ("GET", "/v1/models", None, {}, 200),
        ("GET", "/", None, {}, 200),
        ("GET", "/health", None, {}, 200),
    )
    return kinds[number % len(kinds)]


def many(server: Server, *, requests: int = 10_000, step: int = 1000, clients: int = 16) -> dict:
    """(e) Short requests of all kinds; the memory of the process after each `step` of them."""
    local = threading.local()

    def one(number):
        if number % 10 == 0 or not hasattr(local, "connection"):  # some stay, some are new
            local.connection = server.connect()
        method, path, body, headers, wanted = mixed(number)
        status, raw = server.ask(method, path, body, headers, over=local.connection)
        assert status == wanted, (number, path, status, raw[:300])
        if status == 202 and number % 3:  # the others stay until the server forgets the oldest
            name = json.loads(raw)["id"]
            path = f"/v1/requests/{name}"
            assert server.ask("DELETE", path, over=local.connection)[0] == 200

    rss, began = [], time.perf_counter()
    for start in range(0, requests, step):
        at_once(one, range(start, min(start + step, requests)), clients=clients)
        until(lambda: server.metric("riders") == server.metric("queued") == 0)
        rss.append(server.rss_bytes())
    seconds = time.perf_counter() - began
    return {
        "requests": requests,
        "requests_per_s": requests / seconds,
        "step": step,
        "rss_bytes": rss,
        "growth_bytes": rss[-1] - rss[0],
        "growth_of_the_second_half_bytes": rss[-1] - rss[len(rss) // 2],
    }
