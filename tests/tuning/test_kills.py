"""`jlayer tune` stopped by kill -9 and by signals: once gone on with, OUT is byte for byte that of
an undisturbed run.

Imports take half of such a run. So one process makes them, and each run is a fork of it; no backend
of JAX's is started before that.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jlayer.tuning.disk import MADE, UNFINISHED, UNSAVED, WORK
from tests.conftest import BUNDLED, REPOSITORY

PARENT = """
import json, os, signal, sys
import jlayer.app.progress, jlayer.app.verbs.tune, jlayer.checkpoint.store, jlayer.interrupts
import jlayer.streaming.watch, jlayer.text.tokenizer, jlayer.tuning.data, jlayer.tuning.run
import orbax.checkpoint, xxhash
from jlayer.app.cli import main

def child(asked):
    for number, name in (1, "out"), (2, "err"):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stderr.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(asked["code"], globals())
    code = main(asked["words"])
    sys.stdout.flush()
    os._exit(code)

while line := sys.stdin.readline():
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        child(asked)
    print(pid, flush=True)
    sys.stdin.readline()  # until then its number is not given to another process
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# Sends itself a signal at the nth call of a function.
AT = """
import jlayer.tuning.disk as disk, jlayer.tuning.run as run, jlayer.tuning.saving as saving
left, real = {n}, {where}.{name}
def stopped(*words, **more):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.{signal})
    return real(*words, **more)
{where}.{name} = stopped
"""
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
STEPS = 5
COMMON = (
    *("--steps", STEPS, "--tokens-per-step", 64, "--length", 32, "--rank", 2, "--save-every", 1),
    *("--device", "cpu", "--learning-rate", 0.01),
)
HELD = "HELD"  # stands for a file of text that is held out
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Run:
    """One that was begun. `code`: waits for its exit code, which is below 0 after a signal."""

    def __init__(self, parent, asked):
        self._parent, self._asked, self._code = parent, asked, None
        self.pid = self._ask(json.dumps(asked))

    def _ask(self, line):
        self._parent.stdin.write(line + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    @property
    def code(self):
        if self._code is None:
            self._code = self._ask("wait")
        return self._code

    @property
    def err(self):
        path = Path(self._asked["err"])  # which the run opens
        return path.read_text() if path.exists() else ""

    @property
    def out(self):
        return Path(self._asked["out"]).read_text()

    def is_over(self):
        """A process that has ended and was not waited for has no command line."""
        return not Path(f"/proc/{self.pid}/cmdline").read_bytes()

    def until(self, is_so):
        """Waits until something is so; False where it ends before."""
        ends = time.monotonic() + 120
        while not is_so():
            assert time.monotonic() < ends, self.err
            if self.is_over():
                return False
            time.sleep(0.001)
        return True


@pytest.fixture(scope="module")
def parent():
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def begin(parent, tmp_path_factory):
    """Call it with OUT and more words of the command: a run that is under way. `at`: where it is
    sent a signal (SIGKILL if none is named)."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Once upon a time there was a girl number {n} who had a cat. " for n in range(30)]
    for name, some in {"data": texts, "held": texts[:3]}.items():
        lines = (json.dumps({"text": text * (1 + n % 3)}) for n, text in enumerate(some))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))

    def begin(out, *words, at=None):
        words = [folder / "held.jsonl" if word == HELD else word for word in words]
        words = ("tune", BUNDLED, folder / "data.jsonl", out, *COMMON, *words)
        files = {name: f"{out}.std{name}" for name in ("out", "err")}
        code = AT.format(**{"signal": "SIGKILL"} | at) if at else ""
        return Run(parent, {"words": list(map(str, words)), "code": code, **files})

    return begin


@pytest.fixture(scope="module")
def undisturbed(begin, tmp_path_factory):
    """Call it with words of the command: what such a run makes."""
    known = {}

    def make(*words):
        if words not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            run = begin(out, *words)
            assert run.code == 0, run.err
            known[words] = made(out)
        return known[words]

    return make


def made(folder):
    """The content of the files of an adapter; beside it there is nothing of its run any more."""
    beside = {path.name for path in folder.parent.iterdir() if path.name.startswith(folder.name)}
    assert not {name for name in beside if WORK in name}
    assert sorted(os.listdir(folder)) == FILES
    return {name: (folder / name).read_bytes() for name in FILES}


FEW = ("--targets", "q_proj,down_proj", "--layers", "5")  # compiled in half the time
ALL = ("--dropout", 0.1, "--held-out", HELD, "--eval-every", 3, *FEW)


@pytest.mark.slow
def test_killed_three_times_it_makes_the_same_bytes(begin, undisturbed, tmp_path):
    """In the middle of a checkpoint, in a step, and after OUT was moved to its place."""
    expected, out = undisturbed(*ALL), tmp_path / "out"
    moments = (
        {"where": "saving", "name": "sync_tree", "n": 2},
        {"where": "run", "name": "length_of", "n": 2},
        {"where": "disk.WorkFolder", "name": "remove", "n": 1},
    )
    kept = []
    for moment in moments:
        run = begin(out, *ALL, at=moment)
        assert run.code == -signal.SIGKILL, run.err
        kept.append(max(int(n) for n in os.listdir(f"{out}{WORK}") if n.isdigit()))
    assert kept == [2, 3, STEPS]
    assert out.is_dir()
    run = begin(out, *ALL)
    assert run.code == 0, run.err
    assert f"goes on after step {STEPS} of {STEPS}" in run.err
    assert run.out.startswith(f"{out}: {STEPS} steps, loss ")
    assert made(out) == expected


def test_a_signal_is_one_line_and_the_same_command_goes_on(begin, undisturbed, tmp_path):
    """What is due between two steps is not lost: the signal comes while the text that is held out
    is measured after the third and the last one."""
    expected, out = undisturbed(*ALL), tmp_path / "out"
    words = (*ALL, "--save-every", 0, "--json")
    found = []
    for number, n, step in ((signal.SIGINT, 2, 3), (signal.SIGTERM, 2, STEPS)):
        at = {"where": "run.Tuning", "name": "perplexity", "n": n, "signal": number.name}
        run = begin(out, *words, at=at)
        assert run.code == CODES[number], run.err
        assert run.err.splitlines()[-1] == (
            f"jlayer: stopped after step {step} of {STEPS}; the same command goes on"
        )
        lines = [json.loads(line) for line in run.out.splitlines()]
        found += lines[:-1]
        assert (lines[-1]["finish_reason"], lines[-1]["steps"]) == (WORDS[number], step)
        assert not out.exists()
    run = begin(out, *words)
    assert run.code == 0, run.err
    found += [json.loads(line) for line in run.out.splitlines()]
    assert [(line["step"], "perplexity" in line) for line in found[:-1]] == [
        *((1, False), (2, False), (3, True)),
        *((4, False), (5, True)),
    ]
    assert found[-1]["finish_reason"] == "complete"
    assert made(out) == expected


class Moments:
    """When to kill runs: for each kind, what is waited for, and how long at most after that."""

    def __init__(self, chance):
        self.chance, self.seen = chance, dict.fromkeys(("opening", "step", "saving", "end"), 0)

    def kill(self, run, out):
        """Kills a run at some moment; False where it ended before."""
        work = f"{out}{WORK}"
        kind = self.chance.choice(list(self.seen))
        if kind == "opening":
            # A part of it alone starts JAX, or reads a checkpoint.
            is_so, most = (lambda: True), 1.5
        elif kind == "step":
            count = self.chance.randint(0, 3)
            is_so, most = (lambda: run.err.count("jlayer: step") > count), 0.3
        elif kind == "saving":
            is_so, most = (lambda: any(UNSAVED in name for name in names(work))), 0.1
        else:
            ends = {MADE, MADE + UNFINISHED}
            is_so, most = (lambda: ends & set(names(work)) or os.path.exists(out)), 0.02
        if run.until(is_so):
            time.sleep(self.chance.uniform(0, most))
            os.kill(run.pid, signal.SIGKILL)
        assert run.code in (0, -signal.SIGKILL), run.err
        self.seen[kind] += run.code != 0
        return run.code != 0


def names(folder):
    try:
        return os.listdir(folder)
    except OSError:
        return []


@pytest.mark.slow
def test_killed_at_thirty_moments_it_makes_the_same_bytes(begin, undisturbed, tmp_path):
    held = ("--held-out", HELD, "--eval-every", 2)
    settings = ((), ("--dropout", 0.2), held, (*held, "--dropout", 0.2, "--save-every", 2))
    expected = [undisturbed(*one) for one in settings]
    assert len({tuple(files.values()) for files in expected}) == len(settings)
    moments, n_kills, n_ends, n_run = Moments(random.Random(11)), 0, 0, 0
    while n_kills < 30:
        kind = n_run % len(settings)
        out = tmp_path / f"out {n_run}"
        n_run += 1
        for _ in range(12):
            run = begin(out, *settings[kind])
            if not moments.kill(run, out):
                break
            n_kills += 1
            if out.exists() and not names(f"{out}{WORK}"):
                n_ends += 1  # nothing is left to do, but to remove what is aside
                break
        run = begin(out, *settings[kind])
        if run.code == 2:
            assert f"{out}: is there already" in run.err
        else:
            assert run.code == 0, run.err
        assert "damaged" not in run.err
        assert made_but_for_rest(out) == expected[kind], moments.seen
    print(moments.seen, n_run, n_ends)
    assert min(moments.seen.values()) > 0, moments.seen


def made_but_for_rest(out):
    """A run that was killed once its folder was out of the way leaves that aside."""
    for path in out.parent.glob(f"{out.name}{WORK}{UNFINISHED}"):
        assert not (out.parent / f"{out.name}{WORK}").exists()
        subprocess.run(["rm", "-r", path], check=True)
    return made(out)
