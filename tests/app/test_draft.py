"""A draft model and guessed tokens on the command line, and in one call of Python."""

import json
import re
import shutil

import pytest

import jlayer
from jlayer.api import AutoModel
from jlayer.app.cli import main
from jlayer.errors import CheckpointError, UsageError
from tests.conftest import BUNDLED

PLAN = ["plan", "llama-3.1-8b-instruct"]
MODE = ["--speculate", "draft"]
GENERATE = ["generate", "/no/such", "-p", "x", "--device", "cpu"]


def refused(capsys, *words, code=2):
    assert main([*map(str, words)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def printed(capsys, *words, code=0):
    assert main([*map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def other(tmp_path):
    """The bundled model, with a tokenizer of other tokens."""
    folder = shutil.copytree(BUNDLED, tmp_path / "other")
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    names = {token_id: token for token, token_id in vocab.items()}
    vocab[names[900]], vocab[names[1000]] = 1000, 900
    raw["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--speculate", "lokup"], "speculate 'lokup' is not known: did you mean 'lookup'"),
        (["--draft-tokens", "0"], "draft_tokens: found 0, expected an integer from 1 to 511"),
        (["--draft-tokens", "x"], "--draft-tokens: found 'x', expected a whole number"),
        (["--speculate", "off", "--draft-tokens", "8"], "but speculate is 'off'"),
        (["--speculate", "draft"], "there is no draft model; give --draft REF"),
        (["--speculate", "off", "--draft", "d"], "draft: found d, but speculate is 'off'"),
        (["--speculate", "lookup", "--draft", "d"], "draft: found d, but speculate is 'lookup'"),
        (["--num-speculative-tokens", "5"], "did you mean --draft-tokens?"),
        (["--draft-model", "d"], "did you mean --draft?"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_looked_for(capsys, words, said):
    assert said in refused(capsys, *GENERATE, *words)


@pytest.mark.parametrize("words", [GENERATE, ["bench", "/no/such", "--device", "cpu"]])
def test_a_draft_model_that_is_not_there_is_said_by_its_path(capsys, words):
    line = refused(capsys, *words, "--draft", "/no/draft", code=3)
    assert "draft: /no/draft: no such file or folder, and no hub id" in line


def test_a_name_that_only_a_plan_knows_is_told_from_one_that_nobody_does(capsys):
    line = refused(capsys, *GENERATE, "--draft", "llama-3.2-1b-instruct", code=3)
    start = "jlayer: draft: llama-3.2-1b-instruct: no such file or folder, and no hub id"
    assert line.startswith(start)
    assert line.endswith("knows the config of this name, for a plan, and has no weights of it")


def test_the_draft_model_reaches_the_opened_one(monkeypatch):
    found = []
    monkeypatch.setattr("jlayer.api.Model", lambda folder, run, watch: found.append((folder, run)))
    AutoModel.from_pretrained(BUNDLED, draft=BUNDLED)
    AutoModel.from_pretrained(BUNDLED)
    assert [(folder, run.draft) for folder, run in found] == [
        (str(BUNDLED), str(BUNDLED)),
        (str(BUNDLED), None),
    ]
    with pytest.raises(CheckpointError, match="/no/draft"):
        AutoModel.from_pretrained(BUNDLED, draft="/no/draft")


def test_the_options_reach_the_opened_model_and_its_run(monkeypatch, capsys):
    given = {}

    class Stop(Exception):
        pass

    def opened(ref, *, offline, **options):
        given.update(options)
        raise Stop

    monkeypatch.setattr("jlayer.app.together.opened", opened)
    with pytest.raises(Stop):
        main([*GENERATE, "--draft", "d", "--speculate", "draft", "--draft-tokens", "8"])
    assert given["draft"] == "d"


def test_python_refuses_the_same_in_one_call():
    with pytest.raises(UsageError, match="open the model with draft=FOLDER"):
        jlayer.generate("/no/such", "x", speculate="draft")
    with pytest.raises(UsageError, match="draft: found d, but speculate is 'off'"):
        jlayer.generate("/no/such", "x", speculate="off", draft="d")
    with pytest.raises(UsageError, match="but speculate is 'off'"):
        jlayer.generate("/no/such", "x", speculate="off", draft_tokens=3)


def test_an_opened_model_without_a_draft_refuses_to_use_one():
    with AutoModel.from_pretrained(BUNDLED, device="cpu") as model:
        for run in (model.generate, model.submit):
            with pytest.raises(UsageError, match="open the model with draft=FOLDER"):
                run([[5]] if run == model.generate else [5], speculate="draft")
        plain = jlayer.generate(model, "Once upon", max_new_tokens=3)
        found = jlayer.generate(model, "Once upon", max_new_tokens=3, speculate="off")
        assert found.token_ids == plain.token_ids


@pytest.mark.usefixtures("all_shapes")
def test_a_plan_shows_the_share_of_a_draft_model(capsys, monkeypatch):
    draft = ["--draft", "llama-3.2-1b-instruct"]
    alone, both = printed(capsys, *PLAN), printed(capsys, *PLAN, *draft)
    assert alone["device"]["draft_bytes"] == 0
    assert 1.24e9 < both["device"]["draft_bytes"] < 2.2e9
    assert both["smallest_device_memory_bytes"] > 1.24e9 + alone["smallest_device_memory_bytes"]
    assert both["lanes"]["most"] < alone["lanes"]["most"]
    assert main([*PLAN, *draft]) == 0
    assert "\n  draft " in capsys.readouterr().out
    small = printed(capsys, *PLAN, *draft, "--device-memory", "1536MiB", code=4)
    assert "or take a smaller draft model, or none" in small["error"]
    assert small["fits"] is False


def test_a_plan_takes_a_draft_as_a_folder_or_a_config(capsys, fable):
    words = ["plan", BUNDLED, "--device", "cpu", "--draft"]
    config, published, layered = (
        printed(capsys, *words, draft)["device"]["draft_bytes"]
        for draft in (BUNDLED / "config.json", BUNDLED, fable)
    )
    assert config == published == layered > 6e6


def test_a_quantized_draft_counts_as_it_is(capsys, tmp_path):
    assert main(["convert", str(BUNDLED), str(tmp_path / "int4"), "--quantize", "int4"]) == 0
    capsys.readouterr()
    words = ["plan", BUNDLED, "--draft"]
    plain, small = (
        printed(capsys, *words, draft)["device"]["draft_bytes"]
        for draft in (BUNDLED, tmp_path / "int4")
    )
    assert small != plain  # fewer bytes of weights, and decoded copies of them


def test_a_plan_refuses_a_draft_that_speaks_other_tokens(capsys, other):
    line = refused(capsys, "plan", BUNDLED, "--draft", other)
    assert f"draft: {other} has other tokens than {BUNDLED}: token 900 is " in line


def told(capsys, *words):
    """The lines on stderr of a run of the bundled model that drafts for itself."""
    run = ["generate", BUNDLED, "-p", "Once upon a time", "--device", "cpu", "--temperature", "0"]
    assert main([*map(str, [*run, *words])]) == 0
    return [line.removeprefix("jlayer: ") for line in capsys.readouterr().err.splitlines()]


def test_a_plan_of_configs_tells_of_another_vocabulary(capsys):
    """Tokens themselves are compared where both are folders."""
    assert main([*PLAN, "--draft", "llama-2-7b-hf", "--device-memory", "24GiB"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "draft: llama-2-7b-hf has a vocabulary of 32000, and llama-3.1-8b-instruct" in line
    assert main([*PLAN, "--draft", "llama-3.2-1b-instruct"]) == 0
    assert capsys.readouterr().err == ""


def test_the_first_line_names_the_draft_its_bytes_and_what_guesses(capsys):
    draft = ["--draft", BUNDLED, "--draft-tokens", "4"]
    first, last = told(capsys, "-n", "6", *draft)
    assert re.search(
        r"of 4\.00 GiB, [\d.]+ MiB of it for the draft fable-3m; "
        "the draft and lookup may guess 4 tokens a forward pass$",
        first,
    )
    assert " tokens a forward pass (" in last
    assert ", one with its guesses " in last
    assert re.search(r"; the draft may guess 4 ", told(capsys, "-n", "6", *draft, *MODE)[0])
    lookup = ["--speculate", "lookup", "--draft-tokens", "3"]
    first = told(capsys, "-n", "6", *lookup)[0]
    assert re.search(r"of 4\.00 GiB; lookup may guess 3 tokens a forward pass$", first)
    for plain in ([], ["--speculate", "off"]):  # a short run is not worth it
        first, last = told(capsys, "-n", "3", *plain)
        assert "guess" not in first
        assert "one of a token" in last


@pytest.mark.slow
def test_guesses_that_there_is_no_room_for_are_told_with_what_is_missing(capsys):
    draft = ["-n", "120", "--draft", BUNDLED]
    words = ["generate", BUNDLED, "-p", "x", "--device", "cpu", "--device-memory", "1MiB", *draft]
    least = re.search(r"give at least (\d+MiB)", refused(capsys, *words, code=4))[1]
    asked = [*draft, "--device-memory", least, "--draft-tokens", "100"]
    first, note, _ = told(capsys, *asked)
    few = int(re.search(r"may guess (\d+) tokens?", first)[1])
    assert few < 100
    assert note.startswith(f"draft_tokens: {few} guesses a forward pass instead of 100; device_me")
    enough = re.search(rf"device_memory: {least[:-3]}\.00 MiB given.*give at least (\d+MiB)", note)[
        1
    ]
    first, _ = told(capsys, *draft, "--device-memory", enough, "--draft-tokens", "100")
    assert "may guess 100 tokens" in first


@pytest.mark.parametrize(("mode", "then"), [("auto", "come from the text alone"), ("draft", "end")])
def test_a_draft_with_a_shorter_context_is_told(tmp_path, capsys, mode, then):
    short = shutil.copytree(BUNDLED, tmp_path / "short")
    raw = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 20}))
    words = ["--draft", short, "--draft-tokens", "2", "--speculate", mode]
    note = f"draft: {short} has a context of 20 tokens, the run of up to {{}}: guesses {then} after"
    n_prompt = 6
    assert note.format(n_prompt + 20) + " 20" in told(capsys, "-n", "20", *words)
    assert len(told(capsys, "-n", "14", *words)) == 2


def test_more_figures_are_shown_where_they_are_asked_for(fable, capsys):
    words = ["generate", str(fable), "Once", "-n", "12", "--device", "cpu", "--draft", str(fable)]
    guesses = ["--draft-tokens", "7", "--temperature", "0"]
    assert main([*words, *guesses, "-v"]) == 0
    lines = capsys.readouterr().err.splitlines()
    device = r"jlayer: device: at most .* of 4.00 GiB \(accounted\)"
    assert any(re.fullmatch(device, line) for line in lines)
    (line,) = [line for line in lines if "guesses: " in line]
    assert re.search(r"accepted by depth: \d+(, \d+)*; s \d\.\d\d$", line)
