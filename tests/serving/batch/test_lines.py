"""The input of a batch: read line by line, and refused with the numbers of what is wrong."""

import json
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.errors import StorageError, UsageError
from jlayer.serving.batch import lines as reading
from jlayer.serving.batch.lines import Limits, Lines, WrongLines
from tests.serving.batch.requests import request, written


def test_lines_are_read_with_their_numbers(tmp_path):
    raw = [json.dumps(request(name, prompt)).encode() for name, prompt in (("a", "é"), ("b", "x"))]
    path = tmp_path / "in"
    path.write_bytes(b"\xef\xbb\xbf" + raw[0] + b"\r\n\n   \n" + raw[1])
    with Lines(path) as lines:
        assert [(line.number, line.custom_id) for line in lines] == [(1, "a"), (4, "b")]
        assert lines[0].body["prompt"] == "é"
        assert lines[1].url == "/v1/completions"
        first = lines.digest
    path.write_bytes(path.read_bytes() + b"\n")
    with Lines(path) as lines:
        assert lines.digest != first


GOOD = request("a")
WRONG = {
    "not JSON": "{",
    "expected an object": "[1]",
    "'url' stands twice": json.dumps(GOOD)[:-1] + ', "url": "/v1/completions"}',
    "NaN is not JSON": json.dumps({**GOOD, "body": {"temperature": float("nan")}}),
    "nested deeper": '{"body": ' + "[" * 100 + "]" * 100 + "}",
    "no custom_id": json.dumps({name: GOOD[name] for name in ("method", "url", "body")}),
    "no body": json.dumps({name: GOOD[name] for name in ("custom_id", "method", "url")}),
    "custom_id: found a number, expected text": json.dumps({**GOOD, "custom_id": 5}),
    "custom_id: found null": json.dumps({**GOOD, "custom_id": None}),
    "custom_id: found 0 characters": json.dumps({**GOOD, "custom_id": ""}),
    "custom_id: found 513 characters": json.dumps({**GOOD, "custom_id": "a" * 513}),
    "half of a surrogate pair": json.dumps({**GOOD, "custom_id": "\ud800"}),
    "body: found a list, expected an object": json.dumps({**GOOD, "body": []}),
    "method: found 'GET', expected 'POST'": json.dumps({**GOOD, "method": "GET"}),
    "url: found '/v1/embeddings', expected": json.dumps({**GOOD, "url": "/v1/embeddings"}),
    "not UTF-8": b'{"custom_id": "\xff"}',
}


@pytest.mark.parametrize("message", WRONG)
def test_a_line_that_is_no_request_refuses_the_file(tmp_path, message):
    line = WRONG[message]
    path = tmp_path / "in"
    raw = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(request("first")).encode() + b"\n" + raw + b"\n")
    with pytest.raises(WrongLines) as caught:
        Lines(path)
    assert f"line 2: {message}" in str(caught.value) or message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert "\n" not in str(caught.value)
    assert [problem.number for problem in caught.value.problems] == [2]


def test_all_lines_are_looked_at_and_the_first_few_listed(tmp_path):
    ids = ["a", "b", "a", *"cdefg", *"bcdefg"]
    with pytest.raises(WrongLines) as caught:
        Lines(written(tmp_path / "in", map(request, ids)))
    message = str(caught.value)
    assert "line 3: custom_id 'a' stands in line 1 already; line 9: custom_id 'b'" in message
    assert "line 12: " in message
    assert "line 13: " not in message
    assert "and 2 more; nothing was run" in message


def test_limits_are_those_of_the_one_who_asks(tmp_path):
    path = written(tmp_path / "in", map(request, "abc"))
    for limits, message in (
        (Limits(lines=2), "3 lines, at most 2"),
        (Limits(n_bytes=100), "bytes, at most 100"),
        (Limits(url="/v1/chat/completions"), "expected /v1/chat/completions;"),
    ):
        with pytest.raises(WrongLines, match=message):
            Lines(path, limits=limits)
    Lines(path, limits=Limits(3, path.stat().st_size, "/v1/completions")).close()


def test_a_line_without_end_is_not_taken_into_memory(tmp_path, monkeypatch):
    path = written(tmp_path / "in", [request("a"), request("b", "x" * 4000), request("c")])
    monkeypatch.setattr(reading, "MOST_LINE_BYTES", 1000)
    with pytest.raises(WrongLines, match="line 2: longer than 1,000 bytes; nothing"):
        Lines(path)


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, message in (
        ("none", "does not exist"),
        ("", "not a regular file"),
        ("pipe", "not a regular file"),
        ("empty", "empty; expected requests"),
    ):
        with pytest.raises(UsageError, match=message):
            Lines(tmp_path / name)


def test_a_file_that_is_changed_meanwhile_is_noticed(tmp_path):
    path = written(tmp_path / "in", map(request, "abc"))
    with Lines(path) as lines:
        raw = path.read_bytes()
        with open(path, "r+b") as file:
            file.write(raw.replace(b"Once", b"Twice", 1))
        with pytest.raises(StorageError, match="line 1 was changed"):
            list(lines)


def test_a_large_file_takes_little_memory(tmp_path):
    n = 5000
    path = written(tmp_path / "in", (request(f"line {at}", "x" * 2000) for at in range(n)))
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    try:
        with Lines(path) as lines:
            assert sum(len(line.custom_id) > 0 for line in lines) == n
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5e6


@given(st.lists(st.one_of(st.binary(max_size=40), st.just(json.dumps(GOOD).encode()))))
def test_any_bytes_are_lines_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "in"
    path.write_bytes(b"\n".join(rows))
    try:
        lines = Lines(path)
    except WrongLines as error:
        refused = error.problems
    else:
        refused = []
        with lines:
            assert all(line.body == GOOD["body"] for line in lines)
    assert bool(refused) == rows_are_wrong(rows)


def rows_are_wrong(rows):
    """By another way of reading: the good line stands there once, and nothing else."""
    full = [row for part in rows for row in part.split(b"\n") if row.strip()]
    return [row.strip() for row in full] != [json.dumps(GOOD).encode()]
