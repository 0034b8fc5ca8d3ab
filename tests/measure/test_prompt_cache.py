"""benchmarks/prompt_cache.py measures a prompt that is computed, and one that is read."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_a_prompt_is_measured_computed_and_read(fable, tmp_path):
    words = ["--device", "cpu", "--dtype", "float32", "--tokens", "300", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/prompt_cache.py", str(fable), *words, "--cache", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens_are_equal"]
    assert found["kept_tokens"] == 256
    assert found["kept_bytes"] > 0
    assert found["read_over_computed"] > 0
    assert not list(tmp_path.iterdir()), "nothing is left"
