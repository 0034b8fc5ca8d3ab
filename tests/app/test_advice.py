"""What a message advises can be done where it is read: flags on the command line, arguments in
Python."""

import ast
import json
import re
import shutil

import pytest

import jlayer
from jlayer.app.cli import main
from jlayer.errors import DoesNotFitError, UsageError
from tests.conftest import BUNDLED
from tests.test_house import MODULES

# What only a script can follow.
PYTHON = re.compile(r"\w=(True|False|None)\b|in Python|before starting Python|from_pretrained")
FOR_SCRIPTS = {
    "jlayer.engine.engine",  # a closed model: the command line closes its own at its end
    "jlayer.convert.sources.torchfile",  # a file that only torch can save anew
}


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice") / "model"
    shutil.copytree(BUNDLED, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


@pytest.fixture
def published(tmp_path):
    """The bundled model with something in its generation_config.json."""

    def made(**options):
        folder = shutil.copytree(BUNDLED, tmp_path / "model", dirs_exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps(options))
        return folder

    return made


def refused(capsys, *words):
    assert main(list(map(str, words))) in (2, 3, 4)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def generate(folder, *words):
    return ["generate", folder, "--device", "cpu", *words]


def test_several_texts_ask_for_a_flag_on_the_command_line(capsys):
    line = refused(capsys, *generate(BUNDLED, "-p", "x", "--num-return-sequences", "2"))
    assert "give --temperature above 0" in line
    assert "do_sample" not in line
    with pytest.raises(UsageError, match="set do_sample=True"):
        jlayer.generate(BUNDLED, "x", device="cpu", num_return_sequences=2)


def test_a_stop_without_a_tokenizer(without_tokenizer, capsys):
    line = refused(capsys, *generate(without_tokenizer, "--prompt-ids", "1", "--stop", "x"))
    assert "leave --stop out" in line
    assert not PYTHON.search(line)
    with pytest.raises(UsageError, match="stop=None"):
        jlayer.generate(without_tokenizer, [1], device="cpu", stop="x")


def test_a_model_without_a_chat_template(capsys):
    found = "this model has no chat template; use a plain prompt, or give a template "
    line = refused(capsys, *generate(BUNDLED, "-p", "x", "--chat"))
    assert line == f"jlayer: {found}in a file (--chat-template F)"
    with pytest.raises(UsageError) as caught:
        jlayer.generate(BUNDLED, messages=[{"role": "user", "content": "x"}], device="cpu")
    assert str(caught.value) == f"{found}(chat_template)"


def test_a_penalty_beyond_float32_names_its_flag(capsys):
    words = ["--repetition-penalty", "1e-40", "-n", "1"]
    assert main(list(map(str, generate(BUNDLED, "-p", "Once", *words)))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--repetition-penalty takes a score beyond float32" in line


def test_an_option_of_the_makers_that_is_not_supported(published, capsys, tmp_path):
    folder = published(suppress_tokens=[1])
    line = refused(capsys, *generate(folder, "-p", "x"))
    assert line.endswith("take it out of the file")
    with pytest.raises(
        jlayer.UnsupportedModelError, match="overrule it in Python with suppress_tokens="
    ):
        jlayer.generate(folder, "x", device="cpu")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "suppress_tokens" in line]
    assert "will refuse this" in note
    assert not PYTHON.search(note)


def test_a_choice_that_convert_cannot_make(capsys, tmp_path):
    words = ["convert", BUNDLED, tmp_path / "out", "--delete-source", "--yes"]
    for other in ("--allow-extra", "--follow-links"):
        assert f"--delete-source and {other}: " in refused(capsys, *words, other)


def test_no_message_asks_a_user_of_the_command_line_for_python():
    """Each that speaks Python has another for the command line, or a reason."""
    seen = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")):
                continue
            named = {word.arg for word in node.keywords}
            words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(PYTHON.search(str(word)) for word in words):
                seen.add(module)
                assert "command_line" in named or module in FOR_SCRIPTS, ast.unparse(node)
    assert len(seen) > 3


def test_an_error_that_says_nothing_apart_is_the_same_in_both():
    assert UsageError("a line").command_line == "a line"
    assert DoesNotFitError("a", {"b": 1}, command_line="c").command_line == "c"


def test_minus_one_new_token_is_told_what_other_programs_mean_by_it(capsys):
    line = refused(capsys, *generate("/no/such", "-p", "x", "-n", "-1"))
    assert "max_new_tokens: found -1, expected an integer from 0 up" in line
    assert "a text stops where the model ends it, so give the most that it may take" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "temperature: found -1.0"),
        (["--top-p", "3"], "top_p: found 3.0"),
        (["--seed", "-1"], "seed: found -1"),
        (["--num-return-sequences", "0"], "num_return_sequences: found 0"),
    ],
)
def test_options_are_checked_before_a_model_is_looked_for(words, said, capsys):
    assert said in refused(capsys, *generate("/no/such", "--prompt-file", "/none", *words))


def test_several_texts_of_a_model_that_is_named_are_drawn_with_a_temperature(fable):
    """Whether they are drawn was asked before the temperature and the makers had a say."""
    texts = jlayer.generate(
        fable, "Once", device="cpu", num_return_sequences=2, temperature=0.9, max_new_tokens=2
    )
    assert len(texts) == 2
