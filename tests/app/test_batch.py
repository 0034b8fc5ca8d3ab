"""`jlayer batch`: what it says, what it refuses, and that the same command goes on."""

import json
import sys
from types import SimpleNamespace

import pytest

from jlayer.app.cli import main
from jlayer.app.verbs.batch import Told, View
from jlayer.serving.batch import run
from jlayer.serving.batch.journal import Journal
from tests.serving.batch.requests import answers, many, request, written

RUN = ["--device", "cpu", "--dtype", "float32"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def few_ahead(monkeypatch):
    """Every new number of riders takes a program."""
    monkeypatch.setattr(run, "MOST_AHEAD", 2)


@pytest.fixture
def batch(fable, tmp_path):
    """Call it with requests and words of the command."""

    def go(requests, *words, name="out"):
        source = written(tmp_path / "in", requests)
        return main(["batch", str(fable), str(source), str(tmp_path / name), *RUN, *words])

    return go


def test_it_answers_all_lines_and_the_same_command_has_nothing_left(batch, tmp_path, capsys):
    assert batch(many(8), "--json", "--served-name", "tales") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lines"], found["answered"], found["refused"]) == (8, 8, 1)
    assert found["first_refusal"].startswith("line 8: 400, max_tokens: found -1")
    lines = answers(tmp_path / "out")
    assert lines["line 0"]["response"]["body"]["model"] == "tales"
    before = (tmp_path / "out").read_bytes()
    assert batch(many(8), "--served-name", "tales") == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(
        "out: holds the answers of all 8 lines (8 of them before), 1 of them with an error\n"
    )
    assert "in: 8 lines, 8 of them answered before" in captured.err
    assert (tmp_path / "out").read_bytes() == before


def test_a_changed_input_or_model_needs_another_output(batch, tmp_path, capsys):
    assert batch([request("a")]) == 0
    before = (tmp_path / "out").read_bytes()
    assert batch([request("a"), request("b")]) == 2
    assert "is the answer of another input" in capsys.readouterr().err
    assert batch([request("a")], "--context", "64") == 2
    assert "is the answer of another model, dtype, context" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == before


def test_wrong_lines_are_said_before_a_model_is_opened(tmp_path, capsys):
    source = written(tmp_path / "in", [request("a"), request("a")])
    assert main(["batch", "no/such/model", str(source), str(tmp_path / "out")]) == 2
    assert "line 2: custom_id 'a' stands in line 1 already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_there_is_no_model_no_output_is_left(tmp_path, capsys):
    source = written(tmp_path / "in", [request("a")])
    assert main(["batch", str(tmp_path / "none"), str(source), str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_written_to(batch, tmp_path, capsys):
    before = written(tmp_path / "in", many(2)).read_bytes()
    (tmp_path / "link").symlink_to("in")
    for name in ("in", "link"):
        assert batch(many(2), name=name) == 2
        assert "is the input; name another file" in capsys.readouterr().err
        assert (tmp_path / "in").read_bytes() == before


def test_an_output_that_another_writes_to_is_left_to_it(batch, tmp_path, capsys):
    with Journal(tmp_path / "out"):
        assert batch(many(2)) == 7
    assert "another batch writes to it" in capsys.readouterr().err


def test_without_its_package_it_says_which(batch, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "msgspec", None)
    assert batch(many(2)) == 2
    assert 'pip install -e ".[serve]"' in capsys.readouterr().err


def test_a_chat_needs_a_template_and_takes_one(batch, tmp_path):
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2, "temperature": 0}
    chat = {**request("a"), "url": "/v1/chat/completions", "body": body}
    assert batch([chat], name="without") == 0
    (without,) = answers(tmp_path / "without").values()
    assert without["response"]["body"]["error"]["code"] == "no_chat_template"
    (tmp_path / "template").write_text(TEMPLATE)
    assert batch([chat], "--chat-template", str(tmp_path / "template")) == 0
    (found,) = answers(tmp_path / "out").values()
    assert found["response"]["body"]["choices"][0]["message"]["role"] == "assistant"


def test_a_run_that_fails_says_what_is_kept(batch, tmp_path, monkeypatch, capsys):
    add, n_left = Journal.add, 2

    def full(journal, lines):
        nonlocal n_left
        n_left -= 1
        if not n_left:
            monkeypatch.setattr("os.pwrite", fail)
        add(journal, lines)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Journal, "add", full)
        assert batch(many(6)) == 6
    monkeypatch.undo()
    n_kept = len(answers(tmp_path / "out"))
    assert 0 < n_kept < 6
    err = capsys.readouterr().err
    assert f"{n_kept} of 6 lines are answered and kept; run the same command again" in err
    assert "cannot be written (No space left on device)" in err


def test_how_far_it_is_is_said_in_one_line(monkeypatch, capsys):
    desk = SimpleNamespace(riders=64, pass_=12, layer=3, n_layers=80, phase="compiling head")
    batch = SimpleNamespace(n_done=120, n_lines=1000, n_before=0, lines_per_s=3.25, eta_s=271.0)
    view = View(SimpleNamespace(status=lambda: desk), batch)
    line = (
        "120 of 1,000 lines, 3.25 lines/s, 64 riders, sweep 12 layer 3/80, compiling head, "
        "4:31 left"
    )
    view.wait("waiting for the disk")
    assert view.status() == [line, "waiting for the disk"]
    monkeypatch.setattr("jlayer.app.verbs.batch.TOLD_S", 0.0)
    told = Told()
    told.view = view
    told()
    assert capsys.readouterr().err == f"jlayer: {line}\n"
