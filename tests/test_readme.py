"""Every command and line of Python that the README shows is run here, the first two by CI."""

import re
import shlex
import shutil

import pytest

from benchmarks import table
from jlayer.app.cli import main
from jlayer.measure import bench as measuring
from tests.conftest import BUNDLED, REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PUBLISHED, LAYERED = "path/to/Llama-3-8B", "path/to/Llama-3-8B-jlayer"
LARGE = "path/to/Llama-3-70B"


def commands():
    """Indented lines that begin with `jlayer`, with or without a prompt before them."""
    found = re.findall(r"^    (?:\$ )?(jlayer .+)$", README, re.MULTILINE)
    assert len(found) >= 5
    return found


@pytest.fixture
def mine(fable, tmp_path):
    """What stands for the reader's paths: the bundled model, and where its conversion goes."""

    stories = tmp_path / "stories.txt"
    stories.write_text("Once upon a time there was a little girl who lived in a wood.\n" * 3)
    only_copy = tmp_path / "only-copy"
    shutil.copytree(BUNDLED, only_copy)

    def substitute(text):
        for shown, real in (
            (f"{LARGE}-jlayer", tmp_path / "large"),
            (LARGE, only_copy),
            (LAYERED, tmp_path / "layered"),
            ("path/to/back", tmp_path / "back"),
            (f"{PUBLISHED}-int4", tmp_path / "int4"),
            ("stories.txt", stories),
            (PUBLISHED, BUNDLED),
        ):
            text = text.replace(shown, str(real))
        # On a terminal it asks; here there is nobody to ask.
        return f"{text} --yes" if "--delete-source" in text else text

    return substitute


def test_commands_run_one_after_another(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # for what they write
    for bound in ("LEAST_ROUNDS", "MOST_ROUNDS"):
        monkeypatch.setattr(measuring, bound, 1)  # `bench` repeats until its figures are steady
    for command in commands():
        words = shlex.split(mine(command))
        assert words[0] == "jlayer"
        assert main(words[1:]) == 0, command
        printed = capsys.readouterr().out
        shown = README.split(f"    $ {command}\n")
        if len(shown) == 2 and "plan" in command:
            for line in re.match(r"(?:    .+\n)*", shown[1])[0].splitlines():
                assert line.strip() == "..." or line[4:] in printed, line


def test_the_python_example_runs(mine, capsys):
    assert main(["convert", *shlex.split(mine(f"{PUBLISHED} {LAYERED}"))]) == 0
    start = README.index("    import jlayer\n")
    block = re.match(r"(?:    .*\n|\n)+", README[start:])[0]
    code = "\n".join(line[4:] for line in block.splitlines())
    capsys.readouterr()
    exec(compile(mine(code), "README.md", "exec"), {})
    assert "(1, " in capsys.readouterr().out


def test_the_measured_tables_are_what_the_results_give():
    """benchmarks/table.py writes them; run it where this is red."""
    assert table.rewritten(README) == README
    assert "| 70B shape, 14 layers | 1536 MiB | 1 |" in README
