"""GGUF files on the command line: the commands of docs/gguf.md and others, as users give them."""

import json

import pytest

import jlayer
from jlayer.app.cli import main
from tests.conftest import BUNDLED
from tests.gguf.words import of_json
from tests.gguf_files import write

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with one model, of which the matrices are blocks, and a sibling."""
    folder = tmp_path_factory.mktemp("gguf") / "home"
    folder.mkdir()
    words = of_json(BUNDLED, "gpt-2", adds_bos=True)
    write(BUNDLED, folder / "model.gguf", kind="Q8_0", words=words)
    (folder / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    return folder


def test_text_goes_on_in_place_converted_and_exported(home, tmp_path, capsys):
    model, target, back = (
        str(p) for p in (home / "model.gguf", tmp_path / "l", tmp_path / "b.gguf")
    )
    run = ["-p", PROMPT, "-n", "12", "--temperature", "0", "--device", "cpu"]
    assert main(["convert", model, target]) == 0
    assert main(["verify", target]) == 0
    assert main(["export", target, back, "--format", "gguf"]) == 0
    assert f"{back}: holds {target} as gguf, " in capsys.readouterr().out
    capsys.readouterr()
    texts = []
    for ref in (model, str(home), target, back):
        assert main(["generate", ref, *run]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert len(texts[0]) > len(PROMPT)


def test_a_split_model(tmp_path, capsys):
    words = of_json(BUNDLED, "gpt-2", adds_bos=True)
    write(BUNDLED, tmp_path / "m.gguf", kind="F16", words=words, split_max_tensors=20)
    first = str(tmp_path / "m-00001-of-00003.gguf")
    assert main(["verify", first, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_files"] == 3
    assert not found["has_checksums"]
    run = ["-p", PROMPT, "-n", "3", "--device", "cpu"]
    assert main(["generate", first, *run]) == 0
    other = str(tmp_path / "m-00002-of-00003.gguf")
    capsys.readouterr()
    assert main(["generate", other, *run]) == 3
    assert f"name the first one, {first}" in capsys.readouterr().err


def test_a_plan_has_the_bytes_of_the_file(home, capsys):
    assert main(["plan", str(home / "model.gguf"), "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    with jlayer.AutoModel.from_pretrained(home, device="cpu") as model:
        assert model.plan.as_dict()["sweep"]["bytes"] == plan["sweep"]["bytes"]
        assert model.dtype == "bfloat16"
    assert plan["quantization"]["published"]["model.layers.*.mlp.up_proj.weight"] == "q8_0"
    words = ["plan", str(home / "model.gguf"), "--device", "cpu", "--quantize", "int4"]
    assert main(words) == 2
    assert "is published quantized (q8_0)" in capsys.readouterr().err


def test_what_is_verified_and_listed(home, capsys):
    assert main(["verify", str(home / "model.gguf")]) == 0
    assert "its structure is right (GGUF has no checksums" in capsys.readouterr().out
    assert main(["list", str(home), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["form"], model["quantization"], model["state"]) == ("GGUF", "q8_0", "runs")


@pytest.mark.parametrize("words", [["--quantize", "int4"], ["--delete-source", "--yes"]])
def test_what_a_conversion_refuses(home, tmp_path, capsys, words):
    model = str(home / "model.gguf")
    assert main(["convert", model, str(tmp_path / "out"), *words]) in (2, 3)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("jlayer: ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("words", [["seal"], ["export", "--format", "orbax"]])
def test_what_needs_a_converted_folder_says_so(home, tmp_path, capsys, words):
    verb, *options = words
    target = [str(tmp_path / "out")] if verb == "export" else []
    assert main([verb, str(home / "model.gguf"), *target, *options]) == 3
    assert "found a GGUF model, expected a folder; convert it first" in capsys.readouterr().err


@pytest.mark.slow
def test_a_draft_may_be_a_gguf_file(home, capsys):
    words = ["generate", str(BUNDLED), "--draft", str(home / "model.gguf"), "-p", PROMPT, "-n", "6"]
    assert main([*words, "--device", "cpu", "--temperature", "0"]) == 0
    assert main(["plan", str(BUNDLED), "--draft", str(home), "--device", "cpu"]) == 0
