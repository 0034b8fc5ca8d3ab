"""What is typed: lines that become messages, commands, and what is kept of them."""

import io
import json
import os
from types import SimpleNamespace

import pytest

from jlayer.app.chat import history as histories
from jlayer.app.chat.commands import COMMANDS, Command, as_typed, command_of, message_of
from jlayer.app.chat.history import History, state_path
from jlayer.app.chat.reading import Cleared, Pipe, read
from jlayer.errors import UsageError
from tests.app.chat.talk import CTRL_C, Typist
from tests.conftest import REPOSITORY


@pytest.fixture
def piped(monkeypatch):
    def pipe(raw):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
        return Pipe()

    return pipe


def said(source):
    found = []
    try:
        while True:
            found.append(read(source))
    except EOFError:
        return found


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\r\n\r\ntwo", ["one", "", "two"]),
        (b"one\\\ntwo\\\nthree\n", ["one\ntwo\nthree"]),
        (b"one\\", ["one"]),
        (b'"""\n/one\n\n  two\\\n"""\nthree\n', ["/one\n\n  two\\", "three"]),
        (b'"""one"""\n', ['"""one"""']),
        (b' """ \n"""\n', [""]),
        (b"", []),
    ],
)
def test_lines_become_messages(piped, raw, texts):
    found = said(piped(raw))
    assert [one.text for one in found] == texts
    assert all(one.is_literal for one in found if "\n" in one.text)


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b'"""\none\n', 'a message that began with """ has no end'),
        (b"one\ntwo\xff\n", "stdin: line 2 is not UTF-8 at byte 3"),
        (b'"""\none\n\xc3\n"""\n', "stdin: line 3 is not UTF-8 at byte 0"),
    ],
)
def test_what_is_no_message_says_so(piped, raw, line):
    with pytest.raises(UsageError, match=line):
        said(piped(raw))


def test_a_closed_stdin_has_no_lines(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert said(Pipe()) == []


def test_ctrl_c_within_a_message_takes_the_message_back_and_leaves_nothing_else():
    for lines in (["one\\", CTRL_C], ['"""', "one", CTRL_C]):
        with pytest.raises(Cleared):
            read(Typist(*lines))
    with pytest.raises(KeyboardInterrupt):
        read(Typist(CTRL_C))


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/help", Command("help")),
        ("/?", Command("help")),
        ("/quit", Command("exit")),
        ("/drop 3", Command("drop", "3")),
        ("/system", Command("system")),
        ("/system  Be brief. ", Command("system", "Be brief.")),
        ("/save! a file", Command("save", "a file", insists=True)),
        ("//usr/bin", None),
        ("hello /help", None),
        (" /help", None),
        ("", None),
    ],
)
def test_a_line_that_begins_with_a_slash_is_a_command(text, command):
    assert command_of(text) == command


def test_text_of_several_lines_is_a_message_unless_it_says_what_the_system_is():
    assert command_of("/* a\ncomment */", is_literal=True) is None
    assert command_of("/clear\nnow", is_literal=True) is None
    assert command_of("/system a\nb", is_literal=True) == Command("system", "a\nb")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/sav x", "did you mean /save?"),
        ("/sytem", "did you mean /system?"),
        ("/usr/bin/env what is it?", "a message that begins with / is written with //"),
        ("/", "no such command"),
        ("/clear! all", "no such command"),
        ("/clear all", "found 'all', but nothing follows it"),
        ("/save", "expected /save F"),
        ("/drop", "expected /drop N"),
    ],
)
def test_a_command_that_is_none_says_what_is_meant(text, line):
    with pytest.raises(UsageError) as error:
        command_of(text)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", ["/usr/bin", "//", "hello", ""])
def test_a_message_that_begins_with_a_slash_is_typed_with_two(message):
    typed = as_typed(message)
    assert command_of(typed) is None
    assert message_of(typed) == message


def test_every_command_is_in_the_docs():
    page = (REPOSITORY / "docs" / "chat.md").read_text()
    for name, (usage, _) in COMMANDS.items():
        assert f"| `/{name}{' ' if usage else ''}{usage}`" in page, name


# History


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "jlayer" / "chat_history"


def test_what_was_typed_is_there_in_the_next_session_and_is_the_users_alone(path):
    first = History(str(path))
    for entry in ("one", "two\nlines", "two\nlines", "drei: ü\t\\"):
        first.add(entry)
    other = History(str(path))
    other.add("of another terminal")
    first.add("four")
    expected = ["one", "two\nlines", "drei: ü\t\\", "of another terminal", "four"]
    assert History(str(path)).entries == expected
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_history_that_others_could_read_is_closed_to_them(path):
    History(str(path)).add("one")
    path.chmod(0o644)
    assert History(str(path)).entries == ["one"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_lines_are_passed_over(path):
    History(str(path)).add("one")
    with open(path, "ab") as file:
        file.write(b'"tw\n\xff\xff\n17\nnull\n["a"]\n"\\ud800"\n"three"\n"fo')
    assert History(str(path)).entries == ["one", "three"]


def test_the_file_is_cut_to_the_newest_entries(path, monkeypatch):
    monkeypatch.setattr(histories, "MOST_ENTRIES", 5)
    found = History(str(path))
    for number in range(12):
        found.add(f"entry {number}")
    newest = [f"entry {number}" for number in range(7, 12)]
    assert History(str(path)).entries == newest
    assert [json.loads(line) for line in path.read_text().splitlines()] == newest
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["chat_history"]


def test_long_entries_do_not_make_the_file_long(path, monkeypatch):
    monkeypatch.setattr(histories, "MOST_BYTES", 1000)
    for number in range(20):
        found = History(str(path))
        found.add(f"{number} " + "x" * 120)
        assert path.stat().st_size < 1200
    assert found.entries[-1].startswith("19 ")
    assert len(found.entries) > 2


@pytest.mark.parametrize("obstacle", ["file", "fifo", "folder"])
def test_where_no_history_can_be_kept_the_chat_goes_on_and_says_why(path, obstacle):
    if obstacle == "file":
        path.parent.parent.mkdir()
        path.parent.write_text("in the way")
    else:
        path.parent.mkdir(parents=True)
        os.mkfifo(path) if obstacle == "fifo" else path.mkdir()
    found = History(str(path))
    found.add("one")
    assert found.entries == []
    assert found.why_not.endswith("; what is typed is not kept for other sessions")


def test_the_state_folder_is_that_of_the_xdg_rules(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert state_path("x") == "/home/me/.local/state/jlayer/x"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert state_path("x") == "/state/jlayer/x"
