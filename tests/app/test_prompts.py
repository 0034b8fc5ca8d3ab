"""How a prompt comes in: as a word, an option, a file or stdin; and what of a file is no prompt."""

import json
import os
import subprocess
import sys

import pytest

from jlayer.app.cli import main
from tests.conftest import BUNDLED

transformers = pytest.importorskip("transformers")

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoTokenizer.from_pretrained(BUNDLED)


def shown(capsys, *words):
    assert main(["generate", str(BUNDLED), "--show-prompt", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def piped(raw, *words):
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", "generate", BUNDLED, "--show-prompt", "--json", *words],
        input=raw,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


# What is in the file, and what its writer meant.
FILES = [
    (b"Once upon a time\n", TEXT),
    (b"Once upon a time\r\n", TEXT),
    (b"\xef\xbb\xbfOnce upon a time\r\n", TEXT),
    (b"Once upon a time", TEXT),
    (b"Once upon a time\n\n", f"{TEXT}\n"),  # a blank line is meant
    (b"Once upon a time \n", f"{TEXT} "),
    (b"Once\nupon\n", "Once\nupon"),
    (b"\n", ""),
]


@pytest.mark.parametrize(("raw", "meant"), FILES)
def test_the_end_of_the_last_line_and_a_byte_order_mark_are_no_part_of_a_prompt(
    tmp_path, capsys, reference, raw, meant
):
    path = tmp_path / "prompt"
    path.write_bytes(raw)
    found = shown(capsys, "--prompt-file", str(path))
    assert found == {"prompt": meant, "prompt_ids": reference(meant)["input_ids"]}


@pytest.mark.parametrize("words", [[], ["-p", "-"], ["--prompt-file", "-"], ["-"]])
def test_stdin_is_read_as_a_file_is(words):
    assert piped(b"\xef\xbb\xbfOnce upon a time\r\n", *words)["prompt"] == TEXT


@pytest.mark.parametrize(
    "text",
    [
        "-Hello",
        "--Hello",
        "--",
        "-n5",
        "-1",
        "--a=b",
        "- a list",
        "-x\n",
        "\ufeffa",
        "a\n",
    ],
)
@pytest.mark.parametrize("option", ["-p", "--prompt"])
def test_a_prompt_on_the_command_line_is_taken_as_it_is(capsys, text, option):
    assert shown(capsys, option, text)["prompt"] == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    "words",
    [
        [TEXT],
        ["-n", "3", TEXT],
        [TEXT, "-n", "3"],
        ["--stop", "--", TEXT],
        ["--", TEXT],
        ["--device", "cpu", TEXT, "--seed=1"],
    ],
)
def test_a_prompt_may_stand_after_the_model(capsys, words):
    assert shown(capsys, *words)["prompt"] == TEXT


def test_a_prompt_after_the_model_may_begin_with_a_dash(capsys):
    assert main(["generate", str(BUNDLED), "--show-prompt", "--", "--json"]) == 0
    assert capsys.readouterr().out == "--json\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "-p", "b"], "not allowed with"),
        (["a", "b"], "unrecognized arguments: b"),
        (["-p", "--json"], "write --prompt=--json"),
        (["-p", "--seed=3"], "write --prompt=--seed=3"),
        (["-p"], "expected one argument"),
        (["-p", "\udcff"], "--prompt: not UTF-8 at byte 0"),
        (["--system", "\udcff", "a"], "--system: not UTF-8 at byte 0"),
    ],
)
def test_a_prompt_that_cannot_be_meant_is_refused(capsys, words, said):
    assert main(["generate", str(BUNDLED), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "form"), [("utf-16", "UTF-16"), ("utf-16-be", None), ("utf-32", "UTF-32")]
)
def test_a_file_in_another_encoding_says_which(tmp_path, capsys, encoding, form):
    path = tmp_path / "prompt"
    path.write_bytes("Übung".encode(encoding))
    assert main(["generate", str(BUNDLED), "--prompt-file", str(path)]) == 2
    said = f"begins with a {form} byte-order mark" if form else "not UTF-8 at byte"
    assert said in capsys.readouterr().err


def test_bytes_of_another_locale_are_read_as_utf8():
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", "generate", BUNDLED, "--show-prompt", "--json", "-p", "é"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["prompt"] == "é"


def test_a_text_to_evaluate_keeps_its_last_newline_and_not_its_mark(tmp_path, capsys, reference):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfOnce upon a time\n")
    words = ["eval", "perplexity", str(BUNDLED), "--text", str(path), "--device", "cpu", "--json"]
    assert main(words) == 0
    n_tokens = len(reference(f"{TEXT}\n")["input_ids"])
    assert json.loads(capsys.readouterr().out)["n_predicted"] == n_tokens - 1


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def test_a_chat_template_may_be_given_as_a_file(tmp_path, capsys, reference):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    found = shown(capsys, "--chat-template", str(path), "--system", "Be brief.", "-p", "Hi")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = {"chat_template": TEMPLATE, "tokenize": False}
    assert found["prompt"] == reference.apply_chat_template(messages, **options)
    path.write_text("no template")
    assert main(["generate", str(BUNDLED), "--chat-template", str(path), "-p", "Hi"]) == 2
    assert "holds no template" in capsys.readouterr().err


def test_max_tokens_is_another_name_of_max_new_tokens(fable, capsys):
    words = ["generate", str(fable), TEXT, "--max-tokens", "3", "--device", "cpu", "--json"]
    assert main(words) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 3


def test_logprobs_without_json_are_refused_rather_than_dropped(capsys):
    assert main(["generate", str(BUNDLED), TEXT, "--logprobs", "2"]) == 2
    assert "add --json" in capsys.readouterr().err
