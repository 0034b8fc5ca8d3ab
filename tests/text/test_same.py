"""Which models speak the same tokens: only such may guess for one another."""

import json
import re
import shutil
import time

import pytest

from jlayer.errors import CheckpointError, UsageError
from jlayer.text.same import check_same_tokens
from tests.conftest import BUNDLED
from tests.text.samples import COMPANIONS, folder_of

V = 4096


def check(folder, draft, size=V, draft_size=V):
    check_same_tokens(folder, draft, vocab_size=size, draft_vocab_size=draft_size)


def problem(folder, draft, *sizes):
    with pytest.raises(UsageError) as refused:
        check(folder, draft, *sizes)
    line = str(refused.value)
    assert f"draft: {draft} has other tokens than {folder}: " in line
    assert "\n" not in line
    return line


@pytest.fixture
def changed(tmp_path):
    """A copy of the bundled tokenizer with something changed in its file."""

    def made(change, name="other"):
        folder = tmp_path / name
        folder.mkdir()
        for path in BUNDLED.glob("tokenizer*"):
            shutil.copy(path, folder)
        raw = json.loads((folder / "tokenizer.json").read_text())
        change(raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        return folder

    return made


def added(text, token_id):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, "special": True, **flags}


def nothing(raw):
    pass


def test_a_copy_speaks_the_same_tokens(changed):
    check(BUNDLED, changed(nothing))


def test_how_text_is_split_does_not_matter(changed):
    def change(raw):
        raw["model"]["merges"] = []
        raw["post_processor"] = None

    check(BUNDLED, changed(change))


def test_the_first_token_that_differs_is_named(changed):
    def change(raw):
        vocab = raw["model"]["vocab"]
        names = {token_id: token for token, token_id in vocab.items()}
        vocab[names[1234]], vocab[names[900]] = 900, 1234
        raw["model"]["merges"] = []

    other = changed(change)
    vocab = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]["vocab"]
    names = {token_id: token for token, token_id in vocab.items()}
    line = problem(BUNDLED, other)
    assert f"token 900 is {names[1234]!r}, expected {names[900]!r}; give a draft model" in line


def test_an_added_token_counts(changed):
    more = changed(lambda raw: raw["added_tokens"].append(added("<more>", V)))
    assert f"token {V} is '<more>', expected none" in problem(BUNDLED, more, V + 1, V + 1)
    assert f"token {V} is none, expected '<more>'" in problem(more, BUNDLED, V + 1, V + 1)


def test_a_padded_vocabulary_is_the_same(changed):
    check(BUNDLED, changed(nothing), V, V + 64)
    check(BUNDLED, changed(nothing, "b"), V + 64, V)


def test_a_draft_has_a_row_for_every_token(changed):
    other = changed(nothing)
    line = problem(BUNDLED, other, V, V - 1)
    assert f"its vocabulary has {V - 1} tokens, expected at least {V}" in line
    check(BUNDLED, other, V - 1, V - 1)  # what the model itself cannot draw


def test_without_a_tokenizer_the_vocabularies_must_have_one_size(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    check(one, two)
    assert f"its vocabulary has 7 tokens, expected {V}" in problem(one, two, V, 7)


def test_a_tokenizer_on_one_side_alone_is_refused(tmp_path):
    assert "it has no tokenizer, and the model has one" in problem(BUNDLED, tmp_path)
    assert "the model has no tokenizer, and it has one" in problem(tmp_path, BUNDLED)


def test_a_damaged_tokenizer_is_said_by_its_file(changed, tmp_path):
    other = changed(nothing)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(str(other / "tokenizer.json"))):
        check(BUNDLED, other)


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral-v1"])
def test_both_forms_of_a_tokenizer_are_the_same(tmp_path, name):
    folder, other = folder_of(name), tmp_path / "other"
    other.mkdir()
    for file in (*COMPANIONS, "tokenizer.model"):
        if (folder / file).exists():
            shutil.copy(folder / file, other)
    check(folder, other, 128256, 128256)
    check(other, folder, 128256, 128256)


def test_tokenizers_of_other_models_differ():
    llama2, mistral = folder_of("llama2"), folder_of("mistral-v1")
    assert re.search(r"token \d+ is '.+', expected '.+'", problem(llama2, mistral, 32000, 32000))
    check(folder_of("fable-1m"), folder_of("fable-3m"))


def test_a_large_vocabulary_takes_few_seconds():
    began = time.process_time()
    check(folder_of("llama3"), folder_of("llama3"), 128256, 128256)
    assert time.process_time() - began < 10
