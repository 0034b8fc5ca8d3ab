"""Standard streams as a shell may hand them over: closed, full, left, in another encoding."""

import functools
import json
import os
import shlex
import subprocess
import sys
from itertools import product

import pytest

from tests.campaigns import slow_but
from tests.conftest import BUNDLED

PROGRAM = f"{shlex.quote(sys.executable)} -m jlayer"
RUN = "--device cpu -n 3"
FULL = "jlayer: stdout: No space left on device; the output is not complete"


@pytest.fixture(scope="module")
def commands(fable, tmp_path_factory):
    """Each command that prints, without what sets its streams."""
    folder = tmp_path_factory.mktemp("streams")
    text = folder / "text"
    text.write_text("Once upon a time there was a little girl.")
    return {
        "generate": f"generate {fable} -p Once {RUN}",
        "plan": "plan llama-3.2-1b-instruct",
        "convert": f"convert {BUNDLED} {fable}",  # which is there already
        "verify": f"verify {fable}",
        "export": f"export {fable} {folder}/exported-$$ --format huggingface",
        "eval": f"eval perplexity {fable} --text {text} --device cpu",
        "help": "--help",
        "generate help": "generate --help",
    }


LIGHT = ("plan", "convert", "verify", "export", "help", "generate help")
# These start JAX, which takes some seconds each time.
HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in ("generate", "eval")]
VERBS = [*LIGHT, *HEAVY]


