"""The script that measures many lanes: its last line is one JSON object."""

import json
import subprocess
import sys

import pytest

from tests.conftest import BUNDLED, REPOSITORY


@pytest.mark.slow
def test_lanes_are_measured_in_one_process():
    script = [sys.executable, "benchmarks/lanes.py", str(BUNDLED), "--device", "cpu", "--draw"]
    done = subprocess.run(
        [*script, "--lanes", "1,3", "--context", "64", "--long", "32x128", "--sweeps", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    passes = [(one["lanes"], one["rows"], one["context"]) for one in found["passes"]]
    assert passes == [(1, 1, 64), (3, 1, 64), (1, 32, 128)]
    assert all(one["sweep_s"]["median"] > 0 for one in found["passes"])
    assert found["draw_64_s"] > 0
