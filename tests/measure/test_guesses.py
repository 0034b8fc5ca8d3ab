"""The scripts that measure guessed tokens: benchmarks/speculation.py, verifying.py, drafting.py and
resident.py. The last line of each is one JSON object."""

import json
import subprocess
import sys

import pytest

from tests.conftest import BUNDLED, REPOSITORY


def last_line(script, *words):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *map(str, words), "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_tokens_a_pass_are_measured():
    few = ["--nodes", "4", "--temperatures", "0", "--modes", "draft,lookup", "--tokens", "6"]
    draft, lookup = last_line("speculation", BUNDLED, BUNDLED, *few, "--check")["rows"]
    assert draft["tokens_per_pass"] > lookup["tokens_per_pass"] >= 1  # it drafts for itself
    for row in (draft, lookup):
        assert row["equal_to_plain"] == row["texts"] == 10


@pytest.mark.slow
def test_passes_with_trees_are_measured():
    few = ["--rows", "1,16", "--count", "2", "--prompt-tokens", "8", "--context", "700"]
    plain, tree = last_line("verifying", BUNDLED, BUNDLED, *few)["rows"]
    assert (plain["rows"], tree["rows"]) == (1, 16)
    assert plain["draft_s"]["median"] < tree["draft_s"]["median"]
    seconds = tree["pass_s"]["median"]
    assert tree["assumed_s_per_token"] == pytest.approx(seconds / tree["assumed_tokens"])


@pytest.mark.slow
def test_steps_of_a_draft_are_measured():
    few = ["--rows", "2,8", "--prompts", "64", "--context", "64"]
    rows = last_line("drafting", BUNDLED, *few)["rows"]
    assert [row.get("rows") or row["prompt"] for row in rows] == [2, 8, 64]
    assert all(row["seconds"]["median"] > 0 for row in rows)


@pytest.mark.slow
def test_a_resident_model_is_measured_with_guesses_and_without():
    found = last_line("resident", BUNDLED, "--tokens", "20", "--runs", "1")
    seconds = found["seconds_a_token"]
    ratio = seconds["auto"]["median"] / seconds["off"]["median"]
    assert found["auto_by_off"]["median"] == pytest.approx(ratio)
