"""benchmarks/pruning.py draws the curve of three ways of choosing layers; benchmarks/edge.py runs
within limits; benchmarks/wheels.py asks the package index, which this does not."""

import json
import subprocess
import sys

import pytest

from tests.conftest import BUNDLED, REPOSITORY


@pytest.mark.slow
def test_the_curve_of_three_ways_of_choosing(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king who had three daughters.\n" * 60)
    words = [text, "--most", "1", "--seeds", "2", "--tokens", "512", "--window", "64"]
    done = subprocess.run(
        [sys.executable, "benchmarks/pruning.py", BUNDLED, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    none, one = found["curve"]
    assert len(found["influence"]) == 6
    assert (none["n"], one["n"], len(one["dropped"])) == (0, 1, 1)
    assert {"influence", "last", "random"} <= one.keys()
    assert none["perplexity"] > 1


@pytest.mark.slow
def test_a_run_within_the_limits_of_a_board(fable):
    words = [fable, "--memory", "2GiB", "--cores", "2", "--disk", "90MB/s", "--tokens", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/edge.py", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit_code"] == 0
    assert len(found["token_ids"]) == 2
    assert found["peak_rss_bytes"] < 2 << 30
