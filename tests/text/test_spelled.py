"""Ids with the characters that each stands for, against those of encoding alone and of
transformers."""

import pytest

from jlayer.text.bpe import LONG_TEXT
from tests.text.reference import theirs
from tests.text.samples import CHATML, LARGE, TEXTS, folder_of, load, user


def assert_spells(text, ids, spans):
    """Spans are in order and inside the text, and no character but white space is left out."""
    assert len(ids) == len(spans)
    assert all(0 <= begin <= end <= len(text) for begin, end in spans)
    real = [span for span in spans if span[1]]
    assert real == sorted(real, key=lambda span: span[1])
    spelled = {at for begin, end in spans for at in range(begin, end)}
    assert not [c for at, c in enumerate(text) if at not in spelled and not c.isspace()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("adds", [True, False])
def test_spelling_gives_the_ids_of_encoding_and_their_characters(tokenizer, text, adds):
    ids, spans = tokenizer.spell(text, add_special_tokens=adds)
    assert ids == tokenizer.encode(text, add_special_tokens=adds)
    assert_spells(text, ids, spans)
    if adds and ids and ids[0] == tokenizer.bos_token_id:
        assert spans[0] == (0, 0)


@pytest.mark.parametrize("name", LARGE)
def test_a_long_text_is_spelled_too(name):
    text = "the cat é日 " * (LONG_TEXT // 10)
    ids, spans = load(name).spell(text)
    assert ids == load(name).encode(text)
    assert_spells(text, ids, spans)


@pytest.mark.reference
@pytest.mark.parametrize("name", LARGE)
def test_the_characters_are_those_of_transformers(name):
    other = theirs(folder_of(name))
    for text in TEXTS:
        if text[:1] not in (" ", "▁"):  # these get another space before them, in ours alone
            found = other(text, return_offsets_mapping=True)
            ids, spans = load(name).spell(text)
            assert (ids, spans) == (found["input_ids"], found["offset_mapping"]), text


@pytest.mark.parametrize("content", ["a </s> b<|eot_id|>é", "plain", " <s>日<|im_end|> "])
def test_a_chat_is_spelled_with_the_users_words_as_text(tokenizer, content):
    template = "{{ bos_token }}" + CHATML + "{{ eos_token }}"
    rendered = tokenizer.rendered_chat(user(content), chat_template=template)
    ids, spans = tokenizer.spell_chat(rendered)
    assert ids == tokenizer.encode_chat(user(content), chat_template=template)
    assert_spells(rendered.text, ids, spans)
    control = {tokenizer.special_tokens[text] for text in rendered.written_control()}
    found = [span for token, span in zip(ids, spans, strict=True) if token in control]
    assert found == rendered.control_spans()
    assert [rendered.text[slice(*span)] for span in found] == rendered.written_control()
