"""Greedy or drawn: one rule, the makers' settings and the user's over them; the seed is told."""

import json
import re
import shutil

import pytest

import jlayer
from jlayer.app.cli import main
from tests.conftest import BUNDLED

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A folder whose makers say that tokens are drawn."""
    folder = shutil.copytree(BUNDLED, tmp_path_factory.mktemp("draws") / "model")
    published = json.loads((folder / "generation_config.json").read_text())
    published |= {"do_sample": True, "temperature": 1.3, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture
def run(capsys):
    def run(folder, *options):
        """(text, last line on stderr) of `jlayer generate`."""
        assert main(["generate", str(folder), "-p", PROMPT, "--device", "cpu", *options]) == 0
        told = capsys.readouterr()
        return told.out, told.err.strip().rpartition("\n")[2]

    return run


def test_makers_that_draw_draw_and_the_seed_gives_the_text_again(drawing, run):
    text, line = run(drawing)
    seed = re.search(r"7 tokens \(\w+\), seed (\d+),", line)[1]
    again, line = run(drawing, "--seed", seed)
    assert again == text
    assert f"seed {seed}," in line
    found = jlayer.generate(drawing, PROMPT, device="cpu", seed=int(seed))
    assert found.text == text.rstrip("\n")
    assert found.seed == int(seed)


def test_the_users_temperature_overrules_the_makers(drawing, fable, run):
    text, line = run(drawing, "--temperature", "0")
    assert ", greedy," in line
    greedy, line = run(fable, "-n", "7")
    assert text == greedy
    assert ", greedy," in line
    assert re.search(r", seed \d+,", run(fable, "-n", "3", "--top-p", "0.9")[1])


def test_a_published_length_is_cut_to_the_room_and_the_user_is_told(drawing, capsys):
    ids = ",".join(["7"] * 20)
    options = ("--prompt-ids", ids, "--device", "cpu", "--context", "24")
    assert main(["generate", str(drawing), *options]) == 0
    assert "max_new_tokens is 7, cut to 4 new tokens" in capsys.readouterr().err
    assert main(["generate", str(drawing), *options, "-n", "5"]) == 2
    assert "max_new_tokens: 20 prompt tokens + 5 new ones" in capsys.readouterr().err


def test_a_published_max_length_below_the_prompt_is_exit_2_and_says_what_to_do(tmp_path, capsys):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"max_length": 20}')
    options = ("--prompt-ids", ",".join(["7"] * 27), "--device", "cpu")
    assert main(["generate", str(folder), *options]) == 2
    line = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert re.search(r"max_length: found 20, and the prompt has 27 tokens .* \(-n\)", line)
    assert main(["generate", str(folder), *options, "-n", "1"]) == 0
