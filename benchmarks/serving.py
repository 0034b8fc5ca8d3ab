"""What a real `jlayer serve` bears, on the bundled model: many clients at once, slow ones, absent
ones, 10,000 requests, a model that is slow, and being killed.

    python benchmarks/serving.py --json benchmarks/results/serving-cpu.json
    python benchmarks/serving.py --only together,leaving

Each campaign is a function of its size, which tests/serving/test_soak.py calls with smaller ones.
It returns figures, and raises AssertionError where the server is not what it promises to be. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.served import (
    CHAT,
    COMPLETIONS,
    Asking,
    Server,
    at_once,
    encode,
    streamed_texts,
    texts,
    until,
)

WORDS = ("fox", "girl", "tree", "boat", "king", "stone", "river", "cat", "moon", "house", "bird")
HEADERS_S = 20.0  # the server's limit, from a connection's beginning to the end of the headers
COMMENTS_S = 5.0  # between two comments of a stream, at most
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


def together(server: Server, *, clients: int = 64, tokens: int = 48) -> dict:
    """(a) Each answer equals its run alone; tokens a second of all over those of one."""
    requests = [asked(number, tokens=tokens) for number in range(clients)]

    def answer(request):
        return server.text(*request)

    answer(requests[0])  # programs are compiled
    began = time.perf_counter()
    alone = [answer(request) for request in requests]
    alone_s = time.perf_counter() - began
    at_once(answer, requests, clients=clients)
    passes, began = server.metric("sweeps_total"), time.perf_counter()
    found = at_once(answer, requests, clients=clients)
    seconds = time.perf_counter() - began
    wrong = [n for n in range(clients) if found[n] != alone[n]]
    assert not wrong, f"requests {wrong} differ from their runs alone"
    n_tokens = clients * tokens
    return {
        "clients": clients,
        "equal": clients,
        "tokens_per_s": n_tokens / seconds,
        "one_client_tokens_per_s": n_tokens / alone_s,
        "ratio": alone_s / seconds,
        "sweeps": server.metric("sweeps_total") - passes,
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
        number, prompt, stream, moment, delay = wish
        body = {"prompt": prompt, "max_tokens": 300, "ignore_eos": True, "stream": stream}
        body |= {"temperature": 1.0, "seed": number}
        with server.raw(COMPLETIONS, body) as connection:
            try:
                if moment == "at once":
                    return
                connection.settimeout(delay)
                answer = connection.recv(64)  # of a stream: at once, with its first comment
                where[answer[9:12].decode()] += 1
                if moment == "in the stream":
                    for _ in range(number % 40):
                        connection.recv(256)
            except TimeoutError:
                where["no answer yet"] += 1

    def wishes(count):
        moments = ("at once", "soon", "in the stream")
        for number in range(count):
            prompt = f"Once {number} " * draw.choice((1, 20, 150))
            moment, delay = draw.choice(moments), draw.choice((0.001, 0.01, 0.1, 0.5))
            yield number, prompt, draw.random() < 0.5, moment, delay

    at_once(one, wishes(100), clients=clients)  # all of the server's threads have begun
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
        began = time.perf_counter()
        until(lambda: server.metric("riders") == server.metric("queued") == 0)
        left_s = time.perf_counter() - began
    assert not looking.wrong, looking.wrong
    until(server.is_idle)
    until(lambda: server.held()["descriptors"] <= held["descriptors"], f"{held} {server.held()}")
    after = server.held()
    assert after["threads"] <= held["threads"], (held, after)
    assert [server.text(*request) for request in check] == before
    return {
        "requests": requests,
        "seconds": seconds,
        "cancelled": server.metric("requests_cancelled_total") - cancelled,
        "left_when": dict(where),
        "most_queued": most["queued"],
        "most_riders": most["riders"],
        "nothing_runs_after_s": left_s,
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
        ("POST", COMPLETIONS, {**short, "echo": True, "logprobs": 3, "max_tokens": 1}, {}, 200),
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


def slow_model(server: Server, *, seconds: float = 60, tokens: int = 6, clients: int = 4) -> dict:
    """(f) A model whose forward pass takes seconds: /health answers, streams are never silent,
    while texts of 5 MB are tokenised and schemas compiled. `seconds`: at least so long."""
    started = time.monotonic()
    draw = random.Random(5)
    long = " ".join(draw.choice(WORDS) for _ in range(1_000_000))[:5_000_000]
    done: Counter = Counter()

    def schema(number):
        properties = {f"p{number}_{n}": {"type": "string", "maxLength": n} for n in range(300)}
        made = {"type": "object", "properties": properties, "additionalProperties": False}
        return {"type": "json_schema", "json_schema": {"name": "a", "schema": made}}

    def burden(number):
        """Until the stream is over."""
        while not over.is_set():
            if number % 2:
                chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
                body = {**chat, "response_format": schema(done["schemas"])}
                with server.raw(CHAT, body):
                    done["schemas"] += 1
                    over.wait(2.0)  # it is compiled meanwhile; then its client leaves
            elif done["bodies"] % 2:
                assert server.post("/tokenize", {"prompt": long})[0] == 200
                done["bodies"] += 1
            else:
                status, raw = server.post(COMPLETIONS, {"prompt": long, "max_tokens": 1})
                assert (status, b"context_length" in raw) == (400, True), raw[:300]
                done["bodies"] += 1

    over = threading.Event()
    times, etas, sweeps = [], [], []
    streamed = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    streamed |= {"stream": True, "temperature": 0}

    def listen():
        """-> what was streamed; notes when anything came, and what was said of the end."""
        found = b""
        with server.raw(COMPLETIONS, streamed) as connection:
            while part := connection.recv(65536):
                times.append(time.monotonic())
                found += part
        return found

    def ask_for_progress():
        watching = {**streamed, "stream_options": {"jlayer_progress": True}}
        with server.raw(COMPLETIONS, watching) as connection, connection.makefile("rb") as lines:
            for line in lines:
                if b"jlayer.progress" in line:
                    told = json.loads(line[6:])["jlayer"]
                    etas.append((time.monotonic(), told["tokens"], told["eta_s"]))
                    sweeps.append(told["seconds_a_pass"])
        return time.monotonic()

    with Asking(lambda: server.get("/health"), every_s=0.1) as health:
        server.text(COMPLETIONS, {**streamed, "max_tokens": 2})  # programs are compiled
        burdens = [threading.Thread(target=burden, args=(n,)) for n in range(clients)]
        for each in burdens:
            each.start()
        try:
            while True:
                streams, ended = at_once(lambda work: work(), (listen, ask_for_progress), clients=2)
                if time.monotonic() - started > seconds:
                    break
                times.clear(), etas.clear()
        finally:
            over.set()
            for each in burdens:
                each.join()
    streamed_texts(streams.partition(b"\r\n\r\n")[2])
    silence = max(later - sooner for sooner, later in pairwise(times))
    assert not health.wrong, health.wrong
    assert max(health.seconds) < HEALTH_S, max(health.seconds)
    assert silence < COMMENTS_S, silence
    assert min(done["bodies"], done["schemas"]) > 0, done
    at, _, eta_s = next(each for each in etas if each[1] >= 2)  # after two sweeps
    return {
        "seconds_a_sweep": sweeps[-1],
        "health_s": common.summary(health.seconds),
        "longest_silence_s": silence,
        "comments": streams.count(b"\n: "),
        "bodies_of_5_MB": done["bodies"],
        "schemas": done["schemas"],
        "eta_after_two_sweeps_s": eta_s,
        "it_took_s": ended - at,
        "eta_off": eta_s / (ended - at) - 1,
    }


def killed(*, rounds: int = 3, requests: int = 40) -> dict:
    """(g) Killed with -9 under load and started again: each accepted request is answered once."""
    draw = random.Random(9)
    state = tempfile.mkdtemp(prefix="jlayer-soak-state-")
    accepted: dict[int, str] = {}  # number -> id
    seen: dict[int, bytes] = {}  # the answers that were there before a kill
    running = []

    def headers(number):
        return {"Idempotency-Key": f"k{number}"} if number % 2 else ASYNC

    def body(number):
        path, found = asked(number, tokens=40)
        return path, {**found, "stream": False}

    def send(server, number):
        try:
            status, raw = server.post(*body(number), headers(number))
        except OSError:  # killed
            return
        assert status == 202, raw[:300]
        accepted[number] = json.loads(raw)["id"]

    def state_of(server, number):
        status, raw = server.get(f"/v1/requests/{accepted[number]}")
        assert status == 200, (number, raw)
        return json.loads(raw)

    for round_ in range(rounds):
        with Server(state=state) as server:
            server.text(*asked(0, tokens=4))
            numbers = range(round_ * requests, (round_ + 1) * requests)
            goal = len(accepted) + draw.randrange(requests // 2, requests - 4)
            sending = threading.Thread(
                target=at_once, args=(lambda n: send(server, n), numbers), kwargs={"clients": 8}
            )
            sending.start()
            until(lambda goal=goal: len(accepted) >= goal)
            for number in list(accepted):
                found = state_of(server, number)
                if found["status"] == "done":
                    seen[number] = encode(found["response"])
            states = Counter(state_of(server, number)["status"] for number in list(accepted))
            running.append(dict(states))
            server.kill()
            sending.join()
    with Server(state=state) as server:
        until(lambda: all(state_of(server, n)["status"] == "done" for n in accepted))
        answers = {number: state_of(server, number)["response"] for number in accepted}
        for number in accepted:
            assert texts(answers[number]) == server.text(*body(number)), number
            assert encode(answers[number]) == seen.get(number, encode(answers[number])), number
            if number % 2:  # asked again with the same key: the same request
                status, raw = server.post(*body(number), headers(number))
                assert (status, json.loads(raw)["id"]) == (202, accepted[number])
        lines = (Path(state) / "requests.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    ends = Counter(entry["end"] for entry in entries if "end" in entry)
    ends.update(e["accept"]["id"] for e in entries if e.get("accept", {}).get("ended"))
    assert all(ends[name] == 1 for name in accepted.values()), ends
    assert len({answer["id"] for answer in answers.values()}) == len(accepted)
    return {
        "kills": rounds,
        "accepted": len(accepted),
        "answered_once": len(accepted),
        "at_the_kills": running,
        "answered_before_a_kill": len(seen),
    }


CROWDED = ("--host-memory", "250MiB")  # room for a few dozen texts
CAMPAIGNS = {
    "together": lambda: on_a_server(together),
    "slow_reader": lambda: on_a_server(slow_reader),
    "half_open": lambda: on_a_server(half_open),
    "leaving": lambda: on_a_server(leaving, *CROWDED),
    "many": lambda: on_a_server(many),
    "slow_model": lambda: on_a_server(slow_model, slowed=1.2),
    "killed": killed,
}


def on_a_server(campaign, *words, **options) -> dict:
    with Server(*words, **options) as server:
        return campaign(server)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"some of {','.join(CAMPAIGNS)}")
    parser.add_argument("--json", help="also write the result here")
    args = parser.parse_args()
    result = {"card": common.card()}
    common.say(str(result["card"]))
    for name in args.only.split(",") if args.only else CAMPAIGNS:
        others, began = common.Neighbours(), time.perf_counter()
        found = CAMPAIGNS[name]()
        found |= {"took_s": time.perf_counter() - began, "neighbours_cores": others.cores()}
        result[name] = found
        common.say(f"{name}: {json.dumps(found)}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    common.last_line(result)


if __name__ == "__main__":
    main()
