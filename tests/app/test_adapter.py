"""`--adapter` on the command line."""

import json
from argparse import ArgumentParser

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlayer
from jlayer.app import options
from jlayer.app.cli import main
from jlayer.checkpoint.adapter import WEIGHTS
from tests.adapters import write_adapter
from tests.conftest import BUNDLED

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "own", BUNDLED)


def test_generate_gives_the_text_of_python(adapter, capsys):
    words = ["generate", BUNDLED, "-p", PROMPT, "--adapter", adapter, "--temperature", "0"]
    words += ["--max-new-tokens", "12", "--device", "cpu", "--json"]
    assert main([*map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    texts = [
        jlayer.generate(
            jlayer.AutoModel.from_pretrained(BUNDLED, adapter=each, device="cpu"),
            PROMPT,
            temperature=0,
            max_new_tokens=12,
        ).text
        for each in (adapter, None)
    ]
    assert found == texts[0] != texts[1]


def test_a_plan_counts_it(adapter, capsys):
    """Whole layers: each array of it is in one tile."""
    words = ["plan", str(BUNDLED), "--device", "cpu", "--host-share", "0", "--json"]
    found = []
    for more in ([], ["--adapter", str(adapter)]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["sweep"]["bytes"])
    n_bytes = sum(array.nbytes for array in load_file(adapter / WEIGHTS).values())
    assert found[1] - found[0] == n_bytes


def test_a_plan_counts_several(adapter, tmp_path, capsys):
    """Of one of them, and of others that requests ask for."""
    other = write_adapter(tmp_path / "other", BUNDLED, rank=5, seed=1)
    words = ["plan", str(BUNDLED), "--device", "cpu", "--host-share", "0", "--json"]
    found = []
    for more in ([], ["--adapter", str(adapter), "--adapter", f"other={other}"]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    files = [load_file(folder / WEIGHTS) for folder in (adapter, other)]
    n_bytes = sum(array.nbytes for tensors in files for array in tensors.values())
    assert found[1]["sweep"]["bytes"] - found[0]["sweep"]["bytes"] == n_bytes
    runtime = [each["host"]["runtime_bytes"] for each in found]
    assert runtime[1] - runtime[0] == n_bytes, "all of it is in memory, beside each other"


def refused(capsys, *words, code):
    assert main([*map(str, words)]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "bench"])
def test_other_verbs_look_at_it_too(adapter, tmp_path, capsys, verb):
    tensors = load_file(adapter / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = np.nan
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in adapter.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    save_file(tensors, broken / WEIGHTS)
    port = ["--port", "0"] if verb == "serve" else []
    words = [verb, BUNDLED, "--adapter", broken, "--device", "cpu", *port]
    assert f"{name} has NaN or infinite numbers" in refused(capsys, *words, code=3)


def test_of_two_models_it_is_not_known_which_one_has_it(adapter, capsys):
    words = ["eval", "compare", BUNDLED, BUNDLED, "--text", "x", "--adapter", adapter]
    assert "--adapter" in refused(capsys, *words, code=2)


def test_a_folder_that_has_none(tmp_path, capsys):
    words = ["generate", BUNDLED, "-p", PROMPT, "--device", "cpu", "--adapter", tmp_path]
    assert "missing, expected an adapter's folder, as PEFT saves it" in refused(
        capsys, *words, code=3
    )


def parsed(*words):
    parser = ArgumentParser()
    options.add_adapters(parser)
    return options.adapters_of(parser.parse_args([*map(str, words)]))


def test_those_that_requests_ask_for_have_a_name(tmp_path):
    named = ["--adapter", "one=a/b", "--adapter", "two=c=d"]
    assert parsed(*named) == {"adapters": [("one", "a/b"), ("two", "c=d")]}
    odd = tmp_path / "rank=8"
    odd.mkdir()
    assert parsed("--adapter", odd, *named[:2]) == {
        "adapter": str(odd),
        "adapters": [("one", "a/b")],
    }
    assert parsed() == {}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["a", "b"], "a and b have no name"),
        (["=a"], "expected FOLDER or NAME=FOLDER"),
        (["a="], "expected FOLDER or NAME=FOLDER"),
        (["x=a", "x=b"], "x is there twice"),
        (["fable-3m=a"], "fable-3m is a name of the model itself"),
    ],
)
def test_names_that_are_refused(tmp_path, capsys, words, what):
    given = [each for word in words for each in ("--adapter", word)]
    batch = tmp_path / "in.jsonl"
    for command in (["serve", BUNDLED, "--port", 0], ["batch", BUNDLED, batch, tmp_path / "out"]):
        assert what in refused(capsys, *command, *given, "--device", "cpu", code=2)
