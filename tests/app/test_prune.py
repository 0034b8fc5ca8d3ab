"""`jlayer prune`: it leaves out what changes least, its curve is that of each model by itself, a
stopped run goes on with what it had chosen, and what is refused before a model is opened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.layout import MANIFEST, PRUNED, is_layered
from jlayer.convert import convert_checkpoint
from jlayer.convert.target.measured import MEASURED, Measured
from jlayer.convert.target.write import TargetWriter
from jlayer.convert.transform.pruned import Pruning
from jlayer.errors import StorageError
from jlayer.measure import influence
from jlayer.measure.evaluate import perplexity
from tests.conftest import BUNDLED, REPOSITORY
from tests.convert.checkpoints import edit_json, files_of

LINES = [
    "Once upon a time there was a king who had three daughters, and the youngest was fair.",
    "The wolf said to the old woman: let me in, for it is cold, and I have come a long way.",
    "In the middle of the forest stood a little house, and nobody knew who lived in it.",
    "So he took the golden ring, put it on his finger, and went home to his father.",
]
TEXT = "\n".join(LINES * 4)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def words(text, target, *more, n=2, model=BUNDLED):
    known = ["prune", model, target, "--drop-layers", n, "--text", text, "--device", "cpu"]
    return [str(word) for word in (*known, "--dtype", "float32", "--window", 64, *more)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(what --json says of a pruning of two layers, its folder); read only."""
    home = tmp_path_factory.mktemp("done")
    (home / "text.txt").write_text(TEXT)
    out, target = home / "out.json", home / "target"
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(words(home / "text.txt", target, "--json")) == 0
    out.write_text(shown.getvalue())
    return json.loads(out.read_text()), target


def test_the_layers_of_least_influence_are_left_out(done):
    found, target = done
    by_influence = sorted(range(6), key=lambda layer: found["influence"][layer])
    assert (found["n_layers"], found["drop_layers"]) == (6, 2)
    assert found["dropped"] == sorted(by_influence[:2])
    assert [one["dropped"] for one in found["curve"]] == [[], by_influence[:1], found["dropped"]]
    assert found["converted"]["n_layers"] == 4
    with AutoModel.from_pretrained(target, device="cpu") as model:
        assert model.config.num_hidden_layers == 4
    note = json.loads((target / PRUNED).read_text())["pruned"][0]
    assert note["found"]["influence"] == found["influence"]


