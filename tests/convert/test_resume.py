"""A conversion that was interrupted is resumed: what is kept, what is written again, and when it is
refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jlayer.app.cli import main
from jlayer.checkpoint.layout import MANIFEST
from jlayer.convert import convert_checkpoint
from jlayer.convert.progress import Progress
from jlayer.convert.target.journal import JOURNAL
from jlayer.durable import LOCK
from jlayer.errors import CheckpointError, JlayerError, UsageError
from tests.conftest import REPOSITORY
from tests.convert.checkpoints import (
    edit_json,
    edit_tensors,
    files_of,
    numbers,
    random_checkpoint,
    tensor_of,
)

SHARD = "model.safetensors"
LAYER = "layer-00000.safetensors"


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def cut_off(source, target, *, after="layer-00001.safetensors", **options):
    """A conversion that fails once `after` is finished and noted."""
    real = os.rename

    def rename(before, path):
        real(before, path)
        if path.endswith(JOURNAL) and (target / after).exists():
            raise OSError(errno.EIO, "the power went")

    os.rename = rename
    try:
        with pytest.raises(JlayerError, match="resume"):
            convert_checkpoint(source, target, **options)
    finally:
        os.rename = real
    assert {JOURNAL, "embed.safetensors", LAYER} <= {path.name for path in target.iterdir()}
    return target


@pytest.fixture
def begun(copy_of, tmp_path):
    """(source, target) of a conversion of which embedding and two layers are finished."""
    source = copy_of("single")
    return source, cut_off(source, tmp_path / "target")


def ends_well(source, target, tmp_path, **options):
    """Goes on, and holds the end against an undisturbed conversion."""
    summary = convert_checkpoint(source, target, **options)
    options.pop("overwrite", None)
    convert_checkpoint(source, tmp_path / "undisturbed", **options)
    assert files_of(target) == files_of(tmp_path / "undisturbed")
    return summary


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"overwrite": True}])
def test_finished_files_are_kept_and_not_written_again(published, tmp_path, options):
    source, target = published("single"), tmp_path / "target"
    cut_off(source, target, **options)
    before = {path.name: path.stat().st_ino for path in target.glob("*.safetensors")}
    ends_well(source, target, tmp_path, **options)
    assert len(before) == 3
    assert {name: (target / name).stat().st_ino for name in before} == before


def test_a_resume_tells_what_it_found(begun, tmp_path):
    source, target = begun
    notes = Notes()
    summary = convert_checkpoint(source, target, progress=notes)
    assert summary.n_resumed == 3
    assert any("resuming: 3 of 5" in line for line in notes.lines)
    assert summary.status == "converted"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut(path):
    os.truncate(path, 100)


def remove(path):
    path.unlink()


def other_content(path):
    path.write_bytes((path.parent / "embed.safetensors").read_bytes())


@pytest.mark.parametrize("spoil", [flip, cut, remove, other_content])
def test_a_finished_file_is_known_by_its_hash_alone(begun, tmp_path, spoil):
    source, target = begun
    spoil(target / LAYER)
    assert ends_well(source, target, tmp_path).n_resumed == 2


def test_what_lies_about_is_cleared(begun, tmp_path):
    source, target = begun
    (target / "layer-00099.safetensors").write_bytes(b"of a deeper model")
    (target / "final.safetensors").write_bytes(b"never noted")
    (target / "final.safetensors.jlayer-tmp").write_bytes(b"half")
    ends_well(source, target, tmp_path)


def test_a_journal_that_outlives_its_end_is_cleared(published, tmp_path, monkeypatch):
    """As after a kill between the manifest and the journal's removal."""
    target = tmp_path / "target"
    unlink = os.unlink

    def stop(path):
        if path.endswith(JOURNAL):
            raise OSError(errno.EIO, "stopped")
        unlink(path)

    monkeypatch.setattr(os, "unlink", stop)
    with pytest.raises(JlayerError):
        convert_checkpoint(published("single"), target)
    monkeypatch.undo()
    assert {MANIFEST, JOURNAL} <= {path.name for path in target.iterdir()}
    assert ends_well(published("single"), target, tmp_path).n_resumed == 5


def test_a_conversion_can_be_cut_off_again_and_again(published, tmp_path):
    source, target = published("sharded"), tmp_path / "target"
    for name in (LAYER, "layer-00001.safetensors", "layer-00002.safetensors"):
        cut_off(source, target, after=name)
    assert ends_well(source, target, tmp_path).n_resumed == 4


def test_a_source_that_has_moved_is_the_same_one(begun, tmp_path):
    source, target = begun
    shutil.copytree(source, tmp_path / "elsewhere", copy_function=shutil.copy2)
    shutil.rmtree(source)
    assert convert_checkpoint(tmp_path / "elsewhere", target).n_resumed == 3


