"""`jlayer batch` stopped in the middle, by kill -9 and by signals: once gone on with, its output is
that of an undisturbed run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

from tests.conftest import REPOSITORY
from tests.serving.batch.requests import answers, assert_same, many, written

# The nth write to the output stops in its middle, with the process: a torn line. Lines are asked
# one by one, since every new number of riders takes a program.
TORN = """
import os, signal, sys
sys.modules["starlette"] = sys.modules["uvicorn"] = None  # it needs no server

from jlayer.app.cli import main
from jlayer.serving.batch import run

run.MOST_AHEAD = 1
left, write = int(sys.argv[1]), os.pwrite

def torn(fd, view, offset):
    global left
    left -= 1
    if left == 0:
        write(fd, view[: len(view) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(fd, view, offset)

os.pwrite = torn
sys.exit(main(sys.argv[2:]))
"""
# The parent of the tests may have had SIGINT ignored, which children inherit.
PLAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

from jlayer.app.cli import main

sys.exit(main(sys.argv[1:]))
"""
CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}


def environment():
    return os.environ | {"PYTHONPATH": str(REPOSITORY)}


def start(*words, code=PLAIN):
    common = ("--device", "cpu", "--dtype", "float32")
    command = [sys.executable, "-c", code, *map(str, words), *common]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


@pytest.fixture
def words(fable, tmp_path):
    """Call it with a number of lines and an output: the words of a command."""

    def of(n, out):
        return fable, written(tmp_path / "in", many(n)), tmp_path / out

    return of


@pytest.mark.slow
def test_killed_in_the_middle_of_a_line_it_goes_on_from_the_one_before(words, tmp_path):
    undisturbed, mine = words(20, "undisturbed"), words(20, "out")
    code, _, err = finish(start(0, "batch", *undisturbed, code=TORN))
    assert code == 0, err
    kept = [0]
    for _ in range(2):
        code, _, _ = finish(start(2, "batch", *mine, code=TORN))
        assert code == -signal.SIGKILL
        raw = (tmp_path / "out").read_bytes()
        assert not raw.endswith(b"\n")
        kept.append(raw.count(b"\n"))
    assert sorted({*kept, 20}) == [*kept, 20], "each kept what the one before it had, and more"
    code, out, err = finish(start(0, "batch", *mine, "--json", code=TORN))
    assert code == 0, err
    found = json.loads(out)
    assert (found["answered_before"], found["answered"]) == (kept[-1], 20)
    assert_same(answers(tmp_path / "out"), answers(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_a_thousand_lines_stopped_twenty_times_are_answered_once_each(words, tmp_path):
    n_lines, n_stops = 1000, 20
    code, _, err = finish(start("batch", *words(n_lines, "undisturbed")))
    assert code == 0, err
    mine, out = words(n_lines, "out"), tmp_path / "out"
    chance, kept, left = random.Random(7), 0, n_lines
    numbers = [signal.SIGKILL] * 2 + [signal.SIGINT, signal.SIGTERM]
    for stop in range(n_stops):
        number = numbers[stop % len(numbers)]
        process = start("batch", *mine)
        # Some while it opens the model; most when a random share of the rest is answered.
        is_early = chance.random() < 0.2
        if is_early:
            time.sleep(chance.uniform(0.0, 3.0))
        else:
            wanted = kept + chance.randint(1, max(1, left // (n_stops - stop)))
            wait_for_lines(out, wanted, process)
            time.sleep(chance.uniform(0.0, 0.05))
        process.send_signal(number)
        code, _, err = finish(process)
        assert code in (CODES[number], -number if is_early else CODES[number]), err
        if number != signal.SIGKILL and not is_early:
            assert "lines are answered and kept; run the same command again" in err
        before, kept = kept, len(out.read_bytes().splitlines()) if out.exists() else 0
        assert kept >= before - 1, "at most a torn line is lost"
        left = n_lines - kept
    assert 0 < kept < n_lines, "it was stopped in the middle, each time"
    code, printed, err = finish(start("batch", *mine, "--json"))
    assert code == 0, err
    found = json.loads(printed)
    assert (found["answered"], found["refused"]) == (n_lines, n_lines // 10)
    assert_same(answers(out), answers(tmp_path / "undisturbed"))


def wait_for_lines(path, n_lines, process):
    ends = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < n_lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, "it does not go on"
        time.sleep(0.002)


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_with_its_batches(fable, tmp_path):
    requests = list(many(200))
    content = "".join(json.dumps(one) + "\n" for one in requests).encode()
    chance, batch, n_done = random.Random(5), None, 0
    for stop in range(6):
        process = start("serve", fable, "--port", "0", "--state", tmp_path / "state")
        try:
            address = re.search(r"http://\S+?(?=/ )", process.stderr.readline())[0]
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:
                until_ready(address)
                if batch is None:
                    file = api.files.create(file=("in.jsonl", content), purpose="batch")
                    batch = api.batches.create(
                        input_file_id=file.id,
                        endpoint="/v1/completions",
                        completion_window="24h",
                    )
                wanted = 200 if stop == 5 else n_done + chance.randint(1, (200 - n_done) // 4 + 1)
                found = until_answered(api, batch.id, wanted)
                n_done = found.request_counts.completed + found.request_counts.failed
                if found.status == "completed":
                    lines = [
                        json.loads(line)
                        for file_id in (found.output_file_id, found.error_file_id)
                        for line in api.files.content(file_id).text.splitlines()
                    ]
        finally:
            process.kill()
            process.communicate()
    assert found.status == "completed"
    assert sorted(line["custom_id"] for line in lines) == sorted(
        one["custom_id"] for one in requests
    )
    assert (found.request_counts.completed, found.request_counts.failed) == (180, 20)


def until_ready(address):
    ends = time.monotonic() + 120
    while httpx.get(f"{address}/health").status_code != 200:
        assert time.monotonic() < ends
        time.sleep(0.05)


def until_answered(api, batch_id, n_lines):
    """The batch once so many lines have their answer; all of them: once it is completed."""
    ends = time.monotonic() + 280
    while True:
        found = api.batches.retrieve(batch_id)
        counts = found.request_counts
        is_enough = counts.completed + counts.failed >= n_lines and n_lines < 200
        if is_enough or found.status == "completed":
            return found
        assert found.status in ("validating", "in_progress", "finalizing"), found
        assert time.monotonic() < ends
        time.sleep(0.005)
