"""`jlayer chat` from outside: on a terminal with its keys, over a pipe, and what it refuses."""

import io
import json
import os
import re
import signal
from types import SimpleNamespace

import pytest

import jlayer
from jlayer.app.cli import main
from tests.app.chat.talk import TEMPLATE
from tests.app.processes import finish, start
from tests.app.screen import PYTHON, on_terminal
from tests.conftest import BUNDLED

FLOAT32 = ("--dtype", "float32")  # as the tests beside this one, which share its programs
ONE, TWO = "Once upon a time there was a king. Who was he?", "And what did he see?"
# A chat whose layers take their time, with the line under the text drawn often.
COMMAND = """
import sys, time
from jlayer.app import progress
from jlayer.__main__ import run
progress.PATIENCE_S = progress.AnswerView.SHOWN_S = 0.0
progress.View.refresh_s = 0.002
on_step = progress.AnswerView.on_step
progress.AnswerView.on_step = lambda *step: on_step(*step) or time.sleep(0.01)
sys.exit(run())
"""
PROMPT = r"\x1b\[\?2004h"  # readline is ready for a line: it asks for pasted text to be marked
CLEAR_LINE = b"\x15"


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def words(template):
    return ["chat", str(BUNDLED), "--chat-template", str(template), "--device", "cpu", *FLOAT32]


@pytest.fixture
def state(tmp_path):
    """The environment of a process with a folder of its own for what it remembers."""
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def piped(monkeypatch, capsys, words):
    """Runs a chat over a pipe -> (exit code, stdout, stderr)."""

    def run(text, *more):
        stdin = SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False)
        monkeypatch.setattr("sys.stdin", stdin)
        code = main([*words, "-n", "8", *more])
        return code, *capsys.readouterr()

    return run


def answers(*said):
    """What the model answers, one turn after another."""
    messages = []
    for text in said:
        messages.append({"role": "user", "content": text})
        found = jlayer.generate(
            BUNDLED,
            messages,
            max_new_tokens=8,
            chat_template=TEMPLATE,
            device="cpu",
            dtype="float32",
        )
        messages.append({"role": "assistant", "content": found.text})
        yield found.text


def times(number, expression=PROMPT):
    return rf"(?s)(?:{expression}.*?){{{number}}}"


def prompted(*keys):
    """Types the first at the first prompt, and so on."""
    return [(times(number + 1), each) for number, each in enumerate(keys)]


def test_over_a_pipe_the_answers_alone_go_to_stdout(piped):
    code, out, err = piped(f'{ONE}\n\n"""\n{TWO}\n"""\n/stats\n')
    assert code == 0
    assert out == "".join(f"{text}\n" for text in answers(ONE, TWO))
    assert "all        2 answers" in err
    assert "\x1b" not in out + err


def test_with_json_there_is_one_object_with_all_that_was_said(piped):
    code, out, err = piped(f"{ONE}\n", "--json", "--system", "Be brief.")
    assert code == 0
    found = json.loads(out)
    assert [one["role"] for one in found["messages"]] == ["system", "user", "assistant"]
    assert found["messages"][2]["content"] in err
    assert found["stats"]["turns"] == 1
    assert found["stats"]["new_tokens"] == 8
    assert found["stats"]["context_limit"] == 1024
    assert found["memory"]["host_peak_bytes"] > 0


def test_a_line_that_fails_does_not_end_the_rest_and_counts_at_the_end(piped):
    code, out, err = piped(f"refuse\n/sav x\n{ONE}\n", "--json")
    found = json.loads(out)
    assert code == found["exit_code"] == 2
    assert [one["role"] for one in found["messages"]] == ["user", "assistant"]
    lines = [
        line for line in err.splitlines() if line.startswith("jlayer: ") and "tokens" not in line
    ]
    assert "no such word" in lines[-3]
    assert "did you mean /save?" in lines[-2]
    assert lines[-1].startswith("jlayer: 2 turns failed, the first with: ")
    assert "no such word" in lines[-1]


