"""The command line is read without guesses: options whole, values as they are."""

import importlib

import pytest

from jlayer.app import options
from jlayer.app.cli import VERBS, main
from jlayer.app.parser import MEANT, Parser
from tests.conftest import BUNDLED


def parsers():
    """The parser of every command, those inside a command among them."""
    for verb, (module, _) in VERBS.items():
        made = []

        class Noted(Parser):
            def __init__(self, made=made, **settings):
                made.append(self)
                super().__init__(**settings)

        own = Noted(prog=verb)
        importlib.import_module(module).add_arguments(own)
        options.add_output(own)
        yield from made


def test_no_command_takes_a_part_of_an_option():
    found = list(parsers())
    assert len(found) > len(VERBS)
    assert not any(parser.allow_abbrev for parser in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "x", "--js"], "unrecognized arguments: --js (did you mean --json?)"),
        (["convert", "a", "b", "--del"], "did you mean --delete-source?"),
        (["generate", "x", "--top"], "did you mean --top-p or --top-k?"),
        (["generate", "x", "--temprature", "1"], "did you mean --temperature?"),
        (["generate", "x", "-json"], "-json: an option of this name has two dashes: --json"),
        (["generate", "x", "-prompt", "y"], "two dashes: --prompt"),
        (["eval", "perplexity", "x", "--text", "t", "--strid", "2"], "--strid"),
        (["eval", "perp", "x", "--text", "t"], "invalid choice: 'perp'"),
        (["gen", "x"], "invalid choice: 'gen'"),
    ],
)
def test_what_is_not_known_is_refused_with_what_was_meant(capsys, words, said):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("value", ["-x", "--x", "-1,2", "--", "-", "a=b", "", " ", "-h y"])
def test_the_value_of_an_option_is_what_follows_it(value):
    parser = Parser(prog="test")
    parser.add_argument("ref")
    parser.add_argument("more", nargs="?")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-s", "--stop", action="append")
    parser.add_argument("--flag", action="store_true")
    found = parser.parse_args(["-s", value, "a", "--stop", value, "--flag", "b"])
    assert (found.stop, found.ref, found.more, found.flag) == ([value, value], "a", "b", True)


def test_a_quiet_command_says_results_and_errors_only(fable, capsys):
    words = ["generate", str(fable), "Once", "-n", "2", "--device", "cpu"]
    assert main([*words, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert main(words) == 0
    loud = capsys.readouterr()
    assert loud.out == quiet.out
    assert len(loud.err.splitlines()) == 2
    assert main(["generate", str(BUNDLED), "Once", "--top-p", "3", "--quiet"]) == 2
    assert "top_p" in capsys.readouterr().err


@pytest.mark.parametrize("before", [["-p", "a"], ["--prompt-ids", "0,5"], ["a"]])
def test_a_mistyped_option_is_named_whatever_stands_before_it(before, capsys):
    """Its value was taken for a prompt, and the message spoke of PROMPT."""
    assert main(["generate", "x", *before, "--temprature", "1"]) == 2
    assert "--temprature (did you mean --temperature?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["generate", "x", "--gpu-memory", "4GiB"], "--device-memory"),
        (["generate", "x", "--vram=4GiB"], "--device-memory"),
        (["plan", "x", "--ram", "4GiB"], "--host-memory"),
        (["bench", "--cpu-memory", "4GiB"], "--host-memory"),
        (["generate", "x", "--n-predict", "5"], "--max-new-tokens"),
        (["generate", "x", "--max-length", "5"], "--max-new-tokens"),
        (["generate", "x", "--ctx-size", "5"], "--context"),
        (["generate", "x", "-c", "5"], "--context"),
        (["generate", "x", "-ngl", "5"], "--device-memory"),
        (["generate", "x", "--repeat-penalty", "1.1"], "--repetition-penalty"),
        (["convert", "a", "b", "--bits", "4"], "--quantize"),
        (["convert", "a", "b", "--force"], "--overwrite"),
        (["generate", "x", "--device_memory", "4GiB"], "--device-memory"),
    ],
)
def test_what_other_programs_call_an_option_offers_ours(words, meant, capsys):
    assert main(words) == 2
    assert f"(did you mean {meant}?)" in capsys.readouterr().err


def test_what_others_call_an_option_is_none_of_ours_and_means_one_that_is_there():
    known = {flag for parser in parsers() for flag in parser.known}
    others = [name for names in MEANT.values() for name in names.split()]
    assert known >= set(MEANT)
    assert known.isdisjoint(others)
    assert len(others) == len(set(others))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "x", "-n", "0.5"], "--max-new-tokens: found '0.5', expected a whole number"),
        (["generate", "x", "-nten"], "--max-new-tokens: found 'ten', expected a whole number"),
        (["generate", "x", "--seed", "1e3"], "--seed: found '1e3', expected a whole number"),
        (["generate", "x", "--top-p", "half"], "--top-p: found 'half', expected a number"),
        (["generate", "x", "--context", ""], "--context: found '', expected a whole number"),
        (["plan", "x", "--batch", "2.0"], "--batch: found '2.0', expected a whole number"),
        (["eval", "perplexity", "x", "--text", "t", "--window", "1k"], "--window: found '1k'"),
        (["generate", "x", "-n", "9" * 5000], "99', expected a whole number"),
        (["plan", "x", "--batch", "0"], "--batch: found 0, expected a number of lanes from 1"),
    ],
)
def test_what_is_no_number_is_refused_with_what_was_found(words, said, capsys):
    assert main(words) == 2
    line = capsys.readouterr().err
    assert said in line
    assert "invalid" not in line
    assert len(line) < 200
