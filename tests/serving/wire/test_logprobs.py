"""Tokens on the wire: their bytes add up to the text's, and log-probabilities as lm-eval reads
them."""

import random

import pytest

from jlayer.engine.sample import Choice
from jlayer.serving.wire.logprobs import Legacy, TokenTexts, chat_entry, offsets
from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED, SHARED_DATA

TEXT = "Once upon a time 🙂 there—was ǅ a  king,\n\tand naïve 象 said: “No…”"
PUBLISHED = sorted((SHARED_DATA / "tokenizers").glob("*/tokenizer.json"))
FOLDERS = [BUNDLED, *dict.fromkeys(file.parent for file in PUBLISHED)]


@pytest.fixture(scope="module")
def texts():
    return TokenTexts(Tokenizer.from_folder(BUNDLED))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_bytes_of_tokens_add_up_to_the_text(folder):
    tokenizer = Tokenizer.from_folder(folder)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == TEXT, "these tokenizers keep text as it is"
    found = b"".join(map(texts.bytes_of, ids)).decode()
    assert found.removeprefix(" ") == TEXT  # SentencePiece puts a space before the first word


def test_parts_of_characters_are_exact(texts):
    tokenizer = Tokenizer.from_folder(BUNDLED)
    parts = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(parts) > 1, "the character is more than one token"
    assert [texts.text_of(token) for token in parts] != [texts.key_of(token) for token in parts]
    assert all(texts.key_of(token).startswith("bytes:\\x") for token in parts)
    assert b"".join(map(texts.bytes_of, parts)) == "🙂".encode()
    entry = chat_entry(texts, Choice(parts[0], -1.0, ((parts[0], -1.0),)), 1)
    assert bytes(entry["bytes"]) == texts.bytes_of(parts[0])
    assert entry["top_logprobs"] == [{k: entry[k] for k in ("token", "logprob", "bytes")}]


def test_every_id_has_a_text(texts):
    assert all(isinstance(texts.key_of(token), str) for token in range(4096 + 10))
    assert TokenTexts(None).text_of(5) == "5"


def test_the_likeliest_is_told_by_equal_numbers(texts):
    """lm-eval takes a token for the greedy one where both are the same float."""
    random.seed(0)
    for _ in range(200):
        top = sorted((-random.random() * 9 for _ in range(3)), reverse=True)
        ids = random.sample(range(2, 4000), 3)
        chosen = random.randrange(3)
        legacy = Legacy()
        choice = Choice(ids[chosen], top[chosen], tuple(zip(ids, top, strict=True)))
        legacy.add(texts, choice, n_top=1, offset=0)
        best = max(legacy.top_logprobs[0].values())
        assert (legacy.token_logprobs[0] == best) == (chosen == 0)


def test_tokens_of_one_text_share_an_entry_that_keeps_the_larger_number():
    class Same(TokenTexts):
        def bytes_of(self, token_id):
            return b"x"

    legacy = Legacy()
    top = ((1, -0.5), (2, -1.5))
    legacy.add(Same(None), Choice(2, -1.5, top), n_top=2, offset=0)
    assert legacy.top_logprobs == [{"x": -0.5}]
    assert legacy.token_logprobs == [-1.5], "so it is not taken for the likeliest"


def test_minus_infinity_is_a_number_in_json(texts):
    legacy = Legacy()
    legacy.add(texts, Choice(5, -float("inf"), ((7, 0.0),)), n_top=1, offset=0)
    assert legacy.token_logprobs == [-9999.0]
    assert min(legacy.top_logprobs[0].values()) == -9999.0


def test_offsets_say_where_in_the_text_a_token_begins():
    tokenizer = Tokenizer.from_folder(BUNDLED)
    ids = tokenizer.encode(TEXT)
    found = offsets(tokenizer, ids)
    assert found[:2] == [0, 0], "the beginning token has no text"
    for token, start, end in zip(ids, found, [*found[1:], len(TEXT)], strict=True):
        whole = TokenTexts(tokenizer).bytes_of(token)
        if start != end and whole[:1] < b"\x80" and whole.isascii() and token:
            assert TEXT[start:end].encode() == whole
