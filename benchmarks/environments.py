"""Python environments for the peers: made once in a cache folder, every version pinned.

Without a network, packages come from a folder of wheels. Where the running interpreter has the
packages already, it serves every program, and wheels in that folder are added to it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

TRANSFORMERS = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0"]
AIRLLM = [*TRANSFORMERS, "airllm==4.0.0"]
LLAMA_CPP = ["xllamacpp==2026.10.11549", "gguf==0.19.0"]  # llama.cpp b11549, for the CPU alone


def own_requirements(*, cuda: bool) -> list[str]:
    """What pyproject.toml asks for: the code itself runs from the repository."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + (project["optional-dependencies"]["cuda"] if cuda else [])


class Environments:
    """Interpreters by list of requirements. `here`: the running one for all of them."""

    def __init__(self, cache: Path, *, wheels: Path | None, here: bool):
        self._cache, self._wheels, self._here = cache.absolute(), wheels, here
        self._beside: Path | None = None
        if here and wheels:
            self._beside = self._unpacked(wheels)

    def python(self, name: str, requirements: list[str]) -> str:
        """The interpreter that has `requirements`; makes the environment on first use."""
        if self._here:
            return sys.executable
        key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]
        folder = self._cache / f"{name}-{key}"
        made, python = folder / "made", folder / "bin" / "python"
        if not made.exists():
            print(f"making {folder}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            # torch first: with its version settled, nothing else asks for another build of it.
            torch = [one for one in requirements if one.startswith("torch==")]
            for wanted in filter(None, (torch, requirements)):
                self._install(str(python), *wanted)
            made.write_text("\n".join(requirements))
        return str(python)

    def variables(self) -> dict[str, str]:
        """The environment variables of a runner: our code, and what lies beside the interpreter."""
        paths = [str(REPOSITORY), *([str(self._beside)] if self._beside else [])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def _unpacked(self, wheels):
        folder = self._cache / "beside"
        shutil.rmtree(folder, ignore_errors=True)
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        self._install(sys.executable, "--no-deps", "--no-index", "--target", str(folder), *files)
        return folder

    def _install(self, python, *words):
        source = ["--no-index", "--find-links", str(self._wheels)] if self._wheels else []
        command = [python, "-m", "pip", "install", "-qqq", *source, *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
