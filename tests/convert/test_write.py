"""How files are written: synced before they are renamed, the manifest last; and the reports."""

import io
import os
import subprocess
import sys
import time

from jlayer.checkpoint.layout import MANIFEST
from jlayer.convert import convert_checkpoint
from jlayer.convert.progress import StderrProgress
from jlayer.convert.target.journal import JOURNAL
from jlayer.convert.target.write import TargetWriter
from jlayer.durable import LOCK
from tests.convert.checkpoints import files_of


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(published, tmp_path, monkeypatch):
    target, calls = tmp_path / "target", []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def watched_fsync(fd):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def watched_rename(before, after):
        calls.append(("rename", before, after))
        rename(before, after)

    def watched_unlink(path):
        calls.append(("unlink", path))
        unlink(path)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "unlink", watched_unlink)
    convert_checkpoint(published("single"), target)
    assert calls[0] == ("fsync", str(tmp_path))  # so that the new folder itself stays
    journal, lock = str(target / JOURNAL), str(target / LOCK)
    assert calls[-3:] == [("unlink", journal), ("fsync", str(target)), ("unlink", lock)]
    names = [call[2] for call in calls if call[0] == "rename"]
    for n, name in enumerate(names):
        steps = calls[1 + 3 * n : 4 + 3 * n]
        aside = f"{name}.jlayer-tmp"
        assert steps == [("fsync", aside), ("rename", aside, name), ("fsync", str(target))]
    assert sorted({*names} - {journal}) == sorted(str(path) for path in target.iterdir())
    assert names[0] == journal  # there is something to go on with before there is anything else
    assert names[-1] == str(target / MANIFEST)
    weights = [name for name in names if name.endswith(".safetensors")]
    assert all(names[names.index(name) + 1] == journal for name in weights)


def test_files_are_as_readable_as_any_other(published, tmp_path):
    before = os.umask(0o027)
    try:
        convert_checkpoint(published("single"), tmp_path / "target")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "target").iterdir()} == {0o640}


def test_few_files_are_open_at_a_time(published, tmp_path, monkeypatch):
    monkeypatch.setattr("jlayer.convert.sources.files.MAX_OPEN_FILES", 2)
    before, most = len(os.listdir("/proc/self/fd")), []
    real = os.preadv

    def preadv(*arguments):
        most.append(len(os.listdir("/proc/self/fd")))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    convert_checkpoint(published("sharded"), tmp_path / "few")
    monkeypatch.undo()
    convert_checkpoint(published("sharded"), tmp_path / "many")
    assert max(most) - before <= 5  # two to read, one to write, the lock, the listing itself
    assert len(os.listdir("/proc/self/fd")) == before
    assert files_of(tmp_path / "few") == files_of(tmp_path / "many")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def as_terminal(monkeypatch):
    """Puts a terminal of 120 columns in the place of stderr. (A fixture could not: pytest sets
    stderr before each phase of a test.)"""
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_a_terminal_gets_a_bar_with_bytes_and_file(published, tmp_path, monkeypatch):
    terminal = as_terminal(monkeypatch)
    progress = StderrProgress()
    write = TargetWriter.write

    def slowly(self, name, chunks, **options):
        if name == "layer-00001.safetensors":
            time.sleep(0.3)  # the bar is drawn ten times a second
        return write(self, name, chunks, **options)

    monkeypatch.setattr(TargetWriter, "write", slowly)
    convert_checkpoint(published("single"), tmp_path / "target", progress=progress)
    progress.close()
    shown = terminal.getvalue()
    assert "layer-00001.safetensors" in shown
    assert "/106.8 kB" in shown
    assert "B/s" in shown
    assert sys.stderr is terminal


def test_a_note_stands_whole_above_the_bar(monkeypatch):
    terminal = as_terminal(monkeypatch)
    progress, line = StderrProgress(), "a [bold]name[/bold] :dog: " + 40 * "long "
    progress.start(1000)
    progress.file("[red]:cat:.safetensors")
    progress.advance(500)
    progress.note(line)
    progress.close()
    progress.note("after it")
    shown = terminal.getvalue()
    assert f"jlayer: {line}\n" in shown
    assert "[red]:cat:.safetensors" in shown
    assert "500/1,000 bytes" in shown or "0.5/1.0 kB" in shown
    assert shown.endswith("jlayer: after it\n")


def test_only_a_terminal_imports_rich(published, tmp_path):
    code = (
        "import sys; from jlayer.convert import convert_checkpoint, progress\n"
        f"convert_checkpoint({str(published('single'))!r}, {str(tmp_path / 'out')!r}, "
        "progress=progress.StderrProgress())\n"
        "print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr == ""


def test_what_is_no_terminal_gets_no_bar(published, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = StderrProgress()
    convert_checkpoint(published("single"), tmp_path / "target", progress=progress)
    progress.close()
    assert sys.stderr.getvalue() == ""
