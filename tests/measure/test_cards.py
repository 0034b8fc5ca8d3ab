"""benchmarks/cards.py measures forward passes over one device and over two, in turn."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_one_device_and_two_are_measured(fable):
    words = ["--device", "cpu", "--devices", "1,2", "--tokens", "1,8"]
    done = subprocess.run(
        [sys.executable, "benchmarks/cards.py", str(fable), *words, "--sweeps", "2"],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rounds"]) == 2
    for rows in found["rounds"]:
        assert [(row["tokens"], row["devices"]) for row in rows] == [(1, 1), (1, 2), (8, 1), (8, 2)]
    for row in found["gained"]:
        times = [
            of_round["sweep_s"]["median"]
            for rows in found["rounds"]
            for of_round in rows
            if of_round["tokens"] == row["tokens"] and of_round["devices"] in (1, row["devices"])
        ]
        assert row["times_as_fast"]["min"] >= min(times) / max(times)
    assert all(
        row["times_as_fast"]["median"] == 1 for row in found["gained"] if row["devices"] == 1
    )
