"""One word for one option: what several verbs take has one meaning and one line of help."""

import argparse
import importlib
import json
import os
import threading

import pytest

from jlayer.app import options
from jlayer.app.cli import VERBS, main
from jlayer.app.inputs import name_of, read_text
from jlayer.errors import StorageError, UsageError
from tests.conftest import BUNDLED


class Recorder:
    """Stands for a parser, its groups and its kinds: keeps each option with its help."""

    formatter_class = None

    def __init__(self):
        self.options = []

    def add_argument(self, *flags, help=None, **_):
        if flags[0].startswith("-"):
            self.options.append((flags[-1], help or ""))

    def itself(self, *_, **__):
        return self

    add_argument_group = add_mutually_exclusive_group = add_subparsers = add_parser = itself


def by_flag():
    """flag -> its lines of help, without the default"""
    found = {}
    for module, _ in VERBS.values():
        parser = Recorder()
        importlib.import_module(module).add_arguments(parser)
        options.add_output(parser)
        for flag, line in parser.options:
            found.setdefault(flag, set()).add(line.split(" (default: ")[0])
    return found


# `convert --dtype` casts the weights, the others compute in it. `plan --quantize` plans for what
# `convert --quantize` makes. `eval harness --chat` is of questions.
TWO_MEANINGS = {
    *("--chat", "--chat-template", "--dtype", "--quantize", "--system", "--template-var"),
    *("--adapter", "--seed"),  # of a run, and of what is trained
    "--save-every",  # tokens of a text, steps of tuning
    "--held-out",  # of tuning, in the form of its data, and of pruning
}


def test_an_option_of_several_verbs_has_one_line_of_help():
    found = by_flag()
    assert {flag for flag, lines in found.items() if len(lines) > 1} == TWO_MEANINGS
    assert all(words for lines in found.values() for words in lines)  # and none is without


def test_every_verb_has_a_line_and_a_description():
    for verb, (module, line) in VERBS.items():
        assert line
        assert importlib.import_module(module).__doc__, verb


@pytest.mark.parametrize("place", [1, 2, -1])
def test_json_is_taken_before_and_after_the_kind_of_eval(tmp_path, capsys, place):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl.")
    words = ["eval", "perplexity", str(BUNDLED), "--text", str(text), "--device", "cpu"]
    words.insert(place if place > 0 else len(words), "--json")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["n_predicted"] > 5


def test_only_what_is_given_is_passed_on():
    parser = argparse.ArgumentParser()
    options.add_run(parser, host_memory="16GiB")
    args = parser.parse_args(["--dtype", "float32"])
    assert options.given(args, *options.RUN) == {"host_memory": "16GiB", "dtype": "float32"}


def test_a_model_is_called_by_the_last_part_of_its_path():
    assert name_of("/models/Llama-3-8B/") == name_of("meta/Llama-3-8B") == "Llama-3-8B"


def test_a_text_is_read_from_a_pipe_too(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("Übung",))
    writer.start()
    assert read_text(str(path), option="--text") == "Übung"
    writer.join()


def test_a_text_that_cannot_be_read_names_its_option(tmp_path):
    (tmp_path / "bad").write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match=r"--text: .*bad: not UTF-8 at byte 2"):
        read_text(str(tmp_path / "bad"), option="--text")
    with pytest.raises(UsageError, match=r"--text: .*none does not exist"):
        read_text(str(tmp_path / "none"), option="--text")
    with pytest.raises(StorageError, match=r"--text: .*Is a directory"):
        read_text(str(tmp_path), option="--text")
