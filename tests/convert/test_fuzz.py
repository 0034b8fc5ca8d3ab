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


LARGE = [2, 3, 4, 5, 10, 13, 19]


@pytest.fixture(scope="module")
def started():
    """number -> a process that reads this input alone; all at once, since each has its own peak."""
    script = REPOSITORY / "benchmarks" / "fuzz_headers.py"
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    found = {n: subprocess.Popen([sys.executable, script, "--large", str(n)], **options)
             for n in LARGE}  # fmt: skip
    yield found
    for process in found.values():
        with process:
            process.kill()


@pytest.mark.parametrize("number", LARGE)
def test_no_input_takes_much_memory(started, number):
    out, _ = started[number].communicate()
    assert started[number].returncode == 0
    found = json.loads(out)
    assert found["peak_bytes"] < fuzz_headers.LIMIT_BYTES
    assert "uncaught" not in found["outcomes"]
