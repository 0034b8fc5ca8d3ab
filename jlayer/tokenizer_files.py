"""Parses tokenizer.model in its two published forms, without building a tokenizer.

SentencePiece's form is a protobuf message (sentencepiece_model.proto). tiktoken's form is text:
each line has a token in base64 and its rank, which is its id. Only Llama 3 publishes the second
form; its code names the special tokens that follow the ranks.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from jlayer.errors import CheckpointError
from jlayer.protobuf import encode_field, protobuf_fields

UNREADABLE = "{where}: neither a SentencePiece model nor tiktoken ranks; fetch it again"

LLAMA3_RANKS = 128_000
# Special tokens of Llama 3, in the order of their ids, which start after the last rank.
LLAMA3_BEGIN = "<|begin_of_text|>"
# The end of a text, of a message (<|eom_id|> since Llama 3.1) and of a turn.
LLAMA3_ENDS = ("<|end_of_text|>", "<|reserved_special_token_4|>", "<|eot_id|>")
LLAMA3_SPECIAL_TOKENS = (
    LLAMA3_BEGIN,
    LLAMA3_ENDS[0],
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    *LLAMA3_ENDS[1:],
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
)


class PieceKind(IntEnum):
    """The kind of a SentencePiece piece. Unused and byte pieces need no special treatment."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int  # a PieceKind, or the number of another kind


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces in the order of their ids, and the settings.

    Settings have their names and defaults from the proto file. An id of -1 (no such token) is read
    as a huge number.
    """

    pieces: tuple[Piece, ...]
    model_type: int = 1
    treat_whitespace_as_suffix: int = 0
    byte_fallback: int = 0
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: bytes = b"<unk>"
    bos_piece: bytes = b"<s>"
    eos_piece: bytes = b"</s>"
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: int = 1
    remove_extra_whitespaces: int = 1
    escape_whitespaces: int = 1


# Field numbers of ModelProto, then of the two messages with settings.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_SETTINGS = {
    _TRAINER: {
        3: "model_type",
        24: "treat_whitespace_as_suffix",
        35: "byte_fallback",
        40: "unk_id",
        41: "bos_id",
        42: "eos_id",
        45: "unk_piece",
        46: "bos_piece",
        47: "eos_piece",
    },
    _NORMALIZER: {
        2: "precompiled_charsmap",
        3: "add_dummy_prefix",
        4: "remove_extra_whitespaces",
        5: "escape_whitespaces",
    },
}


def read_sentencepiece(raw: bytes, *, where: str) -> SentencePieceModel:
    """Raises CheckpointError where `raw` is not such a message, or has no pieces or settings."""
    pieces, settings = [], {}
    try:
        for number, value in protobuf_fields(raw):
            if number == _PIECES:
                pieces.append(_piece(value))
            elif number in _SETTINGS:
                settings[number] = _settings(value, _SETTINGS[number])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces or _TRAINER not in settings:
        raise CheckpointError(UNREADABLE.format(where=where))
    return SentencePieceModel(tuple(pieces), **settings[_TRAINER], **settings.get(_NORMALIZER, {}))


def encode_sentencepiece(model: SentencePieceModel) -> bytes:
    """The inverse of `read_sentencepiece`. An id of -1 is left at that of the message."""
    parts = [encode_field(_PIECES, _encoded_piece(piece)) for piece in model.pieces]
    for message, names in _SETTINGS.items():
        values = ((number, getattr(model, name)) for number, name in names.items())
        body = b"".join(encode_field(number, value) for number, value in values)
        parts.append(encode_field(message, body))
    return b"".join(parts)


def _encoded_piece(piece):
    fields = ((1, piece.text.encode()), (2, float(piece.score)), (3, int(piece.kind)))
    return b"".join(encode_field(number, value) for number, value in fields)


def _piece(raw):
    fields = dict(protobuf_fields(raw))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, fields.get(3, PieceKind.NORMAL))


def _settings(raw, names: Mapping[int, str]):
    settings = {}
    for number, value in protobuf_fields(raw):
        name = names.get(number)
        if name is None:
            continue
        if type(value) is not type(getattr(SentencePieceModel, name)):
            raise ValueError(f"{name} is a {type(value).__name__}")
        settings[name] = value
    return settings


def is_tiktoken(raw: bytes) -> bool:
    """Whether the first line has a token in base64 and a rank."""
    return re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\s", raw) is not None


def count_ranks(raw: bytes) -> int:
    """The number of lines of a tiktoken file, which is the id of the first special token."""
    return raw.count(b"\n") + (not raw.endswith(b"\n"))


def read_tiktoken(raw: bytes, *, where: str) -> dict[bytes, int]:
    """The ranks of a tiktoken file, by token.

    Raises CheckpointError: a malformed line; a missing rank; one of the 256 bytes is no token.
    """
    ranks = {}
    try:
        for line in raw.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise CheckpointError(
            f"{where}: line {len(ranks) + 1} is not base64 and a rank; fetch it again"
        ) from None
    if sorted(ranks.values()) != list(range(count_ranks(raw))):
        raise CheckpointError(f"{where}: ranks or tokens are missing or doubled; fetch it again")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise CheckpointError(f"{where}: not all 256 bytes are tokens; fetch it again")
    return ranks
