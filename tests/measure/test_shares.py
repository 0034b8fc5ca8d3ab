"""benchmarks/shares.py measures forward passes divided between cores and device."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_shares_are_measured(fable):
    words = ["--device", "cpu", "--shares", "0,0.5", "--tokens", "1,2", "--count", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/shares.py", str(fable), *words, "--form", "bfloat16"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    alone, half = found["shares"]
    assert all(row["host_product_bytes"] == 0 for row in alone["passes"])
    for row in half["passes"]:
        assert 0 < row["host_product_bytes"] < row["bytes"]
        assert row["pass_s"]["median"] > 0
    assert found["ceiling"]["columns"]["1"]["cores_alone"] > 0
