"""Kills, power cuts, failing calls, full disks and flipped bits: a sample of what
benchmarks/convert_torture.py does at length."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.convert_torture import CAMPAIGNS
from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_every_conversion_that_is_disturbed_ends_as_one_that_is_not(tmp_path):
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path  # in memory: syncs cost time
    script = REPOSITORY / "benchmarks" / "convert_torture.py"
    command = [sys.executable, script, "--short", "--home", home, "--only"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    halves = [("kills", "calls", "power", "flips", "full"), ("strace", "random", "signals")]
    assert {*halves[0], *halves[1]} == set(CAMPAIGNS)
    processes = [subprocess.Popen([*command, *half], **options, cwd=REPOSITORY) for half in halves]
    figures = {}
    for process in processes:
        out, err = process.communicate()
        assert out, err
        found = json.loads(out)
        assert found["problems"] == []
        assert process.returncode == 0
        figures |= found["figures"]
    assert figures["kills"]["plain"] == figures["kills"]["delete"] == 12
    assert figures["power"]["overwrite"]["points"] == 8
    assert figures["flips"]["found"] == 60
    assert figures["random"]["conversions"] >= 1
