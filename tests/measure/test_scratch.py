"""The table in a temporary file: an array's answers, and an error for every disk that fails."""

import errno
import json
import os
import resource
import tempfile
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.app.cli import main
from jlayer.errors import DoesNotFitError, StorageError, UsageError
from jlayer.measure import scratch
from jlayer.measure.scratch import Scratch


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1 << 30))
def test_it_holds_what_an_array_would(n_rows, width, seed):
    random = np.random.default_rng(seed)
    expected = random.standard_normal((n_rows, width), np.float32)
    cut = sorted({0, width, *random.integers(0, width + 1, 2).tolist()})
    with Scratch() as table:
        table.reserve(n_rows, width)
        rows = random.permutation(n_rows)
        for begin, end in pairwise(cut):
            table[rows, begin:end] = expected[rows, begin:end]
        np.testing.assert_array_equal(table[np.arange(n_rows), 0:width], expected)
        some = rows[: n_rows // 2]
        np.testing.assert_array_equal(table[some, cut[-2] : width], expected[some, cut[-2] :])


def test_calls_that_move_less_than_asked_are_continued(monkeypatch):
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:5], at))
    monkeypatch.setattr(os, "preadv", lambda file, into, at: read(file, [into[0][:7]], at))
    expected = np.arange(24, dtype=np.float32).reshape(2, 12)
    with Scratch() as table:
        table.reserve(2, 12)
        table[np.arange(2), 0:12] = expected
        np.testing.assert_array_equal(table[np.arange(2), 0:12], expected)


@pytest.fixture
def files(monkeypatch):
    """The files that are made meanwhile."""
    made, make = [], tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda **options: made.append(make(**options)) or made[-1]
    )
    return made


def test_the_space_is_reserved_before_anything_is_written(files):
    with Scratch() as table:
        table.reserve(1000, 1000)
        status = os.fstat(files[0].fileno())
        assert status.st_blocks * 512 >= status.st_size == 4_000_000


def test_nothing_is_left_in_the_folder(tmp_path):
    with Scratch(tmp_path) as table:
        table.reserve(10, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none_is_a_usage_error(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{name}: .*--scratch DIR"):
        Scratch(tmp_path / name)


@pytest.fixture
def at_most():
    """Limits the size of files, as a full disk does; Python ignores the signal that comes too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_table_that_does_not_fit_is_refused_with_both_figures(tmp_path, at_most):
    with Scratch(tmp_path) as table:
        at_most(1 << 20)
        with pytest.raises(DoesNotFitError) as refused:
            table.reserve(1 << 10, 1 << 10)
    report = refused.value.report["scratch"]
    assert report["needed_bytes"] == 4 << 20
    assert report["free_bytes"] > 0
    assert report["folder"] == str(tmp_path)
    for words in ("need 4.00 MiB", "free ", "--scratch DIR", "--max-tokens N", str(tmp_path)):
        assert words in str(refused.value)


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize(("free", "fits"), [(400, True), (399, False)])
def test_where_nothing_can_be_reserved_what_is_free_decides(monkeypatch, number, free, fits):
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    space = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda folder: space)
    with Scratch() as table:
        if fits:
            table.reserve(10, 10)
            table[np.arange(1), 0:1] = np.ones((1, 1), np.float32)
        else:
            with pytest.raises(DoesNotFitError, match="400 B, free 399 B"):
                table.reserve(10, 10)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_midway_is_a_storage_error(monkeypatch, number):
    with Scratch() as table:
        table.reserve(4, 10)
        monkeypatch.setattr(os, "pwrite", failing(number))
        with pytest.raises(StorageError, match=f"writing at byte 48 .*{os.strerror(number)}"):
            table[np.array([1]), 2:4] = np.ones((1, 2), np.float32)
        monkeypatch.setattr(scratch.os, "preadv", failing(number))
        with pytest.raises(StorageError, match=f"reading at byte 48 .*{os.strerror(number)}"):
            table[np.array([1]), 2:4]


def test_a_file_that_was_cut_off_is_a_storage_error(files):
    with Scratch() as table:
        table.reserve(2, 10)
        os.ftruncate(files[0].fileno(), 60)
        with pytest.raises(StorageError, match="ends here"):
            table[np.array([1]), 0:10]


# The verb.


@pytest.fixture
def command(fable, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who lived by the wood.\n" * 8)
    return ["eval", "compare", fable, fable, "--text", text, "--device", "cpu", "--json"]


def run(capsys, *words):
    code = main([*map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, json.loads(out), err


def test_a_scratch_folder_that_is_not_there_is_one_line(command, tmp_path, capsys):
    code, found, err = run(capsys, *command, "--scratch", tmp_path / "none")
    assert code == found["exit_code"] == 2
    assert err.count("\n") == 1
    assert f"{tmp_path}/none: No such file or directory" in err


def test_a_scratch_folder_without_space_is_refused_before_the_first_sweep(
    command, tmp_path, capsys, at_most
):
    at_most(1 << 20)
    code, found, err = run(capsys, *command, "--scratch", tmp_path)
    assert code == found["exit_code"] == 4
    assert found["scratch"]["needed_bytes"] > 1 << 20
    assert "windows" not in err
    assert list(tmp_path.iterdir()) == [tmp_path / "text.txt"]


def test_models_of_one_folder_are_compared_as_equal(command, tmp_path, capsys):
    code, found, _ = run(capsys, *command, "--scratch", tmp_path)
    assert code == 0
    assert abs(found["mean_kl"]) < 1e-6
    assert found["same_top_1"] == 1
