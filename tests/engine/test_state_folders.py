"""Folders of saved states: whole or not there, whatever a kill leaves; no damage goes unseen."""

import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jlayer.durable import LOCK
from jlayer.engine import states
from jlayer.engine.states import FACTS, UNFINISHED, StateFolder
from jlayer.errors import CheckpointError, LockedError, StorageError, UsageError

PARTS = [
    {"k": np.arange(6, dtype=np.uint16).reshape(2, 3), "none": np.zeros((0, 4), np.float32)},
    {"state": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))},
    {"nothing": np.zeros(0, np.int32)},
]


def save(folder, number):
    folder.save({"number": number, "text": "Übung"}, iter(PARTS), n_bytes=100)


def number_of(folder):
    with folder.reading() as state:
        k, state_part = state.parts()
        np.testing.assert_array_equal(k["k"], PARTS[0]["k"], strict=True)
        np.testing.assert_array_equal(state_part["state"], PARTS[1]["state"], strict=True)
        assert (len(k), len(state_part)) == (1, 1), "arrays without elements are left out"
        assert state.facts["text"] == "Übung"
        return state.facts["number"]


@pytest.fixture
def folder(tmp_path):
    found = StateFolder(tmp_path / "run")
    save(found, 1)
    return found


def inside(folder):
    return sorted(os.listdir(folder.path))


def test_the_newest_state_takes_the_place_of_the_one_before(folder):
    assert number_of(folder) == 1
    save(folder, 2)
    assert number_of(folder) == 2
    assert inside(folder) == [LOCK, "2"]


def copied(folder, name):
    shutil.copytree(os.path.join(folder.path, "1"), os.path.join(folder.path, name))
    return os.path.join(folder.path, name)


@pytest.mark.parametrize("missing", ["everything", FACTS, "part-00001"])
def test_what_a_kill_leaves_of_a_state_is_not_taken_for_one(folder, missing):
    """Before it is renamed; and the next save removes it."""
    left = copied(folder, "2" + UNFINISHED)
    if missing == FACTS:
        os.unlink(os.path.join(left, FACTS))
    else:
        shutil.rmtree(left if missing == "everything" else os.path.join(left, missing))
        os.makedirs(left, exist_ok=True)
    assert number_of(folder) == 1
    save(folder, 5)
    assert number_of(folder) == 5
    assert inside(folder) == [LOCK, "2"]


def test_of_two_whole_states_the_newer_is_taken_and_half_a_removal_does_not_matter(folder):
    """A kill between the new state and the removal of the old one, and in the middle of it."""
    newer = os.path.join(folder.path, "7")
    states.write_state(newer, {"number": 7, "text": "Übung"}, PARTS, n_bytes=1)
    os.unlink(os.path.join(copied(folder, "0" + UNFINISHED), FACTS))
    assert number_of(folder) == 7
    save(folder, 8)
    assert number_of(folder) == 8
    assert inside(folder) == [LOCK, "8"]


def test_a_state_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    for name in ("check_room", "sync_tree"):
        with monkeypatch.context() as patch:
            patch.setattr(states, name, full)
            with pytest.raises(StorageError, match=r"cannot be saved .No space left.*free some"):
                save(folder, 2)
        assert inside(folder) == [LOCK, "1"]
        assert number_of(folder) == 1

    def interrupted():
        yield PARTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save({"number": 3}, interrupted(), n_bytes=1)
    assert inside(folder) == [LOCK, "1"]


def files_of(folder):
    return [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if os.path.getsize(os.path.join(where, name))
    ]


@contextmanager
def damage_noted(folder):
    """Yields a list of what was said of damage, in one line that names the state."""
    said = []
    try:
        yield said
    except CheckpointError as error:
        said.append(str(error))
    assert all(f"{folder.path}/1" in line and "\n" not in line for line in said)


def test_no_damage_goes_unseen(folder, tmp_path):
    """A byte of any file of a state is another, or a file is gone: refused by name, or the numbers
    are read all the same (what Orbax writes beside them may not matter)."""
    n_refused = 0
    for path in files_of(os.path.join(folder.path, "1")):
        content = Path(path).read_bytes()
        for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            Path(path).write_bytes(damaged)
            with damage_noted(folder) as said:
                assert number_of(folder) == 1
            n_refused += len(said)
        Path(path).write_bytes(content)
    assert n_refused > 3
    assert number_of(folder) == 1


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    for path, words in (
        (tmp_path / "mine", "letter.txt"),
        (tmp_path / "mine/letter.txt", "no fol"),
    ):
        with pytest.raises(UsageError, match=words):
            save(StateFolder(path), 1)
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]
    with pytest.raises(UsageError, match="does not exist"), StateFolder(tmp_path / "no").reading():
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no saved run"), StateFolder(tmp_path / "empty").reading():
        pass


def test_one_process_saves_at_a_time_and_none_while_another_reads(folder):
    with open(os.path.join(folder.path, LOCK)) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert number_of(folder) == 1
        with pytest.raises(LockedError, match="another process"):
            save(folder, 2)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another process"):
            number_of(folder)
