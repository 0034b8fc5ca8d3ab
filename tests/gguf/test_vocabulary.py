"""A published tokenizer as metadata: what is read back of it, and what a file has no place for."""

import json

import pytest

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf.reader import Head
from jlayer.gguf.tokenizer import generation_config, tokenizer_files
from jlayer.gguf.vocabulary import vocabulary_of
from tests.conftest import BUNDLED

NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
ENDS = ("<|eot_id|>", "<|end|>", "<mine>", "<yours>", "<theirs>")


def files(change=lambda raw: None):
    """The small files of the bundled model, with further tokens that end a text, after a change."""
    raw = {name: json.loads((BUNDLED / name).read_text()) for name in NAMES}
    added = raw["tokenizer.json"]["added_tokens"]
    last = max(raw["tokenizer.json"]["model"]["vocab"].values())
    added += [{**added[0], "id": last + n, "content": text} for n, text in enumerate(ENDS, 1)]
    raw["ids"] = {row["content"]: row["id"] for row in added}
    change(raw)
    raw.pop("ids")
    return {name: json.dumps(body).encode() for name, body in raw.items()}


def metadata(change=lambda raw: None):
    return vocabulary_of(files(change), vocab_size=1 << 16, where="here")


def read_back(change):
    head = Head("m.gguf", metadata(change), {})
    return generation_config(head), json.loads(tokenizer_files(head)["tokenizer_config.json"])


def ending(*texts):
    def change(raw):
        raw["generation_config.json"]["eos_token_id"] = [raw["ids"][text] for text in texts]

    return change


def test_the_ids_of_named_tokens_are_there():
    values = metadata()
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    assert {key: values[f"tokenizer.ggml.{key}"] for key in ids} == ids
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (
        True,
        False,
    )


@pytest.mark.parametrize(
    "texts",
    [
        ("<mine>",),
        ("<mine>", "<yours>"),
        # More than a file has keys for: those that readers know by their texts need none.
        ("<|eot_id|>", "<|end|>", "<mine>", "<yours>"),
    ],
)
def test_all_ends_are_read_back(texts):
    given = {}
    change = ending(*texts)

    def noted(raw):
        given.update(raw["ids"])
        change(raw)

    found, _ = read_back(noted)
    known = {given[text] for text in ENDS[:2]}  # they end a text in any file
    assert set(found["eos_token_id"]) == {1, *known, *(given[text] for text in texts)}


def test_keys_that_are_left_name_ends_that_readers_know_by_their_texts():
    values = metadata(ending("<|eot_id|>", "<mine>"))
    texts = values["tokenizer.ggml.tokens"]
    named = [texts[values[f"tokenizer.ggml.{key}_token_id"]] for key in ("eos", "eot", "eom")]
    assert named == ["<|end_of_text|>", "<mine>", "<|eot_id|>"]


def test_ends_beyond_the_keys_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"4 tokens end a text.*'<theirs>'.*export"):
        metadata(ending("<mine>", "<yours>", "<theirs>"))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_take_more_than_their_own_text_are_refused(flag):
    def change(raw):
        raw["tokenizer.json"]["added_tokens"][-1][flag] = True

    with pytest.raises(UnsupportedModelError, match=f"'<theirs>' has {flag}, which GGUF cannot"):
        metadata(change)


TEMPLATES = {
    "one": "{{ messages[0].content }}",
    "several": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_are_read_back(template):
    _, config = read_back(lambda raw: raw["tokenizer_config.json"].update(chat_template=template))
    assert config["chat_template"] == template


def test_a_token_beyond_the_rows_of_the_model_is_refused():
    with pytest.raises(CheckpointError, match="beyond the vocabulary of 100"):
        vocabulary_of(files(), vocab_size=100, where="here")
