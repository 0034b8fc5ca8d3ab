"""tokenizer.model as bytes: what is read, and what is refused."""

import base64
import json
import struct

import pytest

from jlayer.errors import CheckpointError
from jlayer.tokenizer_files import (
    LLAMA3_BEGIN,
    LLAMA3_ENDS,
    LLAMA3_SPECIAL_TOKENS,
    PieceKind,
    count_ranks,
    is_tiktoken,
    read_sentencepiece,
    read_tiktoken,
)
from tests.conftest import SHARED_DATA, needs_shared_data

NEITHER = r"file: neither a SentencePiece model nor tiktoken ranks; fetch it again"


def field(number, value):
    """A field of a protobuf message; numbers below 128 and bytes shorter than that are enough."""
    wire_type = 0 if isinstance(value, int) else 2
    key = number << 3 | wire_type
    head = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
    return head + (bytes([value]) if isinstance(value, int) else bytes([len(value)]) + value)


def piece(text, *, score=None, kind=None):
    raw = field(1, text.encode())
    if score is not None:
        raw += bytes([2 << 3 | 5]) + struct.pack("<f", score)
    return field(1, raw + (b"" if kind is None else field(3, kind)))


TRAINER = field(2, field(3, 2) + field(35, 1) + field(41, 5) + field(42, 7) + field(4, 100))


def test_a_sentencepiece_model_is_read_by_name():
    raw = piece("<unk>", kind=2) + piece("▁a", score=-1.5) + TRAINER + field(3, field(3, 0))
    found = read_sentencepiece(raw, where="file")
    assert [(each.text, each.score, each.kind) for each in found.pieces] == [
        ("<unk>", 0, PieceKind.UNKNOWN),
        ("▁a", -1.5, PieceKind.NORMAL),
    ]
    assert (found.model_type, found.byte_fallback, found.bos_id, found.eos_id) == (2, 1, 5, 7)
    assert (found.add_dummy_prefix, found.escape_whitespaces) == (0, 1)


def test_settings_that_are_not_written_have_the_defaults_of_the_proto_file():
    found = read_sentencepiece(piece("a") + field(2, b""), where="file")
    assert (found.model_type, found.byte_fallback, found.bos_id, found.eos_id) == (1, 0, 1, 2)
    assert (found.add_dummy_prefix, found.remove_extra_whitespaces) == (1, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html>no</html>",
        TRAINER,  # no pieces
        piece("a"),  # no settings
        piece("a") + TRAINER[:-1],
        piece("a") + field(2, field(41, b"5")),  # an id that is text
        piece("a") + TRAINER + field(3, field(2, 1)),  # a table that is a number
        field(1, field(1, b"\xff")) + TRAINER,
        field(1, field(3, 1)) + TRAINER,  # a piece without text
        field(1, 5) + TRAINER,
        field(2, 5) + piece("a"),
    ],
)
def test_what_is_no_sentencepiece_model(raw):
    with pytest.raises(CheckpointError, match=NEITHER):
        read_sentencepiece(raw, where="file")


def tiktoken_file(n_ranks):
    return b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(n_ranks))


def test_tiktoken_ranks():
    raw = tiktoken_file(256) + base64.b64encode(b"ab") + b" 256"
    assert is_tiktoken(raw)
    assert not is_tiktoken(piece("a") + TRAINER)
    assert count_ranks(raw) == count_ranks(raw + b"\n") == 257
    found = read_tiktoken(raw, where="file")
    assert (len(found), found[b"a"], found[b"ab"]) == (257, 97, 256)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (tiktoken_file(255), "not all 256 bytes"),
        (tiktoken_file(256) + b"IQ== 256\n", "missing or doubled"),
        (tiktoken_file(256) + b"YWI= 258\n", "missing or doubled"),
        (tiktoken_file(3) + b"!! 3\n", "line 4 is not base64"),
        (tiktoken_file(3) + b"YWI=\n", "line 4 is not base64"),
    ],
)
def test_damaged_ranks_are_refused(raw, words):
    with pytest.raises(CheckpointError, match=f"file: .*{words}.*fetch it again"):
        read_tiktoken(raw, where="file")


@needs_shared_data
def test_the_special_tokens_of_llama3_are_the_published_ones():
    raw = json.loads((SHARED_DATA / "tokenizers" / "llama3" / "tokenizer.json").read_text())
    published = {row["content"]: row["id"] for row in raw["added_tokens"]}
    assert {token: 128000 + n for n, token in enumerate(LLAMA3_SPECIAL_TOKENS)} == published
    assert [published[token] for token in (LLAMA3_BEGIN, *LLAMA3_ENDS)] == [
        *(128000, 128001, 128008, 128009)
    ]
