"""Kills, power cuts, failing calls, full disks and flipped bits: a sample of what
benchmarks/convert_torture.py does at length."""

import json
import os
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_every_conversion_that_is_disturbed_ends_as_one_that_is_not(tmp_path):
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path  # in memory: syncs cost time
    script = REPOSITORY / "benchmarks" / "convert_torture.py"
    command = [sys.executable, script, "--short", "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    figures = found["figures"]
    assert found["problems"] == []
    assert done.returncode == 0
    assert figures["kills"]["plain"] == figures["kills"]["delete"] == 12
    assert figures["power"]["overwrite"]["points"] == 8
    assert figures["flips"]["found"] == 60
    assert figures["random"]["conversions"] >= 1
