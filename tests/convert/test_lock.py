"""One converter at a time on a target; a lock file that nobody holds blocks nobody."""

import errno
import fcntl
import os
import signal
import subprocess

import pytest

from jlayer.checkpoint.layout import layer_file
from jlayer.convert import convert_checkpoint
from jlayer.convert.target.lock import TargetLock
from jlayer.durable import LOCK
from jlayer.errors import JlayerError, LockedError
from tests.convert.checkpoints import files_of
from tests.convert.test_resume import Notes, slowly, wait_for


@pytest.fixture
def other(published, tmp_path):
    """Another process that is converting into tmp_path/target."""
    process = slowly(published("single"), tmp_path / "target")
    wait_for(tmp_path / "target" / "embed.safetensors")
    yield process
    process.kill()
    process.communicate()


def test_a_second_converter_is_refused_with_the_others_pid(other, published, tmp_path):
    with pytest.raises(LockedError) as refusal:
        convert_checkpoint(published("single"), tmp_path / "target")
    assert refusal.value.exit_code == 7
    assert f"process {other.pid} " in str(refusal.value)
    assert str(tmp_path / "target") in str(refusal.value)
    other.communicate(timeout=30)
    assert other.returncode == 0
    convert_checkpoint(published("single"), tmp_path / "alone")
    assert files_of(tmp_path / "target") == files_of(tmp_path / "alone")


def test_the_command_line_ends_with_code_7_and_one_line(other, published, tmp_path):
    process = slowly(published("single"), tmp_path / "target")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert err.count("\n") == 1


def test_overwrite_does_not_go_past_a_lock(other, published, tmp_path):
    with pytest.raises(LockedError):
        convert_checkpoint(published("tied"), tmp_path / "target", overwrite=True)


def test_a_lock_goes_with_its_process(other, published, tmp_path):
    wait_for(tmp_path / "target" / layer_file(0))  # so that the journal has the file before it
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "target" / LOCK).exists()
    assert convert_checkpoint(published("single"), tmp_path / "target").n_resumed > 0
    assert not (tmp_path / "target" / LOCK).exists()


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "content",
    [f"process {dead_pid()} on here\n", f"process {os.getpid()} on another boot\n", "", "\0" * 99],
    ids=["dead", "alive", "empty", "damaged"],
)
def test_a_lock_file_that_nobody_holds_is_taken_over(published, tmp_path, content):
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK).write_text(content)
    convert_checkpoint(published("single"), target)
    assert not (target / LOCK).exists()


def test_a_lock_file_that_its_holder_removes_just_now_is_made_again(tmp_path, monkeypatch):
    target = tmp_path / "target"
    real, calls = fcntl.flock, []

    def flock(fd, how):
        calls.append(fd)
        if len(calls) == 1:
            (target / LOCK).unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with TargetLock(str(target), note=print):
        assert (target / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert len(calls) == 2
    assert not target.exists()


def test_a_file_system_without_locks_is_told_of(published, tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    notes = Notes()
    convert_checkpoint(published("single"), tmp_path / "target", progress=notes)
    assert any("no locks" in line for line in notes.lines)


def test_a_full_disk_does_not_keep_it_from_clearing_up(published, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    filler, real = target / "final.safetensors.jlayer-tmp", os.pwrite
    filler.write_bytes(b"what fills the disk")

    def pwrite(fd, data, at):
        if filler.exists() and filler.read_bytes() == b"what fills the disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert convert_checkpoint(published("single"), target).status == "converted"


def test_a_refusal_leaves_no_lock_and_no_folders(published, tmp_path):
    with pytest.raises(JlayerError):
        convert_checkpoint(tmp_path / "nothing", tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(JlayerError):
        convert_checkpoint(tmp_path / "nothing", tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
