"""Damaged headers, indexes and configs: a sample of what benchmarks/fuzz_headers.py does by the
million, and the costliest inputs that the limits let through."""

import json
import subprocess
import sys

import pytest

from benchmarks import fuzz_headers
from tests.conftest import REPOSITORY


def test_every_damaged_input_is_accepted_or_refused_in_our_words():
    found = fuzz_headers.fuzz(4000, seed=7, large=False)
    assert found["problems"] == []
    assert found["outcomes"]["CheckpointError"] > 3000
    assert found["outcomes"]["accepted"] > 50


@pytest.mark.parametrize("number", [2, 3, 4, 5, 10, 13, 19])
def test_no_input_takes_much_memory(number):
    script = REPOSITORY / "benchmarks" / "fuzz_headers.py"
    command = [sys.executable, script, "--large", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    found = json.loads(done.stdout)
    assert found["peak_bytes"] < fuzz_headers.LIMIT_BYTES
    assert "uncaught" not in found["outcomes"]
