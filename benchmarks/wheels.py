"""Whether every base dependency has a wheel for a 64-bit ARM board, as the package index tells.

    python benchmarks/wheels.py [--platform manylinux2014_aarch64] [--python 3.11]

Asks pip for the newest wheel of each dependency in pyproject.toml, none of which may be built from
source, and prints its version. Exits with 1 where one is missing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# What newer wheels ask for: libc of 2021, as in Debian 12 and Raspberry Pi OS of 2023.
NEWER = ("manylinux_2_27_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")


def wheel_of(requirement: str, platforms: list[str], python: str) -> str | None:
    """The file name of the newest wheel; None: there is none."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [f"--platform={one}" for one in platforms]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        command += ["--only-binary=:all:", f"--python-version={python}", *asked, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        names = [path.name for path in Path(folder).iterdir()]
        return names[0] if done.returncode == 0 and names else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", default="manylinux2014_aarch64")
    parser.add_argument("--python", default="3.11")
    args = parser.parse_args()
    missing = []
    for requirement in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
        name = re.match(r"[\w.-]+", requirement)[0]
        found = wheel_of(requirement, [args.platform], args.python)
        found = found or wheel_of(requirement, [args.platform, *NEWER], args.python)
        print(f"{name}: {found or 'none'}", flush=True)
        missing += [name] * (found is None)
    sys.exit(f"without a wheel: {', '.join(missing)}" if missing else 0)


if __name__ == "__main__":
    main()