# What forbids it.


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES = {
    SHARD: touch,
    "config.json": lambda path: edit_json(path, rms_norm_eps=1e-6),
    "generation_config.json": touch,
    "tokenizer.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_source_that_changed_since_is_refused_by_the_files_name(begun, tmp_path, name):
    source, target = begun
    before = files_of(target)
    CHANGES[name](source / name)
    with pytest.raises(CheckpointError, match="resume") as refusal:
        convert_checkpoint(source, target)
    assert str(source / name) in str(refusal.value)
    assert "changed" in str(refusal.value)
    assert "--overwrite" in str(refusal.value)
    assert files_of(target) == before
    assert ends_well(source, target, tmp_path, overwrite=True).n_resumed == 0


def test_another_source_is_refused_with_both_paths(begun, published, tmp_path):
    source, target = begun
    before = files_of(target)
    with pytest.raises(UsageError) as refusal:
        convert_checkpoint(published("tied"), target)
    assert str(source) in str(refusal.value)
    assert str(published("tied")) in str(refusal.value)
    assert files_of(target) == before
    ends_well(published("tied"), target, tmp_path, overwrite=True)


def test_other_options_are_refused(begun, tmp_path):
    source, target = begun
    with pytest.raises(UsageError, match="as published, not bfloat16"):
        convert_checkpoint(source, target, dtype="bfloat16")
    ends_well(source, target, tmp_path, dtype="bfloat16", overwrite=True)


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_text("{}")])
def test_a_damaged_journal_is_refused(begun, tmp_path, damage):
    source, target = begun
    damage(target / JOURNAL)
    with pytest.raises(CheckpointError, match="--overwrite") as refusal:
        convert_checkpoint(source, target)
    assert JOURNAL in str(refusal.value)
    assert ends_well(source, target, tmp_path, overwrite=True).n_resumed == 0


def test_nonfinite_weights_that_were_let_through_need_it_again(copy_of, tmp_path):
    source = copy_of("single")
    name = "model.layers.0.input_layernorm.weight"

    def spoil(tensors):
        weights = numbers(tensors[name])
        weights[0] = np.nan
        tensors[name] = tensor_of(weights)

    edit_tensors(source / SHARD, spoil)
    target = cut_off(source, tmp_path / "target", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="--allow-nonfinite"):
        convert_checkpoint(source, target)
    summary = convert_checkpoint(source, target, allow_nonfinite=True)
    assert (summary.n_resumed, summary.nonfinite) == (3, {name: 1})


def test_a_refusal_of_bad_weights_keeps_what_is_finished(copy_of, tmp_path):
    """So that --allow-nonfinite, which the message offers, goes on from there."""
    source = copy_of("single")

    def spoil(tensors):
        weights = numbers(tensors["model.norm.weight"])
        weights[0] = np.inf
        tensors["model.norm.weight"] = tensor_of(weights)

    edit_tensors(source / SHARD, spoil)
    with pytest.raises(CheckpointError, match="--allow-nonfinite"):
        convert_checkpoint(source, tmp_path / "target")
    assert convert_checkpoint(source, tmp_path / "target", allow_nonfinite=True).n_resumed == 4


# Signals.

SLOW = (
    "import os, sys, time\n"
    "from jlayer.app.cli import main\n"
    "real = os.{call}\n"
    "def slow(*arguments):\n"
    "    time.sleep(0.1)\n"
    "    return real(*arguments)\n"
    "os.{call} = slow\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


def slowly(source, target, *options, call="preadv"):
    """A conversion that takes seconds, as a program of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW.format(call=call), "convert", source, target, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=REPOSITORY,
        # Whatever starts the tests in the background may have had SIGINT ignored: it is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
@pytest.mark.parametrize("call", ["preadv", "pwrite", "fsync"])
def test_a_signal_stops_it_at_once_and_says_how_to_resume(published, tmp_path, number, code, call):
    source, target = published("single"), tmp_path / "target"
    process = slowly(source, target, "--json", call=call)
    wait_for(target / "embed.safetensors")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)  # how soon, benchmarks/convert_torture.py measures
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "run the same command again" in err
    found = json.loads(out)
    assert found["exit_code"] == code
    assert found["finish_reason"] == "interrupted"
    names = {path.name for path in target.iterdir()}
    assert not any(name.endswith(".jlayer-tmp") or name in (LOCK, MANIFEST) for name in names)
    ends_well(source, target, tmp_path)


def test_a_signal_before_anything_is_finished_speaks_of_no_resume(
    published, tmp_path, monkeypatch, capsys
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jlayer.convert.job.reopen_source", stopped)
    assert main(["convert", str(published("single")), str(tmp_path / "target")]) == 130
    assert capsys.readouterr().err.endswith("target: interrupted; nothing was finished\n")


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "generation_config.json"])
def test_converting_again_mends_what_was_damaged_since(tmp_path, name):
    source, target = random_checkpoint(tmp_path / "source"), tmp_path / "target"
    convert_checkpoint(source, target)
    before = files_of(target)
    raw = bytearray(before[name])
    raw[-2] ^= 1
    (target / name).write_bytes(raw)
    assert convert_checkpoint(source, target).status == "converted"
    assert files_of(target) == before
    assert convert_checkpoint(source, target).status == "unchanged"
