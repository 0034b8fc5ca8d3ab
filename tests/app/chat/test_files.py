"""Conversations as files: what is written is read back, and nothing else is read."""

import json
import os

import pytest

from jlayer.app.chat import files
from jlayer.app.chat.conversation import Conversation, Exchange
from jlayer.errors import StorageError, UsageError

WHOLE = Conversation(
    "Be brief.",
    [
        Exchange("one\nline ü", "two"),
        Exchange("three", "", "a thought", "interrupted"),
        Exchange("four", "five", "", "length"),
        Exchange("six"),
    ],
)
USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
SYSTEM = {"role": "system", "content": "z"}


def test_what_is_saved_is_loaded_again(tmp_path):
    path = tmp_path / "talk.json"
    for one in (WHOLE, Conversation(None, [Exchange("a", "b")])):
        files.save(str(path), one, replace=True)
        assert files.load(str(path)) == one
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_exists_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already; /save! "):
        files.save(str(path), WHOLE, replace=False)
    assert path.read_text() == "mine"
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(UsageError, match="exists already"):
        files.save(str(tmp_path / "link"), WHOLE, replace=False)
    files.save(str(path), WHOLE, replace=True)
    assert files.load(str(path)) == WHOLE


def test_a_file_that_comes_while_it_is_written_stays(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (sync(number), path.write_text("mine")))
    with pytest.raises(UsageError, match="exists already"):
        files.save(str(path), WHOLE, replace=False)
    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        files.save(str(tmp_path / "no" / "talk.json"), WHOLE, replace=False)


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([USER, USER], r"messages\[1\]: found the role 'user', expected 'assistant'"),
        ([ANSWER], r"messages\[0\]: found the role 'assistant', expected 'user'"),
        ([USER, ANSWER, SYSTEM], r"messages\[2\]: found the role 'system', expected 'user'"),
        ([SYSTEM, SYSTEM], r"messages\[1\]: found the role 'system', expected 'user'"),
        ([{"role": "tool", "content": "x"}], r"role is 'tool', expected system, user, assistant"),
        ([{"role": ["user"], "content": "x"}], "role is"),
        ([{"content": "x"}], "role is None"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": None}], "content is a NoneType, expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content is a list, expected text"),
        ([{**USER, "contents": "x"}], "key 'contents' is not known: did you mean 'content'"),
        ([{**USER, "finish_reason": "stop"}], "key 'finish_reason' is not known"),
        ([USER, {**ANSWER, "finish_reason": "end"}], "finish_reason is 'end', expected stop"),
        ([USER, {**ANSWER, "reasoning_content": 3}], "reasoning_content is a int"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        (["x"], "found a str, expected an object"),
        ("x", 'expected {"messages"'),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(tmp_path, messages, line):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UsageError, match=line.replace("{", r"\{")) as error:
        files.load(str(path))
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"{}", "expected {"),
        (b'{"messages": [], "model": "x"}', "key 'model' is not known"),
        (b'{"messages": [], "messages": []}', "stands twice"),
        (b"[]", "expected an object"),
        (b"\xff", "not UTF-8"),
        (b'{"messages": [}', "not JSON"),
        (b"[" * 100_000, "nested deeper"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, raw, line):
    path = tmp_path / "talk.json"
    path.write_bytes(raw)
    with pytest.raises(UsageError) as error:
        files.load(str(path))
    assert line in str(error.value)
    assert "fetch" not in str(error.value)


def test_what_is_not_there_or_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, line in (("none", "missing"), ("fifo", "not a regular file"), ("", "not a regular")):
        with pytest.raises(UsageError, match=line):
            files.load(str(tmp_path / name))