def test_nothing_said_is_nothing_done(piped):
    assert piped("")[:2] == (0, "")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--num-return-sequences", "2"], 2, "unrecognized arguments"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--speculate", "draft"], 2, "--draft"),
        (["--template-var", "x"], 2, "expected NAME=JSON"),
        (["--system", "refuse"], 2, "no such word"),
        (["--context", "4096"], 2, "the model's own limit is 1024"),
        (["--device-memory", "1MiB"], 4, "device_memory"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_said(words, capsys, more, code, said):
    assert main([*words, *more]) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("jlayer: ")
    assert said in line


def test_a_model_without_a_chat_template_says_what_there_is_instead(capsys):
    assert main(["chat", str(BUNDLED)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for what in ("no chat template", "jlayer generate", "--chat-template F"):
        assert what in line


def test_on_a_terminal_an_answer_streams_and_ctrl_c_stops_it_and_not_the_chat(words, state):
    """The first leaves by a second Ctrl-C; the next one has what was typed and said."""
    argv = [PYTHON, "-c", COMMAND, *words, "-n", "60"]
    keys = [
        (PROMPT, f"{ONE}\r".encode()),
        (
            r"token [1-4]\d: layer \d of 6, \d.\d s a forward pass, at most \d+ s left",
            b"typed ahead\x03",
        ),
        (times(2), b"\x03"),
    ]
    code, screen, written = on_terminal(argv, keys=keys, env=state)
    assert code == 130
    text = screen.text()
    assert f"> {ONE}\n" in text
    assert "(stopped; what there is of the answer stays)" in text
    assert "^C" not in text
    assert "typed ahead" not in text
    assert "of 6," not in text, "the line under the text is gone"

    more = [PYTHON, "-m", "jlayer", *words, "-n", "3"]
    keys = prompted(
        b"/load\r", b"\x1b[A\x1b[A\x01so: \r", b"/edit 1\r", CLEAR_LINE + b"\r", b"\x04"
    )
    code, screen, written = on_terminal(more, keys=keys, env=state)
    assert code == 0
    text = screen.text()
    assert "1 message and its answer loaded" in text
    assert f"> so: {ONE}\n" in text, "typed in the session before"
    assert "(cut at 3 tokens" in text
    assert "nothing was changed\n" in text
    assert re.search(rf"edit 1 > (\x1b\[0m)?{re.escape(ONE)}", written)


def test_text_of_several_lines_that_is_pasted_is_one_message(words, state):
    pasted = b"\x1b[200~one\rtwo\t/x\r\x1b[201~three"
    keys = [
        (PROMPT, pasted),
        (r"three", b"\r"),
        (times(2), b"/save talk.json\r"),
        (times(3), b"\x04"),
    ]
    folder = state["XDG_STATE_HOME"]
    argv = ["sh", "-c", f'mkdir -p {folder}; cd {folder}; exec "$@"', "sh", PYTHON, "-m", "jlayer"]
    code, screen, _ = on_terminal([*argv, *words, "-n", "3"], keys=keys, env=state)
    assert code == 0, screen.text()
    with open(f"{folder}/talk.json") as file:
        first, second = json.load(file)["messages"]
    assert first["content"] == "one\ntwo\t/x\nthree"
    assert second["finish_reason"] == "length"


@pytest.mark.slow
def test_stdout_may_be_a_file_while_somebody_types(words, state, tmp_path):
    out = tmp_path / "out.json"
    argv = ["sh", "-c", f'exec "$@" > {out}', "sh", PYTHON, "-m", "jlayer", *words, "-n", "8"]
    keys = prompted(f"{ONE}x\b\r".encode(), b"\x04")
    code, screen, _ = on_terminal([*argv, "--json"], keys=keys, env=state)
    assert code == 0
    (answer,) = answers(ONE)
    user, said = json.loads(out.read_text())["messages"]
    assert (user["content"], said["content"]) == (ONE, answer)
    assert f"> {ONE}\n" in screen.text()
    shown = re.sub(r"\s", "", screen.text())
    assert re.sub(r"\s", "", answer) in shown


@pytest.mark.slow
@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_sigterm_leaves_with_its_code_and_the_terminal_as_it_was(words, state, when):
    def kill(written):
        os.kill(int(re.search(r"pid (\d+)", written)[1]), signal.SIGTERM)

    code = f'import os; print("pid", os.getpid(), flush=True)\n{COMMAND}'
    argv = [
        "sh",
        "-c",
        '"$@"; echo code $?; stty -a',
        "sh",
        PYTHON,
        "-c",
        code,
        *words,
        "-n",
        "60",
    ]
    keys = [(PROMPT, kill)]
    if when == "answer":
        keys = [(PROMPT, f"{ONE}\r".encode()), (r"token [1-4]\d: layer", kill)]
    code, screen, _ = on_terminal(argv, keys=keys, env=state)
    assert code == 0
    text = screen.text()
    assert "code 143" in text
    assert re.search(r"(?<!-)\becho\b", text)
    assert re.search(r"(?<!-)\bicanon\b", text)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_chat(words, state):
    process = start(*words, "-n", "400", stdin=-1, env={**os.environ, **state})
    process.stdout.close()
    process.stdin.write(f"{ONE}\n{TWO}\n")
    process.stdin.flush()
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0, err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_ends_a_chat_over_a_pipe(words, state):
    process = start(*words, "-n", "900", "--json", stdin=-1, env={**os.environ, **state})
    process.stdin.write(f"{ONE}\n")
    process.stdin.flush()
    assert "layers" in process.stderr.readline()
    read = process.stderr.read(1)  # the answer, which goes to stderr with --json
    assert read
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    assert code == 130
    messages = json.loads(out)["messages"]
    assert messages[-1]["finish_reason"] == "interrupted"
