"""A server in trouble: its model is slow, or it is killed.

Each campaign asserts what the server promises, and returns figures.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from benchmarks import common
from benchmarks.crowds import ASYNC, HEALTH_S, WORDS, asked
from benchmarks.served import (
    CHAT,
    COMPLETIONS,
    PATIENCE_S,
    Asking,
    Server,
    at_once,
    encode,
    streamed_texts,
    texts,
    until,
)

ETA_OFF = 0.25  # after two sweeps, at most
COMMENTS_S = 5.0  # between two comments of a stream, at most


def slow_model(server: Server, *, seconds: float = 60, tokens: int = 6, clients: int = 4) -> dict:
    """(f) A model whose forward pass takes seconds: /health answers, streams are never silent,
    while texts of 5 MB are tokenised and schemas compiled. `seconds`: at least so long."""
    started = time.monotonic()
    draw = random.Random(5)
    long = " ".join(draw.choice(WORDS) for _ in range(1_000_000))[:5_000_000]
    to_tokenize = encode({"prompt": long})  # once: it takes this process long, too
    to_complete = encode({"prompt": long, "max_tokens": 1})
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
                assert server.post("/tokenize", to_tokenize)[0] == 200
                done["bodies"] += 1
            else:
                status, raw = server.post(COMPLETIONS, to_complete)
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

    def nothing():
        return 200, time.sleep(0.001)

    with (
        Asking(lambda: server.get("/health"), every_s=0.1) as health,
        Asking(nothing, every_s=0.1) as idle,
    ):
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
    late = max(idle.seconds)  # of the machine itself, where others work on it too
    assert max(health.seconds) < HEALTH_S + late, (max(health.seconds), late)
    assert silence < COMMENTS_S, silence
    assert min(done["bodies"], done["schemas"]) > 0, done
    at, _, eta_s = next(each for each in etas if each[1] >= 2)  # after two sweeps
    assert abs(eta_s / (ended - at) - 1) < ETA_OFF, (eta_s, ended - at)
    return {
        "seconds_a_sweep": sweeps[-1],
        "health_s": common.summary(health.seconds),
        "sleeping_1_ms_s": common.summary(idle.seconds),
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

    def look(server):
        """How many are answered."""
        for number in set(accepted) - set(seen):
            found = state_of(server, number)
            if found["status"] == "done":
                seen[number] = encode(found["response"])
        return len(seen)

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
            until(lambda least=round_ * 10: look(server) >= least)
            states = Counter(state_of(server, number)["status"] for number in list(accepted))
            running.append(dict(states))
            server.kill()
            sending.join()
    with Server(state=state) as server:
        before_kills = len(seen)
        until(lambda: look(server) == len(accepted), seconds=PATIENCE_S * 3)
        answers = {number: state_of(server, number)["response"] for number in accepted}
        for number in accepted:
            assert texts(answers[number]) == server.text(*body(number)), number
            assert encode(answers[number]) == seen[number], number
            if number % 2:  # asked again with the same key: the same request
                status, raw = server.post(*body(number), headers(number))
                assert (status, json.loads(raw)["id"]) == (202, accepted[number])
        lines = (Path(state) / "requests.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    ends = Counter(entry["end"] for entry in entries if "end" in entry)
    ends.update(e["accept"]["id"] for e in entries if e.get("accept", {}).get("ended"))
    assert all(ends[name] == 1 for name in accepted.values()), ends
    assert len({answer["id"] for answer in answers.values()}) == len(accepted)
    shutil.rmtree(state)
    return {
        "kills": rounds,
        "accepted": len(accepted),
        "answered_once": len(accepted),
        "at_the_kills": running,
        "answered_before_a_kill": before_kills,
    }
