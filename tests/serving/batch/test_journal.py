"""The output of a batch: whole lines and no other, whatever stopped the one who wrote them."""

import errno
import json
import os

import pytest

from jlayer.errors import LockedError, StorageError, UsageError
from jlayer.serving.batch.journal import Journal
from jlayer.serving.batch.names import Names

NAMES = Names("input", "model")
IDS = ("a", "é", "c")


def answer(custom_id, *, status=200, names=NAMES, body=None):
    response = {"status_code": status, "request_id": "r", "body": body or {"text": "ü\u2028"}}
    return {
        "id": names.line(custom_id),
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


@pytest.fixture
def path(tmp_path):
    """An output with three lines."""
    with Journal(tmp_path / "out") as journal:
        journal.read(NAMES)
        journal.add([answer("a")])
        journal.add([answer("é", status=400), answer("c")])
    return tmp_path / "out"


def read(path, names=NAMES):
    with Journal(path) as journal:
        journal.read(names)
        return journal.finished, journal.n_refused


def test_what_was_added_is_there_again(path):
    assert read(path) == ({"a", "é", "c"}, 1)
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert found == [answer("a"), answer("é", status=400), answer("c")]


def test_half_of_a_surrogate_pair_stays_an_escape(path):
    with Journal(path) as journal:
        journal.read(NAMES)
        journal.add([answer("d", body={"message": "\ud800 is none"})])
    assert json.loads(path.read_bytes().splitlines()[-1])["response"]["body"] == {
        "message": "\ud800 is none"
    }


def test_a_torn_end_is_cut_wherever_it_was_torn(path):
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for n_bytes in {*range(0, len(whole) + 1, 5), *ends, *(end - 1 for end in ends)}:
        path.write_bytes(whole[:n_bytes])
        n_whole = sum(end <= n_bytes for end in ends)
        assert read(path)[0] == set(IDS[:n_whole])
        assert path.read_bytes() == whole[: ends[n_whole - 1] if n_whole else 0]


def test_the_zeros_of_a_power_cut_are_cut_with_all_that_follows(path):
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[:second] + bytes(50) + whole[second + 50 :])
    assert read(path)[0] == {"a"}
    assert path.read_bytes() == whole[:second]


@pytest.mark.parametrize(
    ("names", "what"),
    [(Names("other", "model"), "another input"), (Names("input", "other"), "another model")],
)
def test_answers_of_another_batch_are_refused(path, names, what):
    before = path.read_bytes() + b'{"torn'
    path.write_bytes(before)
    with pytest.raises(UsageError, match=f"line 1 is the answer of {what}") as caught:
        read(path, names)
    assert "name another file" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", [b"a letter to a friend", b"[1]", b'{"id": 5}', b'{"id": "a", "custom_id": "a"}']
)
def test_a_file_that_is_no_output_is_left_as_it_is(path, line):
    before = path.read_bytes() + line + b"\n"
    path.write_bytes(before)
    with pytest.raises(UsageError, match="line 4 is no answer of a batch"):
        read(path)
    assert path.read_bytes() == before


def test_a_line_that_is_there_twice_is_refused(path):
    path.write_bytes(path.read_bytes() + path.read_bytes())
    with pytest.raises(UsageError, match="line 4 answers 'a' once more"):
        read(path)


def test_only_one_may_write(path):
    with Journal(path), pytest.raises(LockedError, match="another batch writes to it"):
        Journal(path)
    read(path)


def test_what_cannot_be_a_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        with pytest.raises(UsageError, match="not a regular file"):
            Journal(tmp_path / name)
    with pytest.raises(StorageError, match="cannot be written"):
        Journal(tmp_path / "no" / "folder")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match="cannot be written"):
        Journal(tmp_path / "loop")


def test_a_link_is_followed_and_nothing_empty_is_left(tmp_path):
    (tmp_path / "link").symlink_to("there")
    with Journal(tmp_path / "link") as journal:
        journal.read(NAMES)
        journal.add([answer("a")])
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "there")[0] == {"a"}
    with Journal(tmp_path / "new") as journal:
        journal.read(NAMES)
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_what_was_whole(path, monkeypatch):
    whole, write = path.read_bytes(), os.pwrite
    with Journal(path) as journal:
        journal.read(NAMES)
        with monkeypatch.context() as full:
            left = [60]

            def short(fd, view, offset):
                if not left[0]:
                    raise OSError(errno.ENOSPC, "No space left on device")
                n_bytes = write(fd, view[: left[0]], offset)
                left[0] -= n_bytes
                return n_bytes

            full.setattr("os.pwrite", short)
            with pytest.raises(StorageError) as caught:
                journal.add([answer("d")])
        assert path.read_bytes() == whole
        assert journal.finished == set(IDS)
        journal.add([answer("d")])
    assert read(path)[0] == {*IDS, "d"}
    assert caught.value.exit_code == 6
    assert "No space left on device); what is finished is kept, free some space, and run the " in (
        str(caught.value)
    )


def test_an_output_that_is_taken_away_is_noticed(path):
    with Journal(path) as journal:
        journal.read(NAMES)
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(StorageError, match="was removed or replaced"):
            journal.add([answer("d")])
        path.touch()
        with pytest.raises(StorageError, match="was removed or replaced"):
            journal.add([answer("d")])


def test_names_tell_input_model_and_line_apart():
    assert NAMES.strangeness(NAMES.line("a"), "a") is None
    assert NAMES.strangeness(NAMES.line("b"), "a") == "input"
    seeds = {NAMES.seed(name, order) for name in "ab" for order in (0, 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 53 for seed in seeds)
    assert NAMES.answer("a", "chatcmpl-123").startswith("chatcmpl-")
