"""`jlayer tune`: what it says, what it refuses and when, and that the same command goes on."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from jlayer.app.cli import main
from jlayer.app.streams import ReaderLeft
from jlayer.errors import StorageError
from jlayer.tuning.disk import WORK, WorkFolder
from tests.conftest import BUNDLED, REPOSITORY

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
STEPS = ("--steps", "2", "--tokens-per-step", "32", "--length", "16", "--rank", "2")
RUN = ("--device", "cpu", "--targets", "q_proj,v_proj", "--layers", "0-1")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def data(tmp_path):
    """A file to learn from, and one of held-out text."""
    for name, n_lines in (("data", 12), ("held", 2)):
        texts = (f"Once upon a time there was a girl number {n} who had a cat." for n in range(12))
        lines = [json.dumps({"text": text}) for text in texts][:n_lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


@pytest.fixture
def tune(fable, data, tmp_path):
    """Call it with words of the command: its exit code."""

    def go(*words, model=fable, source=data, out="out", steps=STEPS):
        out = tmp_path / out if out else out
        return main(["tune", str(model), str(source), str(out), *steps, *RUN, *map(str, words)])

    return go


def files(folder):
    assert sorted(os.listdir(folder)) == FILES
    return {name: (folder / name).read_bytes() for name in FILES}


def test_it_trains_an_adapter_that_generates_and_goes_on_from_it(tune, fable, tmp_path, capsys):
    assert tune() == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path}/out: 2 steps, loss ")
    lines = captured.err.splitlines()
    assert lines[0].startswith("jlayer: 12 texts, ")
    assert lines[-1].startswith("jlayer: step 2/2  loss ")
    assert not os.path.lexists(f"{tmp_path}/out{WORK}")
    before = files(tmp_path / "out")
    # The same command has nothing to do, and changes nothing.
    assert tune() == 2
    out = tmp_path / "out"
    assert capsys.readouterr().err == (
        f"jlayer: {out}: is there already, and is an adapter that is complete, so nothing is left "
        f"to do; use it by --adapter {out}, or name a new folder (with --adapter {out} to train it "
        "further)\n"
    )
    assert files(tmp_path / "out") == before
    # Another run begins with it.
    begun = ("--adapter", tmp_path / "out")
    steps = [*STEPS[:-2], "--learning-rate", "0.1"]
    words = ["tune", fable, tmp_path / "data.jsonl", tmp_path / "more", *steps, *begun]
    assert main([*map(str, words), "--device", "cpu", "--json"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    config = [json.loads((tmp_path / name / FILES[1]).read_text()) for name in ("out", "more")]
    for name in ("r", "lora_alpha", "use_rslora"):
        assert config[0][name] == config[1][name]
    assert first["step"] == 1
    texts = []
    for more in ((), ("--adapter", tmp_path / "more")):
        words = (
            "generate",
            fable,
            "-p",
            "Once upon a",
            "-n",
            8,
            *more,
            "--device",
            "cpu",
            "--json",
        )
        assert main(list(map(str, words))) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(texts)) == 2


def test_json_is_a_line_a_step_and_the_result(tune, tmp_path, capsys):
    held = ("--held-out", tmp_path / "held.jsonl", "--eval-every", 1, "--skip-bad")
    with open(tmp_path / "data.jsonl", "a") as file:
        file.write('\n{"txt": 1}\n')
    assert tune(*held, "--json", "--quiet", "--picture", tmp_path / "loss.png") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    *steps, result = map(json.loads, captured.out.splitlines())
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert {"steps", "epoch", "loss", "learning_rate", "gradient_norm", "tokens"} < set(step)
        assert {"seconds", "put_bytes", "perplexity"} < set(step)
    assert result["finish_reason"] == "complete"
    assert result["out"] == f"{tmp_path}/out"
    assert (result["steps"], result["skipped_lines"]) == (2, 1)
    assert result["loss"] == steps[-1]["loss"]
    assert result["perplexity"] == steps[-1]["perplexity"]
    assert result["tokens"] == sum(step["tokens"] for step in steps)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_quiet_says_the_result_alone(tune, fable, data, tmp_path, capsys):
    steps = ("--steps", "1", *STEPS[2:])
    words = ("tune", fable, data, f"{tmp_path}/out/", *steps, *RUN, "--quiet")
    assert main(list(map(str, words))) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert captured.out.startswith(f"{tmp_path}/out/: 1 step, loss ")
    assert len(files(tmp_path / "out")) == 3  # the end of a name may be a slash


# Words of the command -> what is said of them. Nothing that takes long is opened before: there is
# no such model.
WRONG = {
    ("--steps", "0"): "--steps: found 0, expected a whole number ",
    ("--epochs", "nan"): "--epochs: found nan, expected a number above 0",
    ("--steps", "1", "--epochs", "1"): "--epochs: found beside --steps",
    ("--learning-rate", "0"): "--learning-rate: found 0.0, expected a number above 0",
    ("--learning-rate", "inf"): "--learning-rate: found inf",
    ("--warmup", "1.5"): "--warmup: found 1.5, expected a number from 0 to 1",
    ("--weight-decay", "-1"): "--weight-decay: found -1.0",
    ("--beta1", "1"): "--beta1: found 1.0, expected a number ",
    ("--epsilon", "0"): "--epsilon: found 0.0",
    ("--clip", "-1"): "--clip: found -1.0, expected a number from 0, which is no limit",
    ("--dropout", "1"): "--dropout: found 1.0, expected a number from 0 to 0.99",
    ("--tokens-per-step", "0"): "--tokens-per-step: found 0",
    ("--tokens-per-step", "100"): "--tokens-per-step: found 100, expected at least one text",
    ("--length", "1"): "--length: found 1, expected a whole number ",
    ("--seed", "-1"): "--seed: found -1",
    ("--eval-every", "-1"): "--eval-every: found -1",
    ("--eval-every", "2"): "--eval-every: found without --held-out",
    ("--schedule", "cosin"): "--schedule: invalid choice: 'cosin'",
    ("--steps", "two"): "--steps: found 'two', expected a whole number",
    ("--rank", "0"): "rank is 0, expected a whole number from 1",
    ("--alpha", "0"): "alpha is 0.0, expected a number above 0",
    ("--targets", ""): "targets are ('',), expected 'all' or names of matrices",
    ("--targets", "q_proj,q_proj"): "targets: q_proj is there twice",
    ("--layers", "3-1"): "--layers: found '3-1', expected numbers as in 0-15,20",
    ("--layers", "1,1"): "layers are (1, 1), expected numbers from 0, each once",
    ("--layers", "0-99999999999"): "--layers: found '0-99999999999', expected numbers as",
    ("--layers", "²"): "--layers: found '²', expected numbers as in 0-15,20",
    ("--adapter", "none", "--rank", "2"): "--rank: found beside --adapter, which has its own",
    ("--adapter", "none", "--alpha", "2"): "--alpha: found beside --adapter",
    ("--adapter", "none", "--targets", "all"): "--targets: found beside --adapter",
    ("--adapter", "none", "--layers", "0"): "--layers: found beside --adapter",
    ("--adapter", "none", "--rslora"): "--rslora: found beside --adapter",
    ("--dtype", "float8"): "dtype 'float8' is not known",
    ("--device", "tpu"): "tpu",
    ("--device-memory", "much"): "device_memory: found 'much', expected a size",
    ("--picture", "loss.jpg"): "--picture: found 'loss.jpg', expected a name that ends in .png",
    ("--picture", "/no/such/a.png"): "--picture: /no/such is no folder; make it, or name another",
    ("--lenght", "16"): "unrecognized arguments: --lenght",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_options_are_one_line_before_anything_is_opened(words, data, tmp_path, capsys):
    command = ["tune", str(tmp_path / "no model"), str(data), str(tmp_path / "out"), *words]
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert WRONG[words] in captured.err
    assert (code, captured.out) == (2, "")
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def refused(tune, capsys, code=2):
    """Call it with words: the line that is said. Nothing is left behind."""

    def line(*words, **more):
        assert tune(*words, **more) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()[-1]

    return line


def test_what_the_model_does_not_have_is_refused(tune, data, tmp_path, capsys):
    line = refused(tune, capsys)
    assert "targets: 'q_porj' is no matrix of a llama; did you mean q_proj?" in line(
        "--targets", "q_porj"
    )
    assert "layers: 99 is not there, expected numbers from 0 to 5" in line("--layers", "0,99")
    assert "the model's own limit is 1024; take at most that (--length)" in line(
        "--length", 1025, "--tokens-per-step", 1025
    )
    assert "small gradients vanish in float16" in line("--dtype", "float16")
    assert "none.jsonl" in line("--held-out", tmp_path / "none.jsonl")
    assert "--chat-template: " in line("--chat-template", tmp_path / "none")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a cat"}\n{"txt": 1}\n')
    assert f"{wrong} line 2: " in line(source=wrong)
    assert f"{wrong} line 2: " in line("--held-out", wrong)
    assert "none.jsonl" in line(source=tmp_path / "none.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "held.jsonl", "wrong.jsonl"]


def test_a_model_or_an_adapter_that_is_not_there(tune, data, tmp_path, capsys):
    assert "no such file or folder" in refused(tune, capsys, code=3)(model=tmp_path / "none")
    command = ("tune", BUNDLED, data, tmp_path / "out", "--adapter", tmp_path / "none")
    assert main(list(map(str, command))) == 3
    assert f"{tmp_path}/none" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "held.jsonl"]


def test_an_out_that_is_there_is_left_as_it_is(tune, tmp_path, capsys):
    line = refused(tune, capsys)
    out = tmp_path / "out"
    said = f"jlayer: {out}: is there already; name a new folder"
    out.mkdir()
    before = os.stat(tmp_path).st_mtime_ns
    assert line(model="no model") == said
    assert os.stat(tmp_path).st_mtime_ns == before  # nothing was made beside it either
    out.rmdir()
    out.write_text("of the user")
    assert line() == said
    assert out.read_text() == "of the user"
    out.unlink()
    out.symlink_to("nowhere")
    assert line() == said
    out.unlink()
    for name in ("", "/", f"{out}/.", f"{out}/.."):
        assert main(["tune", "no model", str(tmp_path / "data.jsonl"), name]) == 2
        assert "expected the name of a new folder" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "held.jsonl"]


def test_a_work_folder_that_is_no_run_s_is_left_as_it_is(tune, tmp_path, capsys):
    line, work = refused(tune, capsys), tmp_path / f"out{WORK}"
    work.write_text("of the user")
    assert f"{work}: is there and no folder, expected that of a run; remove it, or name" in line()
    assert work.read_text() == "of the user"
    work.unlink()
    work.symlink_to(tmp_path)
    assert "is there and no folder" in line()
    work.unlink()
    work.mkdir()
    (work / "notes").write_text("of the user")
    assert f"{work}: has 'notes', which is no part of a run; remove it, or name" in line()
    assert os.listdir(work) == ["notes"]


def test_a_place_that_cannot_be_written_to(tune, tmp_path, monkeypatch, capsys):
    line = refused(tune, capsys, code=6)
    assert "cannot be made, since " in line(out="data.jsonl/out")
    assert main(["tune", "no model", str(tmp_path / "data.jsonl"), "/proc/out"]) == 6
    assert "/proc/out.tuning: cannot be " in capsys.readouterr().err
    real = os.mkdir

    def full(path, *words):
        if WORK in os.fspath(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *words)

    monkeypatch.setattr(os, "mkdir", full)
    said = f"jlayer: {tmp_path}/out{WORK}: cannot be written (No space left on device); free some"
    assert line().startswith(said)
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "held.jsonl"]


def test_a_second_run_of_the_same_out_is_refused(tune, tmp_path, capsys):
    with WorkFolder(str(tmp_path / "out")) as place:
        before = os.listdir(place.path)
        assert tune(model="no model") == 7
        said = f"{place.path}: another run is at work on it (process {os.getpid()} on "
        assert said in capsys.readouterr().err
        assert os.listdir(place.path) == before


@pytest.fixture
def begun(tune, tmp_path, monkeypatch, capsys):
    """A run that was ended by a full disk after its first step; the disk is as before."""
    from jlayer.tuning.saving import Checkpoints

    real = Checkpoints.save

    def save(own, saved):
        with monkeypatch.context() as patch:
            if saved.step > 1:
                found = list(os.statvfs(tmp_path))
                found[4] = 0  # blocks that are free
                patch.setattr(os, "statvfs", lambda _: os.statvfs_result(found))
            real(own, saved)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert tune("--save-every", 1) == 6
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        f"jlayer: {tmp_path}/out{WORK}/2: cannot be saved (No space left on device); free some "
        "space, then give the same command again, and it goes on from step 1"
    )
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / f"out{WORK}") == ["1"]


def test_what_was_done_before_an_error_is_kept(tune, tmp_path, monkeypatch, capsys):
    from jlayer.tuning import run

    real, calls = run.length_of, []

    def length_of(gradients):
        calls.append(gradients)
        if len(calls) == 2:
            raise StorageError("the disk: cannot be read")
        return real(gradients)

    with monkeypatch.context() as patch:
        patch.setattr(run, "length_of", length_of)
        assert tune("--json") == 6
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-2:] == [
        "jlayer: ended by an error after step 1 of 2; the same command goes on",
        "jlayer: the disk: cannot be read",
    ]
    step, result = map(json.loads, captured.out.splitlines())
    assert (step["step"], result["exit_code"]) == (1, 6)
    assert tune() == 0
    assert "goes on after step 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("then", ["begins anew", "goes on"])
def test_a_signal_while_it_is_opened(tune, request, monkeypatch, capsys, then):
    from jlayer.tuning.saving import Checkpoints

    if then == "goes on":
        request.getfixturevalue("begun")

    def latest(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "latest", latest)
    assert tune() == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"jlayer: stopped before it was open; the same command {then}",
        "jlayer: interrupted",
    ]


class Left(io.StringIO):
    """Stdout whose reader has ended."""

    def write(self, words):
        raise ReaderLeft


def test_a_reader_that_leaves_ends_no_run(tune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Left())
        assert tune("--json") == 0
    files(tmp_path / "out")


def test_a_run_that_a_full_disk_has_ended_goes_on(begun, tune, tmp_path, capsys):
    # What makes no other numbers may be another.
    more = ("--save-every", 0, "--picture", tmp_path / "loss.png", "--host-memory", "3GiB")
    assert tune(*more) == 0
    assert "goes on after step 1 of 2" in capsys.readouterr().err
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert tune(out="whole") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_run_goes_on_with_what_it_was_begun_with_alone(begun, tune, data, tmp_path, capsys):
    line, work = refused(tune, capsys), f"{tmp_path}/out{WORK}"
    end = "give what it was begun with, or remove the folder to begin anew"
    for words, said in {
        ("--rank", 3): "with --rank 2, not 3, and with --alpha 4, not 6",
        ("--seed", 5): "with --seed 0, not 5",
        ("--layers", "0"): "with --layers 0,1, not 0",
        ("--targets", "q_proj"): "with --targets q_proj,v_proj, not q_proj",
        ("--schedule", "linear"): "with --schedule cosine, not linear",
        ("--padded",): "with --padded False, not True",
        ("--dtype", "float32"): "with --dtype bfloat16, not float32",
        ("--held-out", tmp_path / "held.jsonl"): "without --held-out",
    }.items():
        assert line(*words) == f"jlayer: {work}: was begun {said}; {end}"
    said = line("--steps", 3)
    assert said.startswith(f"jlayer: {work}: was begun with --steps 2, not 3; {end} (")
    assert said.endswith("begin another with its OUT as --adapter)")
    data.write_text(data.read_text() + '\n{"text": "one more"}')
    assert line() == f"jlayer: {work}: was begun with another DATA; {end}"
    assert os.listdir(work) == ["1"]


def test_another_version_or_model_is_refused(begun, tune, tmp_path, monkeypatch, capsys):
    real = metadata.version
    line = refused(tune, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "9" if name == "jlayer" else real(name))
        assert f"was begun with jlayer {real('jlayer')}, not 9; give what" in line()
    shutil.copytree(BUNDLED, tmp_path / "other")
    with open(tmp_path / "other" / "model.safetensors", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x02")
    assert "was begun with another MODEL; give what" in line(model=tmp_path / "other")


def test_a_damaged_checkpoint_is_told_by_its_name(begun, tune, tmp_path, capsys):
    line, step = refused(tune, capsys, code=3), tmp_path / f"out{WORK}" / "1"
    facts = step / "facts" / "metadata"
    facts.write_text(facts.read_text().replace('"loss": ', '"loss": 1'))
    assert line() == (
        f"jlayer: {step}: a damaged checkpoint (its numbers are not those of its digest); remove "
        "it, and the same command begins anew"
    )
    shutil.rmtree(step)
    assert tune() == 0


def test_errors_are_one_object_with_json(begun, tune, capsys):
    assert tune("--seed", 1, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 2
    assert "was begun with --seed 0, not 1" in found["error"]


def test_help_imports_neither_numpy_nor_jax():
    code = """
import sys
from jlayer.app.cli import main
try:
    main(["tune", "--help"])
finally:
    heavy = {"numpy", "jax", "optax", "orbax", "torch", "transformers", "matplotlib"}
    print(heavy & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == "set()\n"
    assert "--held-out FILE" in done.stdout
