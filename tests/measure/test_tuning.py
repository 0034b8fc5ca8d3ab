"""benchmarks/tuning.py measures steps of tuning, streamed and with the weights there."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--resident", "--chunk-rows", "32"]])
def test_steps_are_measured(fable, more):
    words = ["--device", "cpu", "--tokens-per-step", "64", "--length", "32", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/tuning.py", str(fable), *words, *more],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["step_s"]["n"] == 2
    assert found["step_s"]["min"] > 0
    assert (found["put_bytes"] > 0) == (not more)
    assert found["loss"] > 1
