"""The comparison's own arithmetic, its links, and one run of it with jlayer alone."""

import json
import subprocess
import sys

from benchmarks import table
from benchmarks.published import published, weight_bytes
from tests.conftest import BUNDLED, REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "versus.py"


def compare(*runs):
    """In a process of its own: the scripts import each other by their bare names."""
    code = (
        "import json, sys; import versus; print(json.dumps(versus.compare(*json.load(sys.stdin))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(runs),
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_other_tokens_are_told_with_their_place_and_how_close_the_choice_was():
    ours = {"token_ids": [7, 8, 9], "top": [[[7, -1.0], [8, -3.0]], [[8, -1.0], [5, -1.25]], []]}
    theirs = {"token_ids": [7, 5, 1], "top": [[[7, -1.5], [6, -3.0]], [[5, -1.0], [8, -1.125]], []]}
    found = compare(ours, theirs)
    assert not found["same_tokens"]
    assert found["first_difference"] == 1
    assert found["gap_there"] == 0.25
    assert found["largest_logprob_difference"] == 0.5  # what follows the difference is not compared
    same = compare(ours | {"top": theirs["top"][:2]}, ours | {"top": theirs["top"][:2]})
    assert same["same_tokens"]
    assert same["largest_logprob_difference"] == 0.0


def test_a_layered_folder_is_read_under_published_names_without_a_copy(fable, tmp_path):
    found = published(fable, tmp_path / "published")
    index = json.loads((found / "model.safetensors.index.json").read_text())["weight_map"]
    own = json.loads((fable / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == own.keys()
    for tensor, name in index.items():
        assert (found / name).samefile(fable / own[tensor])
        assert 1 <= int(name.split("-")[1]) <= len(set(own.values()))  # AirLLM reads the number
    names = sorted(set(index.values()))
    assert index["model.embed_tokens.weight"] == names[0]
    assert (found / "tokenizer.json").read_bytes() == (fable / "tokenizer.json").read_bytes()
    assert not (found / "manifest.json").exists()
    assert weight_bytes(found) == weight_bytes(fable) == weight_bytes(BUNDLED)
    assert published(BUNDLED, tmp_path / "none") == BUNDLED


def test_a_run_becomes_a_table(tmp_path):
    out = tmp_path / "result.json"
    words = ["--programs", "jlayer", "--new-tokens", "3", "--prompt-tokens", "4", "--here"]
    command = [sys.executable, str(SCRIPT), str(BUNDLED), *words, "--out", str(out)]
    subprocess.run([*command, "--work", str(tmp_path / "work")], check=True, capture_output=True)
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert len(row["token_ids"]) == 3
    assert row["agreement"]["same_tokens"]
    assert row["anonymous_bytes"] > 10 << 20  # seen from outside while it ran
    failed = {"name": "airllm", "failed": "Killed"}
    slower = {**row, "name": "transformers", "versions": {"transformers": "5.0"}}
    slower["s_per_token"] = {"median": 2 * row["s_per_token"]["median"]}
    printed = table.versus({**result, "rows": [row, slower, failed]})
    assert "| transformers 5.0, whole model in memory |" in printed
    assert "| 2.00 |" in printed
    assert "| AirLLM  | failed |" in printed
    assert "All of them gave the same tokens" in printed


def test_a_sweep_of_a_folder_without_weights_ends_before_anything_is_measured(tmp_path):
    for folder in (tmp_path, "/no/such/folder"):
        done = subprocess.run(
            [sys.executable, "sweep.py", folder, "--device", "cpu"],
            cwd=SCRIPT.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stdout == ""
        line = f"sweep.py: {folder}: no *.safetensors there; name a folder with weights\n"
        assert done.stderr == line
