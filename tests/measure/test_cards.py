"""benchmarks/cards.py measures forward passes over one device and over two, in turn."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_one_device_and_two_are_measured(fable):
    words = ["--device", "cpu", "--devices", "1,2", "--tokens", "1,8", "--turns", "3"]
    done = subprocess.run(
        [sys.executable, "benchmarks/cards.py", str(fable), *words],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["tokens"], row["devices"]) for row in rows] == [(1, 1), (1, 2), (8, 1), (8, 2)]
    for one, two in (rows[:2], rows[2:]):
        pairs = [first / own for first, own in zip(one["seconds"], two["seconds"], strict=True)]
        assert len(pairs) == 3
        assert one["times_as_fast"]["min"] == one["times_as_fast"]["max"] == 1
        assert two["times_as_fast"]["median"] == sorted(pairs)[1]
