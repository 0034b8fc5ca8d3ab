"""`jlayer serve --state` with a request that brings the whole process down: it is given up after
some servers, and everything else is answered."""

import io
import json
import re
import signal
import time
from functools import partial

import httpx
import openai
import pytest

from tests.app.processes import finish, start
from tests.conftest import BUNDLED
from tests.serving.batch.test_kills import environment

PATIENCE_S = 90
ASYNC = {"Prefer": "respond-async"}
FATAL = 13  # tokens: whoever asks for so many brings the process down
# The crash is in the thread that drives forward passes, as one in a kernel or a driver is. Few
# lines ride together, since every new number of riders takes a program.
CRASHING = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)

from jlayer.app.cli import main
from jlayer.engine.scheduler import Scheduler
from jlayer.serving import starts
from jlayer.serving.batch import run

run.MOST_AHEAD, starts.MOST = 3, 3
drive = Scheduler.drive_until

def crashing(self, *words, **more):
    if any(lane.limit == {FATAL} and lane.is_alive for lane in self._lanes):
        time.sleep(0.3)  # so that its client has been told that it is accepted
        os.kill(os.getpid(), signal.SIGSEGV)
    return drive(self, *words, **more)

Scheduler.drive_until = crashing
sys.exit(main(sys.argv[1:]))
"""


class Server:
    """Over a folder. A context manager; kills what is left."""

    def __init__(self, folder, code=CRASHING):
        words = ("--port", "0", "--device", "cpu", "--dtype", "float32", "--state", folder)
        self.process = start("serve", BUNDLED, *words, code=code, env=environment())

    def __enter__(self):
        line = self.process.stderr.readline()
        found = re.search(r"http://\S+?(?=/ )", line)
        assert found, line + self.process.stderr.read()
        self.address = found[0]
        self.http = httpx.Client(base_url=self.address, timeout=PATIENCE_S)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.process.kill()
        self.process.communicate()

    def until(self, condition):
        """-> what is true at last; None where the process has ended before."""
        ends = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < ends
            try:
                if found := condition():
                    return found
            except (httpx.TransportError, openai.APIError):  # not open yet, or not any more
                pass
            time.sleep(0.01)
        return None

    def open(self):
        assert self.until(lambda: self.http.get("/health").status_code == 200)
        return self

    def accepted(self, n_tokens):
        body = {"prompt": "Once upon a time", "max_tokens": n_tokens, "ignore_eos": True}
        body |= {"temperature": 0}
        return self.http.post("/v1/completions", json=body, headers=ASYNC).json()["id"]

    def ended(self, name):
        def look():
            found = self.http.get(f"/v1/requests/{name}").json()
            return found if found.get("status") in ("done", "failed") else None

        return self.until(look)

    def crashed(self):
        code, _, _ = finish(self.process)
        return code == -signal.SIGSEGV

    def stopped(self):
        self.process.send_signal(signal.SIGTERM)
        code, _, err = finish(self.process)
        assert code == 143, err


@pytest.mark.slow
def test_a_request_that_kills_three_servers_is_answered_as_failed(tmp_path):
    for number in range(3):
        with Server(tmp_path) as server:
            if number == 0:
                server.open()
                good = server.accepted(4)
                assert server.ended(good)["status"] == "done"
                fatal = server.accepted(FATAL)
            assert server.ended(fatal) is None
            assert server.crashed()
    with Server(tmp_path) as server:
        server.open()
        found = server.ended(fatal)
        assert found["status"] == "failed"
        assert found["error"]["code"] == "given_up"
        assert re.match(
            r"the request was begun 3 times, .*\bsend it anew", found["error"]["message"]
        )
        stream = server.http.get(f"/v1/requests/{fatal}/stream")
        assert (stream.status_code, stream.json()["error"]["code"]) == (500, "given_up")
        assert server.ended(good)["status"] == "done"
        other = server.accepted(4)
        assert server.ended(other)["status"] == "done"
        server.stopped()
    with Server(tmp_path) as server:
        server.open()
        assert server.ended(fatal)["error"]["code"] == "given_up", "it stays so"


LONG = 100
SLOW = """
import time

from jlayer.engine.scheduler import Scheduler

quick = Scheduler.drive_until

def slow(*words, **more):
    time.sleep(0.01)
    return quick(*words, **more)

Scheduler.drive_until = slow
"""


@pytest.mark.slow
def test_servers_that_are_stopped_while_it_runs_do_not_count(tmp_path):
    name = None
    for _ in range(4):
        with Server(tmp_path, SLOW + CRASHING) as server:
            server.open()
            if name is None:
                name = server.accepted(LONG)
            assert server.until(partial(running, server, name))
            server.stopped()
    counts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert sum(line["begun"][name] for line in counts) == 0, counts
    with Server(tmp_path) as server:
        server.open()
        assert server.ended(name)["status"] == "done"


def running(server, name):
    found = server.http.get(f"/v1/requests/{name}").json()
    return found.get("status") == "running" and found["choices"][0]["tokens"] > 2


@pytest.mark.slow
def test_a_line_that_kills_three_servers_is_given_up_and_all_others_are_answered(tmp_path):
    def line(name, n_tokens):
        body = {"prompt": "Once upon a time", "max_tokens": n_tokens, "ignore_eos": True}
        return {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body, "temperature": 0},
        }

    lines = [line(str(number), 3 + number) for number in range(6)]
    lines.insert(2, line("fatal", FATAL))
    content = "".join(json.dumps(one) + "\n" for one in lines).encode()
    n_crashes, found = 0, None
    while found is None and n_crashes < 6:
        with Server(tmp_path) as server:
            with openai.OpenAI(
                base_url=f"{server.address}/v1", api_key="none", max_retries=0
            ) as api:
                if n_crashes == 0:
                    server.open()
                    file = api.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
                    name = api.batches.create(
                        input_file_id=file.id,
                        endpoint="/v1/completions",
                        completion_window="24h",
                    ).id
                found = server.until(partial(completed, api, name))
                if found is not None:
                    good = api.files.content(found.output_file_id).text
                    wrong = json.loads(api.files.content(found.error_file_id).text)
            if found is None:
                assert server.crashed()
                n_crashes += 1
    assert n_crashes == 3
    assert {json.loads(one)["custom_id"] for one in good.splitlines()} == set("012345")
    assert wrong["custom_id"] == "fatal"
    assert wrong["response"]["status_code"] == 500
    assert wrong["response"]["body"]["error"]["code"] == "given_up"
    assert (found.request_counts.completed, found.request_counts.failed) == (6, 1)


def completed(api, name):
    found = api.batches.retrieve(name)
    return found if found.status == "completed" else None


@pytest.mark.slow
def test_who_rides_beside_it_is_answered(tmp_path):
    """Those that were running at each crash are not told apart, until each has its last try."""
    names = None
    for _ in range(3):
        with Server(tmp_path, SLOW + CRASHING) as server:
            if names is None:
                server.open()
                names = [server.accepted(LONG), server.accepted(LONG)]
                assert server.until(partial(running, server, names[1]))
                fatal = server.accepted(FATAL)
            assert server.ended(fatal) is None
            assert server.crashed()
    with Server(tmp_path) as server:
        server.open()
        assert server.ended(fatal)["error"]["code"] == "given_up"
        assert [server.ended(name)["status"] for name in names] == ["done", "done"]
