"""The forms in which makers publish tokenizers, against the installed transformers."""

import json

import pytest

from tests.sources import assert_fifty_are_published
from tests.text.published import FORMS
from tests.text.reference import (
    TEXTS,
    differences,
    n_tokens,
    ours,
    theirs,
    token,
    vocabulary,
    write,
)

pytestmark = pytest.mark.reference
MESSAGES = [
    {"role": "user", "content": " the cat sat "},
    {"role": "assistant", "content": "on the mat."},
    {"role": "user", "content": "a king?"},
]


def files_of(form):
    """The form's files, with the ids of a small vocabulary."""
    first = n_tokens(form.vocabulary)
    files = dict(vocabulary(form.vocabulary))
    if form.in_json:
        raw = json.loads(files["tokenizer.json"])
        rows = [token(each) if isinstance(each, str) else each for each in form.in_json]
        raw["added_tokens"] += [{"id": first + n, **row} for n, row in enumerate(rows)]
        files["tokenizer.json"] = json.dumps(raw).encode()
    if form.config is not None:
        files["tokenizer_config.json"] = dict(form.config)
    if form.base is not None:
        rows = {**form.base, **{first + n: row for n, row in enumerate(form.added)}}
        files["tokenizer_config.json"]["added_tokens_decoder"] = rows
    for name, content in form.files.items():
        if name == "added_tokens.json":
            content = {text: first + n for n, text in enumerate(content.split())}
        files[name] = content
    return files


@pytest.fixture(autouse=True)
def no_cache_of_tiktoken(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


def follows_sentencepiece(form, kind, text):
    """The one difference that a published form has: see `first_space` in test_files_and_flags."""
    cls = (form.config or {}).get("tokenizer_class")
    is_of_pieces = form.vocabulary in ("json", "json and model", "bpe")
    is_class = cls in ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")
    return kind in ("ids", "text") and text[:1] in (" ", "▁") and is_of_pieces and is_class


def test_fifty_are_published_and_each_says_where():
    assert len({form.family for form in FORMS}) == len(FORMS)
    assert_fifty_are_published([form.source for form in FORMS])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.family)
def test_a_published_form_gives_the_ids_of_transformers(tmp_path, form):
    folder = write(tmp_path, files_of(form))
    one, other = ours(folder), theirs(folder)
    if form.fails_there:
        assert isinstance(other, Exception)
        assert one.encode("a king")
        return
    assert not isinstance(other, Exception), other
    found = differences(one, other)
    assert [each for each in found if not follows_sentencepiece(form, *each[:2])] == []
    assert any(one.encode(text) for text in TEXTS)
    chosen = other.chat_template
    if chosen is None:
        assert one.chat_templates == {}
        return
    assert one.chat_templates == (chosen if isinstance(chosen, dict) else {"default": chosen})
    asked = {"add_generation_prompt": True, "return_dict": False}
    expected = other.apply_chat_template(MESSAGES, tokenize=False, **asked)
    assert one.render_chat(MESSAGES) == expected
    assert one.encode_chat(MESSAGES) == other.apply_chat_template(MESSAGES, **asked)
