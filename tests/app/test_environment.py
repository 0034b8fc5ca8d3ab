"""What surrounds a command: JAX's own variables, a working directory that is gone."""

import os
import subprocess
import sys

import pytest

from tests.conftest import BUNDLED

TEMPLATE = "{{ messages[0].content }}"


@pytest.mark.parametrize("platforms", ["cuda", "nonsense", "tpu"])
def test_a_platform_that_is_not_here_is_one_line(platforms):
    import jax

    if any(device.platform in ("gpu", "tpu") for device in jax.devices()):
        pytest.skip("this machine has an accelerator")
    words = ["generate", BUNDLED, "-p", "Once", "-n", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", *words],
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"jlayer: JAX_PLATFORMS: found {platforms!r}")
    assert "set it to cpu" in line


# An installed `jlayer` has no entry of sys.path that is relative; `python -c` has "".
IN_NO_FOLDER = """
import os, sys
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
del sys.argv[1]
sys.path.insert(1, "relative")
from jlayer.__main__ import run
sys.exit(run())
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["generate", BUNDLED, "-p", "Hi", "--show-prompt", "--chat-template", "FILE"], 0, "Hi"),
        (["generate", "here", "-p", "Hi"], 3, "here: no such file or folder"),
        (["verify", "here"], 3, "here"),
        (["plan", "here/config.json"], 3, "here"),
        (["convert", BUNDLED, "here"], 6, "here"),
    ],
)
def test_a_working_directory_that_is_gone_matters_to_relative_paths_alone(
    tmp_path, words, code, said
):
    (tmp_path / "gone").mkdir()
    file = tmp_path / "template"
    file.write_text(TEMPLATE)
    words = [file if word == "FILE" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", IN_NO_FOLDER, tmp_path / "gone", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stdout + done.stderr
