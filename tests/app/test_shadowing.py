"""A user's files beside a script, or where a command is run, stand before installed packages."""

import subprocess
import sys
import tomllib

import pytest

from tests.conftest import BUNDLED, REPOSITORY

SCRIPT = f"""
import sys
from jlayer.app.cli import main
sys.exit(main(["convert", {str(BUNDLED)!r}, "layered"]) or main(["verify", "layered"]))
"""
COMMAND = ["-m", "jlayer", "convert", BUNDLED, "layered"]


@pytest.mark.parametrize("argv", [["script.py"], COMMAND], ids=["script", "command"])
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_convert_of_the_user_s_is_not_taken_for_ours(tmp_path, argv, as_folder):
    (tmp_path / "script.py").write_text(SCRIPT)
    own = tmp_path / "convert.py"
    if as_folder:
        (tmp_path / "convert").mkdir()
        own = tmp_path / "convert" / "__init__.py"
    own.write_text("raise SystemExit('the convert of the user')")
    done = subprocess.run(
        [sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "6 layers" in done.stdout


def test_nothing_is_installed_beside_jlayer():
    """Any other top-level name would give way to a user's file of that name."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} == {"jlayer"}
    # And each folder of ours is in it, the linked one too.
    found = {
        ".".join((root, *path.parent.relative_to(REPOSITORY / folder).parts))
        for folder, root in (("jlayer", "jlayer"), ("convert", "jlayer.convert"))
        for path in (REPOSITORY / folder).rglob("__init__.py")
    }
    assert found == set(packages) - {"jlayer.data.configs"}
