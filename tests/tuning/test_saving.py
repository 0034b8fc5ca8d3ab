"""Checkpoints of a run: what is found is what was saved, whatever happened in between."""

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from jlayer.errors import CheckpointError, StorageError
from jlayer.tuning.saving import SYNCED, Checkpoints, Saved
from tests.conftest import REPOSITORY

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.10.mlp.down_proj.weight")
SHAPES = {NAMES[0]: (3, 8, 5), NAMES[1]: (2, 7, 12)}


def saved(step, *, size=1, facts=None):
    """A run whose numbers are of its step alone."""
    draw = np.random.default_rng(step)

    def tree():
        found = {}
        for name, (rank, width, out) in SHAPES.items():
            shapes = {"a": (rank, width * size), "b": (out * size, rank)}
            found[name] = {k: draw.standard_normal(s, np.float32) for k, s in shapes.items()}
        return found

    facts = {"losses": [step / 3, 1e-300], "seed": step} if facts is None else facts
    return Saved(step=step, params=tree(), mu=tree(), nu=tree(), facts=facts)


def assert_same(found, expected):
    assert (found.step, found.facts) == (expected.step, expected.facts)
    for tree in ("params", "mu", "nu"):
        own, other = getattr(found, tree), getattr(expected, tree)
        assert list(own) == list(other)
        for name, parts in own.items():
            for part, numbers in parts.items():
                assert type(numbers) is np.ndarray
                assert numbers.dtype == np.float32
                assert numbers.shape == other[name][part].shape
                assert numbers.tobytes() == other[name][part].tobytes()
                numbers += 1  # they are the caller's


def test_what_is_saved_is_found_byte_for_byte(tmp_path):
    with Checkpoints(tmp_path / "run") as run:
        assert run.latest() is None
        one = saved(4)
        one.mu[NAMES[0]]["a"][0, :3] = (np.nan, -0.0, np.float32(1e-45))
        run.save(one)
        found = run.latest()
        assert found.mu[NAMES[0]]["a"].tobytes() == one.mu[NAMES[0]]["a"].tobytes()
        assert_same(found, one)
        run.save(saved(9))
        assert_same(run.latest(), saved(9))
    with Checkpoints(tmp_path / "run") as run:
        assert_same(run.latest(), saved(9))


def test_no_array_reaches_a_device(tmp_path):
    import jax

    before = len(jax.live_arrays())
    with Checkpoints(tmp_path / "run") as run:
        run.save(saved(1))
        found = run.latest()
        assert len(jax.live_arrays()) == before
        assert found is not None


def test_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as run:
        for step in (1, 2, 3, 12):
            run.save(saved(step))
    assert sorted(os.listdir(tmp_path)) == ["12", "3"]
    with Checkpoints(tmp_path, keep=1) as run:
        assert_same(run.latest(), saved(12))
        run.save(saved(13))
        assert_same(run.latest(), saved(13))
    assert os.listdir(tmp_path) == ["13"]


def test_what_is_unfinished_is_passed_over_and_removed(tmp_path):
    with Checkpoints(tmp_path) as run:
        run.save(saved(3))
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp")
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as run:
        assert_same(run.latest(), saved(3))
        assert os.listdir(tmp_path) == ["3"]
        run.save(saved(4))
        assert_same(run.latest(), saved(4))


