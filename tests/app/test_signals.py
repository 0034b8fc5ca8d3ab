"""A signal at any moment of a command: one line, the signal's exit code, one object with --json."""

import json
import os
import signal
import sys
import time
from types import ModuleType

import pytest

from jlayer.app import cli
from jlayer.app.cli import main
from jlayer.errors import StorageError
from jlayer.interrupts import released
from tests.app.processes import finish, start
from tests.conftest import BUNDLED

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {130: "interrupted", 143: "terminated"}


@pytest.fixture
def verb(monkeypatch):
    """Puts a function in the place of a verb's `run`."""
    # pytest may have been started with SIGINT ignored, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def put(run):
        module = ModuleType("tests.app.verb")
        module.run, module.add_arguments = run, lambda parser: None
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.VERBS, "test", (module.__name__, "for a test"))

    yield put
    signal.signal(signal.SIGINT, before)


def refuse(number):
    signal.raise_signal(number)
    raise StorageError("disk: an error after the signal")


def wait(number):
    with released():
        signal.raise_signal(number)
        pytest.fail("it waits on")


@pytest.mark.parametrize(
    "run", [signal.raise_signal, refuse, wait], ids=["result", "error", "wait"]
)
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_signal_goes_before_the_result_and_before_an_error(verb, capsys, run, number, as_json):
    def run_it(args):
        run(number)
        return {"a": "result"}

    verb(run_it)
    assert main(["test", *["--json"] * as_json]) == CODES[number]
    captured = capsys.readouterr()
    word = WORDS[CODES[number]]
    assert captured.err == f"jlayer: {word}\n"
    if as_json:
        found = json.loads(captured.out)
        assert found == {
            "error": word,
            "exit_code": CODES[number],
            "finish_reason": "interrupted",
        }
    else:
        assert captured.out == ""


def test_a_signal_after_the_result_adds_no_second_object(verb, capsys, monkeypatch):
    verb(lambda args: {"a": "result"})
    monkeypatch.setattr(cli, "print", lambda *words, **to: raise_after(print, words, to), False)
    assert main(["test", "--json"]) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": "result"}
    assert captured.err == "jlayer: interrupted\n"


def raise_after(print, words, to):
    print(*words, **to)
    if "file" not in to:  # what goes to stdout
        signal.raise_signal(signal.SIGINT)


# Sends itself a signal when a module is looked for, and says at the end whether its import ended.
DURING_IMPORT = """
import atexit, os, runpy, signal, sys
name, number, *words = sys.argv[1:]

class Finder:
    def find_spec(self, wanted, *_):
        if wanted == name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))

def tell():
    spec = getattr(sys.modules.get(name), "__spec__", None)
    is_whole = spec is not None and not spec._initializing
    print(f"import {'ended' if is_whole else 'broken off'}", file=sys.stderr)

atexit.register(tell)
sys.meta_path.insert(0, Finder())
sys.argv = ["jlayer", *words]
runpy.run_module("jlayer", run_name="__main__")
"""


def commands(folder, text):
    run = ("--device", "cpu")
    return {
        "generate": ("generate", folder, "-p", "Once upon a time", "-n", "900", *run),
        "demo": ("demo", *run),
        "bench": ("bench", folder, *run),
        "eval": ("eval", "perplexity", folder, "--text", text, "--window", "64", *run),
    }


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little girl. " * 4000)  # takes some seconds
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jlayer.app.cli", "numpy", "jax", "jax._src.xla_bridge"])
def test_a_signal_during_an_import_is_held_until_the_import_is_over(text, name):
    """Raised there, it was dropped, or broke the import off: the process crashed at its end."""
    processes = {}
    for place, (verb, words) in enumerate(commands(BUNDLED, text).items()):
        number = list(CODES)[place % 2]
        words = (name, int(number), *words, "--json")
        processes[verb] = CODES[number], start(*words, code=DURING_IMPORT)
    for verb, (code, process) in processes.items():
        status, out, err = finish(process)
        assert (status, err.splitlines()[-2:]) == (
            code,
            [f"jlayer: {WORDS[code]}", "import ended"],
        ), (verb, err)
        assert json.loads(out)["finish_reason"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "demo", "bench", "eval"])
def test_a_signal_in_the_first_seconds_ends_a_command_cleanly(text, verb):
    words = commands(BUNDLED, text)[verb]
    for attempt in range(4):
        number = list(CODES)[attempt % 2]
        as_json = attempt // 2 % 2 == 1
        process = start(*words, *["--json"] * as_json)
        wait_for_hold(process)
        time.sleep(0.1 + 0.5 * attempt)
        process.send_signal(number)
        status, out, err = finish(process)
        assert status == CODES[number], (attempt, err)
        assert WORDS[CODES[number]] in err or "(interrupted)" in err
        assert "Traceback" not in err
        assert "ignored" not in err
        if as_json:
            assert json.loads(out)["finish_reason"] == "interrupted"


def wait_for_hold(process):
    """Waits until the process catches both signals: Python itself has started."""
    mask = sum(1 << (number - 1) for number in CODES)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with open(f"/proc/{process.pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & mask == mask:
            return
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    pytest.fail("the process holds no signals")
