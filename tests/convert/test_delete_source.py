"""`--delete-source`: what is removed, when, and that no weight is ever lost."""

import errno
import hashlib
import io
import os
import pty
import shutil
import subprocess
import sys

import pytest

from jlayer.app.cli import main
from jlayer.checkpoint.layout import MANIFEST, file_of
from jlayer.checkpoint.safetensors import read_header
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.target.journal import JOURNAL, read_journal
from jlayer.errors import CheckpointError, StorageError, UsageError
from tests.conftest import REPOSITORY
from tests.convert.checkpoints import files_of, random_checkpoint
from tests.convert.pickled import as_bin
from tests.convert.test_resume import Notes, flip

N_SHARDS = 4


@pytest.fixture
def source(tmp_path):
    return random_checkpoint(tmp_path / "source", n_shards=N_SHARDS)


@pytest.fixture
def expected(tmp_path, source):
    convert_checkpoint(source, tmp_path / "undisturbed")
    return files_of(tmp_path / "undisturbed")


def shards(source):
    return sorted(path.name for path in source.glob("*.safetensors"))


def needed_by(source):
    """Shard -> the files of the target that are made of it."""
    return {
        path.name: {file_of(tensor) for tensor in read_header(path).tensors}
        for path in source.glob("*.safetensors")
    }


def test_the_weights_go_and_nothing_else(source, expected, tmp_path):
    names, kept = shards(source), {path.name for path in source.iterdir()} - set(shards(source))
    (source / "other.safetensors").write_bytes(b"not of the index")
    summary = convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert files_of(tmp_path / "target") == expected
    assert {path.name for path in source.iterdir()} == kept | {"other.safetensors"}
    assert summary.removed == tuple(names)


def test_a_shard_goes_only_once_all_that_needs_it_is_there(source, expected, tmp_path, monkeypatch):
    target, needs, gone = tmp_path / "target", needed_by(source), []
    unlink, opened = os.unlink, set()
    real_open = os.open

    def watched_open(path, flags, *mode):
        if not flags & (os.O_WRONLY | os.O_RDWR):
            opened.add(os.path.basename(os.fspath(path)))
        return real_open(path, flags, *mode)

    def watched_unlink(path):
        name = os.path.basename(path)
        if name in needs:
            journal = read_journal(str(target))
            for file in needs[name]:
                content = (target / file).read_bytes()
                assert content == expected[file]
                assert journal.finished[file].sha256 == hashlib.sha256(content).hexdigest()
                assert file in opened, "not read again"
            assert name in journal.removed
            gone.append((name, (target / MANIFEST).exists()))
        unlink(path)

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "unlink", watched_unlink)
    convert_checkpoint(source, target, delete_source=True)
    assert [name for name, _ in gone] == sorted(needs)
    assert [after for _, after in gone] == [False] * (N_SHARDS - 1) + [True]


def test_what_reads_back_otherwise_is_never_deleted_for(source, expected, tmp_path, monkeypatch):
    rename = os.rename

    def damaging(before, after):
        rename(before, after)
        if after.endswith("layer-00000.safetensors"):
            with open(after, "r+b") as file:
                file.seek(5000)
                file.write(b"\xff")

    monkeypatch.setattr(os, "rename", damaging)
    with pytest.raises(StorageError, match=r"layer-00000.*resume"):
        convert_checkpoint(source, tmp_path / "target", delete_source=True)
    monkeypatch.undo()
    left = needed_by(source)
    assert any("layer-00000.safetensors" in files for files in left.values())
    convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert files_of(tmp_path / "target") == expected


def stop_at_removal(source, target, nth, **options):
    """A conversion that stops just after the nth shard is removed."""
    unlink, count = os.unlink, 0

    def stopping(path):
        nonlocal count
        unlink(path)
        if os.path.dirname(path) == str(source):
            count += 1
            if count == nth:
                raise OSError(errno.EIO, "the power went")

    os.unlink = stopping
    try:
        with pytest.raises(StorageError, match="resume"):
            convert_checkpoint(source, target, delete_source=True, **options)
    finally:
        os.unlink = unlink
    assert len(shards(source)) == N_SHARDS - nth