def shell(line, *, buffered=True, **env):
    """(exit code, stdout, stderr) of `jlayer LINE`, with the shell's redirections."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", f"{PROGRAM} {line}"],
        capture_output=True,
        env={**kept, **({} if buffered else {"PYTHONUNBUFFERED": "1"}), **env},
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return done.returncode, done.stdout.decode(errors="surrogateescape"), done.stderr.decode()


@pytest.fixture(scope="module")
def whole(commands):
    """What each command prints where nothing is in its way."""
    return functools.cache(lambda name: shell(commands[name])[1])


@pytest.mark.parametrize("name", VERBS)
def test_a_full_disk_is_an_error_of_stdout(commands, name):
    code, _, err = shell(f"{commands[name]} >/dev/full")
    assert code == 6
    assert err.splitlines()[-1] == FULL
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["generate", "plan"])
def test_a_full_disk_is_an_error_with_json_too(commands, name):
    code, _, err = shell(f"{commands[name]} --json >/dev/full", buffered=False)
    assert code == 6
    assert err.splitlines()[-1] == FULL


@pytest.mark.parametrize("name", VERBS)
def test_without_stdout_a_command_does_its_work_and_ends_as_always(commands, name):
    code, _, err = shell(f"{commands[name]} >&-")
    assert code == 0
    assert all(line.startswith("jlayer: ") for line in err.splitlines())


# Each command, and each way in which there is no stderr.
QUICK = [*product(("2>&-",), LIGHT), ("2>/dev/full", "plan"), ("2> >(true)", "plan")]
NO_STDERR = product(("2>&-", "2>/dev/full", "2> >(true)"), (*LIGHT, "generate", "eval"))


@pytest.mark.parametrize("case", slow_but(NO_STDERR, QUICK), ids=" ".join)
def test_without_stderr_stdout_has_the_result_alone(commands, whole, case):
    stderr, name = case
    code, out, err = shell(f"{commands[name]} {stderr}")
    assert (code, err) == (0, "")
    if name == "export":  # to another folder each time
        assert len(out.splitlines()) == 1
    else:
        assert out == whole(name)


def test_without_stderr_a_run_shows_its_text_alone(commands, whole):
    assert shell(f"{commands['generate']} 2>&-") == (0, whole("generate"), "")


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_without_stderr_json_is_one_object_and_an_error_keeps_its_code(stderr):
    words = "plan llama-3.2-1b-instruct --device-memory 1MiB --json"
    code, out, _ = shell(f"{words} {stderr}")
    assert code == 4
    assert json.loads(out)["fits"] is False


def test_no_file_takes_the_number_of_a_closed_stream(commands):
    """What a library writes to descriptor 2 would go into that file."""
    code = (
        "import os; from jlayer.app.streams import prepare; prepare()\n"
        "assert os.open('/dev/zero', os.O_RDONLY) > 2"
    )
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- 2>&- >&-"]
    )
    assert done.returncode == 0


@pytest.mark.parametrize("words", ["", "-p -", "--prompt-file -"])
def test_a_closed_stdin_is_no_prompt(fable, words):
    code, out, err = shell(f"generate {fable} {words} --device cpu <&-")
    assert (code, out) == (2, "")
    assert "stdin is closed" in err
    assert len(err.splitlines()) == 1


def test_a_closed_stdin_says_no_to_a_question(tmp_path):
    code, _, err = shell(f"convert {BUNDLED} {tmp_path}/new --delete-source <&-")
    assert code == 2
    assert "--yes" in err


def test_a_stdin_that_is_not_for_reading_is_an_error_of_the_system(fable, tmp_path):
    code, _, err = shell(f"generate {fable} --device cpu 0>{tmp_path}/file")
    assert code == 6
    assert err.startswith("jlayer: stdin: ")


@pytest.mark.parametrize(
    ("line", "code"),
    [("plan llama-3.2-1b-instruct", 0), ("plan llama-3.2-1b-instruct --device-memory 1MiB", 4)],
)
def test_a_reader_that_leaves_does_not_change_the_code(line, code):
    found, _, err = shell(f"{line} | true; exit ${{PIPESTATUS[0]}}", buffered=False)
    assert found == code
    assert "Traceback" not in err


SAID = "Dog 🐶 “café”"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"Dog \U0001f436 \u201ccaf\xe9\u201d"),
        ("latin-1", "Dog \\U0001f436 \\u201ccaf\udce9\\u201d"),  # é is one byte there
        ("utf-8", SAID),
    ],
)
def test_text_that_stdout_cannot_take_is_escaped_and_it_says_so_once(fable, encoding, shown):
    line = f"generate {fable} -p '{SAID}' --show-prompt"
    code, out, err = shell(line, PYTHONIOENCODING=encoding)
    assert code == 0
    if encoding == "utf-8":
        out = out.encode(errors="surrogateescape").decode()
    assert out == f"{shown}\n"
    assert err.count("PYTHONIOENCODING=utf-8") == (encoding != "utf-8")
    assert err.count("\n") == (encoding != "utf-8")
    _, out, err = shell(f"{line} --json", PYTHONIOENCODING=encoding)
    assert json.loads(out)["prompt"] == SAID  # JSON has escapes of its own: nothing is lost
    assert err == ""


def test_a_name_that_is_no_text_can_be_printed(tmp_path, fable):
    """A folder's name is bytes; in a line it is shown with escapes."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.symlink(fable, folder)
    code, out, err = shell(f"verify {tmp_path}/$'\\xff'")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}/\\udcff: whole")


def test_a_stream_that_returns_at_once_is_waited_for(fable):
    """Another program on the same pipe or terminal may have set it so."""
    code = (
        "import fcntl, os, subprocess, sys, time\n"
        "out, side = os.pipe(); os.set_blocking(side, False)\n"
        "into, prompt = os.pipe(); os.set_blocking(into, False)\n"
        f"words = [sys.executable, '-m', 'jlayer', 'generate', {str(fable)!r}]\n"
        "run = subprocess.Popen([*words, '--show-prompt'], stdin=into, stdout=side)\n"
        "os.close(side); time.sleep(1.5)\n"
        "os.write(prompt, b'Once ' * 10000); time.sleep(0.2)\n"
        "os.write(prompt, b'upon'); os.close(prompt); time.sleep(0.5)\n"
        "text = open(out, 'rb').read()\n"
        "assert run.wait() == 0\n"
        "assert text == b'Once ' * 10000 + b'upon\\n', (len(text), text[-20:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
