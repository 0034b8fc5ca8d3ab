"""benchmarks/opening.py starts jlayer cold and warm, in turn."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_starts_are_measured_cold_and_warm(fable, tmp_path):
    words = ["--device", "cpu", "--rounds", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "benchmarks/opening.py", str(fable), *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    for state in ("cold", "warm"):
        row = {name: figures["median"] for name, figures in found[state].items()}
        assert 0 < row["first_token_s"] < row["process_s"]
        assert row["read_bytes"] > 0
    assert found["warm"]["cached_bytes"]["median"] >= found["cold"]["cached_bytes"]["median"]
