"""`jlayer eval harness`: what is refused before a model is opened. What it finds is in
tests/measure/test_harness.py."""

import importlib.util

import pytest

from jlayer.app.cli import main

ARGS = ["eval", "harness", "path/to/none", "--tasks", "some"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--limit", "0"], "--limit: found 0"),
        (["--num-fewshot", "-1"], "--num-fewshot: found -1"),
        (["--include-path", "path/to/none"], "is no folder"),
        (["--tasks", ","], "--tasks: none given"),
    ],
)
def test_what_no_model_could_take_is_refused_first(capsys, more, words):
    assert main([*ARGS, *more]) == 2
    assert words in capsys.readouterr().err


def test_without_the_package_it_says_how_to_get_it(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    assert main(ARGS) == 2
    assert '".[eval]"' in capsys.readouterr().err