def test_the_curve_is_that_of_each_model_by_itself(done, tmp_path):
    found, target = done
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
        ids = model.text.encode(TEXT)
    held_out = ids[len(ids) - len(ids) // 4 :]
    assert found["held_out_tokens"] == len(held_out)
    assert found["calibration_tokens"] == len(ids) - len(held_out)
    prune = Pruning(6, tuple(found["curve"][1]["dropped"]), {}, {})
    convert_checkpoint(BUNDLED, tmp_path / "one", prune=prune)
    folders = (BUNDLED, tmp_path / "one", target)
    for one, folder in zip(found["curve"], folders, strict=True):
        with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
            expected = perplexity(model, held_out, length=64)
        assert one["nll"] == pytest.approx(expected.nll, abs=1e-6)
        assert one["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_the_report_comes_before_anything_is_written(text, tmp_path, monkeypatch, capsys):
    target, seen = tmp_path / "target", []

    def converted(*_, **__):
        seen.append((capsys.readouterr().out, os.listdir(target)))
        raise OSError(errno.EIO, "stop here")

    monkeypatch.setattr("jlayer.app.converted.converted", converted)
    with pytest.raises(OSError, match="stop here"):
        main(words(text, target, "--debug", n=1))
    ((report, there),) = seen
    assert there == [MEASURED]
    assert ["0", "perplexity"] not in report.split()
    assert report.splitlines()[0].split() == ["layer", "influence"]
    assert sum("stays" in line for line in report.splitlines()) == 5
    assert report.splitlines()[-1].split()[0] == "1"


def test_a_stopped_run_goes_on_with_the_layers_it_had_chosen(done, tmp_path, monkeypatch, capsys):
    text, target = done[1].parent / "text.txt", tmp_path / "target"
    real = os.rename

    def rename(before, path):
        real(before, path)
        if (target / "layer-00001.safetensors").exists():
            raise OSError(errno.EIO, "the power went")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert main(words(text, target)) == 6
    assert "same command" in capsys.readouterr().err
    assert not is_layered(target)

    def measure(*_, **__):
        raise AssertionError("the layers were chosen already")

    monkeypatch.setattr(influence, "influences", measure)
    assert main(words(text, target, n=3)) == 2
    assert "was begun with --drop-layers 2, not 3" in capsys.readouterr().err
    assert main(words(text, target, "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["resumed"]
    assert again["converted"]["n_resumed"] >= 1
    assert_same(target, done[1])
    assert main(words(text, target, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["converted"]["status"] == "unchanged"


def assert_same(target, other):
    """The same bytes, and a report that is the same but for rounding: how a model is cut depends on
    the speeds that are found as it is opened."""
    found, expected = files_of(target), files_of(other)
    reports = [json.loads(files.pop(PRUNED))["pruned"][0] for files in (found, expected)]
    for files in (found, expected):
        del files[MANIFEST]  # it has the report's digest
    assert found == expected
    one, wanted = (report.pop("found") for report in reports)
    assert reports[0] == reports[1]
    assert one["influence"] == pytest.approx(wanted["influence"], abs=1e-6)
    for loss, wanted_loss in zip(one["curve"], wanted["curve"], strict=True):
        assert loss["dropped"] == wanted_loss["dropped"]
        assert loss["nll"] == pytest.approx(wanted_loss["nll"], abs=1e-6)


class Killed(BaseException):
    """Nobody tidies up after it but what every end runs."""


def test_stopped_while_it_measures_the_same_command_goes_on(done, tmp_path, monkeypatch, capsys):
    """After every save: what is measured then is only what is missing."""
    monkeypatch.setattr(influence, "MOST_WINDOWS", 4)  # several sweeps
    text, n_saved, real = done[1].parent / "text.txt", [], Measured.save

    def prune(target, stops_at=None):
        n_saved.clear()

        def save(measured, found):
            real(measured, found)
            n_saved.append(found)
            if len(n_saved) == stops_at:
                raise Killed

        monkeypatch.setattr(Measured, "save", save)
        return main(words(text, target))

    assert prune(tmp_path / "whole") == 0
    n_all = len(n_saved)
    assert n_all >= 4
    assert MEASURED not in files_of(tmp_path / "whole")
    for stops_at in (1, n_all - 1, n_all):
        target = tmp_path / f"stopped {stops_at}"
        with pytest.raises(Killed):
            prune(target, stops_at)
        assert os.listdir(target) == [MEASURED]
        assert prune(target) == 0
        assert len(n_saved) == n_all - stops_at
        assert "some of it was measured before; going on from there" in capsys.readouterr().err
        assert_same(target, tmp_path / "whole")


def test_what_was_measured_of_something_else_is_refused_or_begun_anew(
    text, tmp_path, monkeypatch, capsys
):
    target, model = tmp_path / "target", tmp_path / "model"
    shutil.copytree(BUNDLED, model)

    def save(*_):
        raise Killed

    with monkeypatch.context() as patch:
        real = Measured.save
        patch.setattr(Measured, "save", lambda *given: (real(*given), save()))
        with pytest.raises(Killed):
            main(words(text, target, model=model))
    before = files_of(target)
    with monkeypatch.context() as patch:
        patch.setattr("jlayer.app.verbs.prune.opened", None)
        assert main(words(text, target, n=1, model=model)) == 2
        assert "was begun with --drop-layers 2, not 1; run that" in capsys.readouterr().err
        text.write_text(TEXT + "!")
        assert main(words(text, target, model=model)) == 2
        assert "was begun with --text another text; run that" in capsys.readouterr().err
        text.write_text(TEXT)
        os.utime(model / "model.safetensors", (1, 1))
        assert main(words(text, target, model=model)) == 2
        assert "begun with another model, or this one as it was before" in capsys.readouterr().err
        assert files_of(target) == before
        (target / MEASURED).write_text("{}")
        assert main(words(text, target, model=model)) == 3
        assert "what was measured so far cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(influence, "curve", unmeasured)
    assert main(words(text, target, "--overwrite", model=model)) == 0
    assert "something that is damaged; measuring anew" in capsys.readouterr().err
    assert is_layered(target)
    assert MEASURED not in files_of(target)


def unwritten(*_, **__):
    raise StorageError("the disk is gone")


def test_a_conversion_that_could_not_begin_has_lost_nothing_of_it(
    text, tmp_path, monkeypatch, capsys
):
    target = tmp_path / "target"
    monkeypatch.setattr(influence, "curve", unmeasured)
    with monkeypatch.context() as patch:
        patch.setattr(TargetWriter, "write", unwritten)
        assert main(words(text, target)) == 6
    assert "to resume, run the same command again" in capsys.readouterr().err
    monkeypatch.setattr("jlayer.app.verbs.prune.opened", None)
    assert main(words(text, target)) == 0
    assert is_layered(target)


@pytest.mark.slow
def test_killed_at_any_moment_of_measuring_it_ends_the_same(done, tmp_path):
    """SIGKILL before and after each of the calls that change the disk."""
    text, target = done[1].parent / "text.txt", tmp_path / "target"
    command = words(text, target)
    for nth in range(1, 30):
        killed = subprocess.run(
            [sys.executable, "-m", "tests.app.prune_kills", str(nth), *command],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert main(command) == 0
        assert_same(target, done[1])
        shutil.rmtree(target)
    assert nth > 6, "it saves after each pass, and removes what it saved"


def unmeasured(model, ids, order, **_):
    for n in range(len(order) + 1):
        yield influence.Loss(tuple(sorted(order[:n])), 2.0, 0.7)


def test_layers_that_are_to_stay_stay(done, text, tmp_path, monkeypatch, capsys):
    least = done[0]["curve"][1]["dropped"][0]
    found = influence.Influences(tuple(done[0]["influence"]), 300, 1)
    monkeypatch.setattr(influence, "influences", lambda *_, **__: found)
    monkeypatch.setattr(influence, "curve", unmeasured)
    own = tmp_path / "held-out.txt"
    own.write_text(TEXT)
    more = ("--keep", f"0,{least}", "--held-out", own, "--quantize", "int8", "--json")
    assert main(words(text, tmp_path / "target", *more, n=1)) == 0
    kept = json.loads(capsys.readouterr().out)
    assert kept["dropped"] == [layer for layer in done[0]["dropped"] if layer != least]
    assert kept["converted"]["quantization"]["scheme"] == "int8"
    assert kept["held_out_tokens"] > kept["calibration_tokens"] // 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--drop-layers", "0"), "--drop-layers: found 0, expected at least 1"),
        (("--drop-layers", "6"), "has 6 layers; expected from 1 to 5"),
        (("--keep", "0,x"), "--keep: found"),
        (("--keep", "9"), "--keep: found 9"),
        (("--window", "1"), "--window: found 1"),
        (("--max-tokens", "5"), "--max-tokens: found 5, expected at least 64"),
        (("--held-out", "missing.txt"), "--held-out: missing.txt does not exist"),
    ],
)
def test_what_no_model_could_take_is_refused_before_one_is_opened(
    text, tmp_path, monkeypatch, capsys, more, said
):
    monkeypatch.setattr("jlayer.app.verbs.prune.opened", None)
    assert main(words(text, tmp_path / "target", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_target_with_something_else_is_refused_before_a_model_is_opened(
    text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("jlayer.app.verbs.prune.opened", None)
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.doc").write_text("all of it")
    assert main(words(text, target)) == 2
    assert "holds files that are not of a layered checkpoint" in capsys.readouterr().err
    convert_checkpoint(BUNDLED, tmp_path / "whole")
    assert main(words(text, tmp_path / "whole")) == 2
    assert "with all its layers" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("\n".join(LINES))
    assert main(words(short, tmp_path / "target")) == 2
    assert "tokens in its last quarter, expected at least 64" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_layers_that_are_passed_over_are_checked(tmp_path):
    from jlayer.errors import UsageError

    for found in ([6], [0, 1, 2, 3, 4, 5], ["a"], -1):
        with pytest.raises(UsageError, match="without_layers"):
            AutoModel.from_pretrained(BUNDLED, device="cpu", without_layers=found)
    with pytest.raises(UsageError, match="an adapter is of all layers"):
        AutoModel.from_pretrained(BUNDLED, device="cpu", without_layers=1, adapter=tmp_path)


def test_a_damaged_note_is_no_choice(done, tmp_path, text, capsys):
    target = tmp_path / "target"
    convert_checkpoint(BUNDLED, target, prune=Pruning(6, (1,), {}, {}))
    edit_json(target / PRUNED, pruned=[{"n_layers": 6}])
    assert main(words(text, target)) == 3
    assert "is damaged" in capsys.readouterr().err