@pytest.mark.parametrize("nth", range(1, N_SHARDS + 1))
@pytest.mark.parametrize("delete_source", [True, False])
def test_it_goes_on_where_shards_are_gone_already(source, expected, tmp_path, nth, delete_source):
    stop_at_removal(source, tmp_path / "target", nth)
    convert_checkpoint(source, tmp_path / "target", delete_source=delete_source)
    assert files_of(tmp_path / "target") == expected
    assert len(shards(source)) == (0 if delete_source else N_SHARDS - nth)


def test_it_goes_on_with_a_cast(source, tmp_path):
    convert_checkpoint(source, tmp_path / "undisturbed", dtype="float32")
    stop_at_removal(source, tmp_path / "target", 2, dtype="float32")
    summary = convert_checkpoint(source, tmp_path / "target", dtype="float32", delete_source=True)
    assert files_of(tmp_path / "target") == files_of(tmp_path / "undisturbed")
    assert summary.n_resumed > 0


def test_a_beginning_whose_source_is_gone_is_never_thrown_away(source, expected, tmp_path):
    stop_at_removal(source, tmp_path / "target", 2)
    before = files_of(tmp_path / "target")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="removed already"):
            convert_checkpoint(source, tmp_path / "target", dtype="float32", overwrite=overwrite)
        assert files_of(tmp_path / "target") == before
    for n_shards in (N_SHARDS, N_SHARDS + 1):  # of the same names, and of others
        other = random_checkpoint(tmp_path / f"other-{n_shards}", n_shards=n_shards, seed=1)
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="removed already") as refusal:
                convert_checkpoint(other, tmp_path / "target", overwrite=overwrite)
            assert str(other) in str(refusal.value)
            assert files_of(tmp_path / "target") == before
    convert_checkpoint(source, tmp_path / "target", overwrite=True)
    assert files_of(tmp_path / "target") == expected


def test_a_source_that_moved_after_some_of_it_was_removed_goes_on(source, expected, tmp_path):
    stop_at_removal(source, tmp_path / "target", 2)
    source.rename(tmp_path / "moved")
    convert_checkpoint(tmp_path / "moved", tmp_path / "target", delete_source=True)
    assert files_of(tmp_path / "target") == expected


def test_damage_that_cannot_be_mended_is_told_and_nothing_is_cleared(source, tmp_path):
    stop_at_removal(source, tmp_path / "target", 2)
    flip(tmp_path / "target" / "embed.safetensors")
    before = files_of(tmp_path / "target")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"embed.*model-00001.*--delete-source"):
            convert_checkpoint(source, tmp_path / "target", overwrite=overwrite)
    assert files_of(tmp_path / "target") == before


def test_a_shard_that_someone_else_removed_is_missing(source, tmp_path):
    stop_at_removal(source, tmp_path / "target", 1)
    (source / shards(source)[0]).unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        convert_checkpoint(source, tmp_path / "target", delete_source=True)


def test_a_shard_that_changed_is_not_removed(source, tmp_path, monkeypatch):
    stop_at_removal(source, tmp_path / "target", 1)
    name = shards(source)[0]
    os.utime(source / name, ns=(0, 0))
    with pytest.raises(CheckpointError, match=name):
        convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert (source / name).exists()


def test_a_finished_target_is_read_again_before_its_source_goes(source, expected, tmp_path):
    target = tmp_path / "target"
    convert_checkpoint(source, target)
    flip(target / "layer-00001.safetensors")
    convert_checkpoint(source, target, delete_source=True)
    assert files_of(target) == expected
    assert shards(source) == []


def test_the_command_of_a_conversion_that_is_done_says_so(source, expected, tmp_path):
    convert_checkpoint(source, tmp_path / "target", delete_source=True)
    again = convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert again.status == "unchanged"
    assert files_of(tmp_path / "target") == expected
    with pytest.raises(CheckpointError, match="missing"):
        convert_checkpoint(source, tmp_path / "target")
    flip(tmp_path / "target" / "embed.safetensors")
    with pytest.raises(CheckpointError, match="embed"):
        convert_checkpoint(source, tmp_path / "target", delete_source=True)


def test_nothing_goes_where_something_is_left_out(source, tmp_path):
    with pytest.raises(UsageError, match="allow_extra"):
        convert_checkpoint(source, tmp_path / "target", delete_source=True, allow_extra=True)


