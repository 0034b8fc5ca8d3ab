"""Every command and line of Python that the README shows is run here, the first two by CI."""

import json
import re
import shlex
import shutil

import pytest

from jlayer.app.cli import main
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

    only_copy = tmp_path / "only-copy"
    shutil.copytree(BUNDLED, only_copy)

    def substitute(text):
        for shown, real in (
            (f"{LARGE}-jlayer", tmp_path / "large"),
            (LARGE, only_copy),
            (LAYERED, tmp_path / "layered"),
            (PUBLISHED, BUNDLED),
        ):
            text = text.replace(shown, str(real))
        # On a terminal it asks; here there is nobody to ask.
        return f"{text} --yes" if "--delete-source" in text else text

    return substitute


def test_commands_run_one_after_another(mine, capsys):
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


def test_the_measured_table_is_what_was_kept():
    """Each figure of the table stands in a kept result."""
    results = REPOSITORY / "benchmarks" / "results"
    kept = {path.stem: json.loads(path.read_text()) for path in results.glob("h200-*.json")}
    rows = {  # (result, tokens a sweep) -> what the README says of it
        ("h200-host1536", 1): "55.1 GB/s | 0.993 | 1517 MiB",
        ("h200-host1536", 64): "54.9 GB/s | 0.990",
        ("h200-host4096", 512): "53.3 GB/s | 0.96 | 4063 MiB",
        ("h200-prefill", 4096): "36.3 GB/s, 0.67 s a sweep | 0.65 | 4065 MiB",
        ("h200-m405", 1): "54.7 GB/s | 1.00 | 2023 MiB",
    }
    for (name, tokens), said in rows.items():
        assert said in README
        result = kept[name]
        sweep = next(one for one in result["sweeps"] if one["tokens"] == tokens)
        speed = float(said.split()[0]) * 1e9
        assert sweep["put_bytes_per_s"] == pytest.approx(speed, rel=2e-3)
        if "MiB" in said:
            assert f"{result['smi_peak_mib']} MiB" in said
