"""Tokens as the wire shows them: exact bytes and text, and log-probabilities in both of OpenAI's
forms.

A token may hold a part of a character only; its bytes are exact, and its text says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jlayer.engine.sample import Choice
from jlayer.text.bpe import BYTE_OF
from jlayer.text.stream import TextStream
from jlayer.text.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which is no JSON
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BEFORE = "a"  # any token before another


class TokenTexts:
    """The bytes of each token. `tokenizer`: None where the model has none, and ids stand for
    text."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        if tokenizer is not None:
            decoder = tokenizer.library.decoder
            kinds = set() if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))
            self._is_byte_level = "ByteLevel" in kinds
            self._has_byte_tokens = "ByteFallback" in kinds
            self._special = set(tokenizer.special_tokens.values())

    def bytes_of(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._bytes_of(token_id)
        return found

    def _bytes_of(self, token_id):
        if self._tokenizer is None:
            return str(token_id).encode()
        library = self._tokenizer.library
        token = library.id_to_token(token_id)
        if token is None:  # a row of the head that no token has
            return b""
        if token_id in self._special:
            return token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte:
            return bytes([int(byte[1], 16)])
        if self._is_byte_level:
            if all(character in BYTE_OF for character in token):
                return bytes(BYTE_OF[character] for character in token)
            return token.encode()
        if library.decoder is None:
            return token.encode()
        decode = library.decoder.decode
        return decode([_BEFORE, token])[len(decode([_BEFORE])) :].encode()

    def text_of(self, token_id: int) -> str:
        """Bytes that are no whole characters are written as escapes."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in raw)

    def key_of(self, token_id: int) -> str:
        """The text in the older form, where OpenAI marks bytes by a prefix."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{self.text_of(token_id)}"


def _kinds(spec) -> Iterable[str]:
    if spec.get("type") == "Sequence":
        for step in spec["decoders"]:
            yield from _kinds(step)
    else:
        yield spec.get("type")


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(LEAST, logprob)


def chat_entry(texts: TokenTexts, choice: Choice, n_top: int) -> dict:
    """A token in the form of /v1/chat/completions."""
    return {
        **_chat_token(texts, choice.token_id, choice.logprob),
        "top_logprobs": [_chat_token(texts, *pair) for pair in choice.top[:n_top]],
    }


def _chat_token(texts, token_id, logprob):
    return {
        "token": texts.text_of(token_id),
        "logprob": finite(logprob),
        "bytes": list(texts.bytes_of(token_id)),
    }


@dataclass
class Legacy:
    """Log-probabilities in the form of /v1/completions, as lm-eval reads it: lists that go with the
    tokens, of which the first one of a prompt has none.

    A token was the likeliest if and only if its number is the largest of its `top_logprobs`: both
    are the same float. Tokens with one text share an entry there, which keeps the larger number.
    """

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, texts: TokenTexts, choice: Choice, *, n_top: int, offset: int) -> None:
        self.tokens.append(texts.key_of(choice.token_id))
        self.token_logprobs.append(finite(choice.logprob))
        self.top_logprobs.append(_top(texts, choice, n_top))
        self.text_offset.append(offset)

    def as_dict(self) -> dict:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


def _top(texts, choice, n_top):
    if choice.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in (*choice.top[:n_top], (choice.token_id, choice.logprob)):
        key = texts.key_of(token_id)
        found[key] = max(found.get(key, LEAST), finite(logprob))
    return found


def as_choice(row: dict | None, token_id: int) -> Choice:
    """A token of the prompt; the first one has no log-probability."""
    if row is None:
        return Choice(token_id)
    return Choice(token_id, row["logprob"], tuple((int(t), float(p)) for t, p in row["top"]))


def offsets(tokenizer: Tokenizer | None, ids: Sequence[int], *, start: int = 0) -> list[int]:
    """Where in a text the text of each token begins."""
    if tokenizer is None:
        return [start] * len(ids)
    stream, found = TextStream(tokenizer), []
    for token in ids:
        found.append(start)
        start += len(stream.step(token))
    return found