def damages(folder):
    """(what was done, how to undo it) for every file of a step: gone, cut off, and one bit of it
    turned."""
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        raw = path.read_bytes()
        turned = bytearray(raw)
        if raw:
            turned[len(raw) // 2] ^= 0x10
        for how, content in (("gone", None), ("cut", raw[: len(raw) // 2]), ("bit", bytes(turned))):
            path.unlink() if content is None else path.write_bytes(content)
            yield f"{path.relative_to(folder)} {how}", path
            path.write_bytes(raw)


def test_damage_is_told_by_name_or_harmless(tmp_path):
    """Numbers that are taken are the right ones."""
    with Checkpoints(tmp_path) as run:
        for step in (20, 30):
            run.save(saved(step, size=200))
    told = set()
    for what, path in damages(tmp_path / "30"):
        with Checkpoints(tmp_path) as run:
            try:
                assert_same(run.latest(), saved(30, size=200))
            except CheckpointError as error:
                told.add(path.name)
                text = str(error)
                assert text.startswith(f"{tmp_path}/30: a damaged checkpoint ("), what
                assert text.endswith("remove it, and the same command goes on from step 20"), what
                assert "\n" not in text
    assert {"metadata", "_METADATA", "manifest.ocdbt"} <= told
    assert len(told) >= 5  # the numbers' own files have random names


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    path.write_bytes(b"")


def fill(path):
    path.write_bytes(bytes(path.stat().st_size))


def cuts(folder):
    """(what is not on the disk, the change, the paths that it is made to) for states that a power
    cut can leave of a step that was renamed and not synced: names are there or not, and files that
    are there may have nothing in them, or zeros."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    yield "nothing", remove, []
    yield "any name", remove, sorted(folder.iterdir())
    for change in (remove, empty, fill):
        yield f"any file: {change.__name__}", change, files
        yield from ((f"{p.relative_to(folder)}: {change.__name__}", change, [p]) for p in files)
    for item in ("facts", "state"):
        yield item, remove, [folder / item]


def test_a_power_cut_before_a_step_is_synced_leaves_the_one_before_it(tmp_path):
    """Whatever of it is on the disk: it is whole, or the run goes on from the one before it."""
    with Checkpoints(tmp_path / "kept") as run:
        for step in (20, 30):
            run.save(saved(step))
    (tmp_path / "kept" / "30" / SYNCED).unlink()
    run, taken = tmp_path / "run", {}
    for what, _, _ in cuts(tmp_path / "kept" / "30"):
        shutil.copytree(tmp_path / "kept", run)
        ((_, change, paths),) = [one for one in cuts(run / "30") if one[0] == what]
        for path in paths:
            change(path)
        with Checkpoints(run) as checkpoints:
            found = checkpoints.latest()
            taken[what] = found.step
            assert_same(found, saved(found.step))
            if what.startswith("any"):
                checkpoints.save(saved(30))
                assert_same(checkpoints.latest(), saved(30))
        shutil.rmtree(run)
    assert taken.pop("nothing") == 30
    assert {step for what, step in taken.items() if what.startswith("any")} == {20}
    assert taken["facts"] == taken["state"] == taken["state/manifest.ocdbt: remove"] == 20
    assert len(taken) > 30


def test_without_one_before_it_a_power_cut_leaves_none(tmp_path):
    (tmp_path / "7").mkdir()
    with Checkpoints(tmp_path) as run:
        assert run.latest() is None
        run.save(saved(7))
        assert_same(run.latest(), saved(7))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_a_step_that_was_not_synced_is_saved_again(tmp_path, monkeypatch, error):
    """It has its name already."""

    def fsync(_):
        raise error

    with Checkpoints(tmp_path) as run:
        run.save(saved(3))
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises((KeyboardInterrupt, StorageError)) as found:
            run.save(saved(4))
        if isinstance(error, OSError):
            assert str(found.value).endswith(
                "give the same command again, and it goes on from step 3"
            )
        assert sorted(os.listdir(tmp_path)) == ["3", "4"]
        monkeypatch.undo()
        run.save(saved(4))
        assert_same(run.latest(), saved(4))


def test_a_folder_of_another_program_is_damage(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "own").write_text("of the user")
    with Checkpoints(tmp_path) as run, pytest.raises(CheckpointError, match=r"7: .*begins anew$"):
        run.latest()


def test_facts_of_another_step_are_damage(tmp_path):
    with Checkpoints(tmp_path) as run:
        for step in (1, 2):
            run.save(saved(step))
    facts = tmp_path / "2" / "facts" / "metadata"
    facts.write_text(facts.read_text().replace('"seed": 2', '"seed": 3'))
    assert json.loads(facts.read_text())["facts"]["seed"] == 3
    with Checkpoints(tmp_path) as run, pytest.raises(CheckpointError, match="digest"):
        run.latest()


LOOP = """
import sys
from jlayer.tuning.saving import Checkpoints
from tests.tuning.test_saving import saved
with Checkpoints(sys.argv[1]) as run:
    found = run.latest()
    step = found.step + 1 if found else 1
    while True:
        run.save(saved(step, size=2000))
        print(step, flush=True)
        step += 1
"""


def run_python(code, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def killed_and_found(folder, draw, n_kills):
    last = 0
    for _ in range(n_kills):
        child = run_python(LOOP, folder)
        for _ in range(draw.randint(1, 3)):
            told = int(child.stdout.readline())
        time.sleep(draw.random() * 0.3)  # about two savings
        child.kill()
        rest, noise = child.communicate()
        assert noise == ""
        told = max([told, *map(int, rest.split())])
        assert told > last
        with Checkpoints(folder) as run:
            found = run.latest()
        assert found.step in (told, told + 1)  # it may be whole before it is told of
        assert_same(found, saved(found.step, size=2000))
        assert not any("tmp" in name for name in os.listdir(folder))
        last = found.step


def test_killed_while_it_saves(tmp_path):
    killed_and_found(tmp_path, random.Random(0), 3)


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path):
    killed_and_found(tmp_path, random.Random(1), 20)


# The largest file that the process may write stands for a full disk.
FULL = """
import resource, signal, sys
from jlayer.errors import StorageError
from jlayer.tuning.saving import Checkpoints
from tests.tuning.test_saving import assert_same, saved
run = Checkpoints(sys.argv[1])
steps = [int(word) for word in sys.argv[2:]]
for step in steps:
    run.save(saved(step))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    run.save(saved(40, size=5000))
except StorageError as error:
    print(error)
if steps:
    assert_same(run.latest(), saved(steps[-1]))
run.save(saved(41))
run.close()
"""


@pytest.mark.parametrize(
    ("steps", "then"),
    [((10, 20), "it goes on from step 20"), ((), "it begins anew: nothing is saved yet")],
)
def test_no_room_is_one_line_that_says_what_is_left(tmp_path, steps, then):
    child = run_python(FULL, tmp_path, *steps)
    said, noise = child.communicate(timeout=120)
    expected = f"{tmp_path}/40: cannot be saved (File too large); free some space, then give the "
    assert said == f"{expected}same command again, and {then}\n"
    assert noise == ""
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, [*steps[-1:], 41]))


def test_a_disk_without_room_is_known_before_it_is_written_to(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as run:
        run.save(saved(1))
        real = os.statvfs(tmp_path)
        few = os.statvfs_result((real[0], real[1], real[2], real[3], 10, *real[5:]))
        monkeypatch.setattr(os, "statvfs", lambda _: few)
        with pytest.raises(StorageError, match=r"No space left .* goes on from step 1$"):
            run.save(saved(2))
        assert os.listdir(tmp_path) == ["1"]


def test_it_is_quiet(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "0").mkdir()  # of which Orbax warns
    with Checkpoints(tmp_path) as run:
        run.save(saved(1))
        run.latest()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")


def test_the_newest_of_large_ones_is_found(tmp_path):
    names = [f"model.layers.{n}.self_attn.{m}_proj.weight" for n in range(60) for m in "qkvo"]
    draw = np.random.default_rng(0)

    def tree():
        shapes = {"a": (8, 1085), "b": (1085, 8)}
        return {
            n: {k: draw.standard_normal(s, np.float32) for k, s in shapes.items()} for n in names
        }

    trees = tree(), tree(), tree()
    assert 49e6 < 3 * 2 * len(names) * trees[0][names[0]]["a"].nbytes < 51e6
    with Checkpoints(tmp_path) as run:
        for step in (1, 2, 3):
            run.save(Saved(step, *trees, {}))
        assert run.latest().step == 3