def test_a_source_that_cannot_be_removed_is_refused_first(source, tmp_path, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, how: os.fspath(path) != str(source) and real(path, how)
    )
    with pytest.raises(StorageError, match=r"not writable.*--delete-source"):
        convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert not (tmp_path / "target").exists()


# A hub cache: snapshots/REVISION/NAME leads to blobs/HASH.


@pytest.fixture
def cache(source, tmp_path):
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    for revision in ("0123", "4567"):
        (home / "snapshots" / revision).mkdir(parents=True)
    for n, path in enumerate(sorted(source.iterdir())):
        shutil.copy2(path, home / "blobs" / f"{n:064x}")
        (home / "snapshots" / "0123" / path.name).symlink_to(f"../../blobs/{n:064x}")
    return home


def test_blobs_go_with_their_links(cache, expected, tmp_path):
    snapshot = cache / "snapshots" / "0123"
    convert_checkpoint(snapshot, tmp_path / "target", delete_source=True)
    assert files_of(tmp_path / "target") == expected
    assert shards(snapshot) == []
    assert len(list((cache / "blobs").iterdir())) == len(list(snapshot.iterdir()))


def test_a_blob_of_another_revision_stays(cache, expected, tmp_path):
    first, second = (cache / "snapshots" / revision for revision in ("0123", "4567"))
    name = shards(first)[1]
    (second / name).symlink_to(os.readlink(first / name))
    notes = Notes()
    convert_checkpoint(first, tmp_path / "target", delete_source=True, progress=notes)
    assert shards(first) == shards(second) == [name]
    assert (second / name).exists()
    assert any(name in line and "kept" in line for line in notes.lines)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_blob_that_went_before_its_link_is_gone_on_with(cache, expected, tmp_path, nth):
    snapshot = cache / "snapshots" / "0123"
    unlink, count = os.unlink, 0

    def stopping(path):
        nonlocal count
        count += "models--a--b" in path
        if count == nth:
            raise OSError(errno.EIO, "the power went")
        unlink(path)

    os.unlink = stopping
    try:
        with pytest.raises(StorageError):
            convert_checkpoint(snapshot, tmp_path / "target", delete_source=True)
    finally:
        os.unlink = unlink
    convert_checkpoint(snapshot, tmp_path / "target", delete_source=True)
    assert files_of(tmp_path / "target") == expected
    assert not [path for path in snapshot.iterdir() if path.name.startswith("model-")]


# The command line.


def test_without_a_terminal_it_wants_yes(source, tmp_path, capsys, monkeypatch):
    words = ["convert", str(source), str(tmp_path / "target"), "--delete-source"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(words) == 2
    assert "--yes" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
    assert main([*words, "--yes"]) == 0
    assert shards(source) == []


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("yes", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_it_asks(source, tmp_path, answer, code):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jlayer", "convert", source, tmp_path / "target", "--delete-source"],
        stdin=slave,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    os.write(master, f"{answer}\n".encode())
    _, err = process.communicate(timeout=60)
    os.close(master)
    os.close(slave)
    assert process.returncode == code
    assert str(source).encode() in err
    assert bool(shards(source)) == bool(code)
    if code == 0:
        assert verify_folder(tmp_path / "target").findings == ()
        assert not (tmp_path / "target" / JOURNAL).exists()


# Pickles: how their tensors are read is not in the journal, so they stay until the end.


@pytest.mark.parametrize("nth", [None, 1, 2])
def test_pickles_go_after_the_manifest(published, tmp_path, monkeypatch, nth):
    pytest.importorskip("torch")
    bins, target = as_bin(published("sharded"), tmp_path / "bins"), tmp_path / "target"
    convert_checkpoint(bins, tmp_path / "undisturbed")
    unlink, gone = os.unlink, []

    def watched(path):
        if path.endswith(".bin"):
            assert (target / MANIFEST).exists()
            gone.append(path)
        unlink(path)
        if path.endswith(".bin") and len(gone) == nth:
            raise OSError(errno.EIO, "the power went")

    monkeypatch.setattr(os, "unlink", watched)
    if nth is not None:
        with pytest.raises(StorageError, match="resume"):
            convert_checkpoint(bins, target, delete_source=True)
    convert_checkpoint(bins, target, delete_source=True)
    assert files_of(target) == files_of(tmp_path / "undisturbed")
    assert not list(bins.glob("*.bin"))
