"""Tokens → text, one token at a time, for decoders of the `tokenizers` library of every shape.

A decoder is a list of steps. Each takes the tokens of the step before and gives tokens. After Fuse
and ByteLevel there is one token alone, the text, which arrives in pieces; the steps after that work
on the pieces. A step holds back only what later tokens can still change.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable

from jlayer.text.bpe import BYTE_OF

# What clean_up_tokenization_spaces replaces, one after the other (transformers).
_CLEANED = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {word}", word) for word in ("n't", "'m", "'s", "'ve", "'re")),
)


def cleaned_up(text: str) -> str:
    """`text` without the spaces before English punctuation."""
    for word, content in _CLEANED:
        text = text.replace(word, content)
    return text


class Decoding:
    """What `push` gives for each token, then `finish`, is the decoder's text for all of them."""

    def __init__(self, decoder, *, continues: bool, cleans_up: bool = False):
        """`decoder`: of the library, or None. `continues`: other text stands before this one.
        `cleans_up`: the text goes through `cleaned_up`."""
        self._steps = _steps_of(decoder, continues=continues)
        if cleans_up:
            self._steps += [_TextReplaced(*pair) for pair in _CLEANED]

    def push(self, token: str) -> str:
        """The text that is certain with `token`."""
        return "".join(_through(self._steps, [token]))

    def finish(self) -> str:
        """What was held back."""
        found = []
        for at, step in enumerate(self._steps):
            found += _through(self._steps[at + 1 :], step.finish())
        return "".join(found)


def overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that is a beginning of `word`, but not all of it."""
    at = text.find(word[0], max(0, len(text) - len(word) + 1))
    while at >= 0 and not word.startswith(text[at:]):
        at = text.find(word[0], at + 1)
    return len(text) - at if at >= 0 else 0


def _through(steps, items):
    for step in steps:
        items = [found for item in items for found in step.push(item)]
    return items


def _steps_of(decoder, *, continues):
    if decoder is None:
        return [_FirstApart(" ".join, continues=continues)]
    specs, steps, is_text = _flat(json.loads(decoder.__getstate__())), [], False
    for at, spec in enumerate(specs):
        kind = spec["type"]
        if kind == "Fuse":
            is_text = True
            continue
        make = (_ON_TEXT if is_text else _ON_TOKENS).get(kind)
        step = make(spec, continues=continues, is_last=at + 1 == len(specs)) if make else None
        if step is None:  # it can look as far back or ahead as it likes
            return [*steps, _Held(_library_decoder(specs[at:]), is_text=is_text)]
        steps.append(step)
        is_text = is_text or kind == "ByteLevel"
    return steps


def _flat(spec):
    if spec["type"] == "Sequence":
        return [flat for step in spec["decoders"] for flat in _flat(step)]
    return [spec]


def _library_decoder(specs) -> Callable[[list[str]], str]:
    """The library's own decoder of some steps: tokens → text."""
    from tokenizers import Tokenizer as Library

    model = {"type": "BPE", "vocab": {}, "merges": []}
    spec = {"type": "Sequence", "decoders": specs}
    return Library.from_str(
        json.dumps({"version": "1.0", "model": model, "decoder": spec})
    ).decoder.decode


class _Step(ABC):
    @abstractmethod
    def push(self, item: str) -> list[str]: ...

    def finish(self) -> list[str]:
        return []


class _Each(_Step):
    """Each token by itself."""

    def __init__(self, change: Callable[[str], str]):
        self._change = change

    def push(self, item):
        return [self._change(item)]


class _FirstApart(_Step):
    """Each token by itself, apart from the first of a text."""

    _BEFORE = "a"  # any token that stands before another

    def __init__(self, decode: Callable[[list[str]], str], *, continues: bool):
        self._decode = decode
        self._is_first = not continues
        self._n_before = len(decode([self._BEFORE]))

    def push(self, item):
        if self._is_first:
            self._is_first = False
            return [self._decode([item])]
        return [self._decode([self._BEFORE, item])[self._n_before :]]


class _ByteLevel(_Step):
    """Byte-level BPE: each character of a token stands for a byte, and the bytes are UTF-8."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, item):
        try:
            raw = bytes(map(BYTE_OF.__getitem__, item))
        except KeyError:  # an added token with other characters stands for its own bytes
            raw = item.encode()
        return [self._utf8.decode(raw)]

    def finish(self):
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback(_Step):
    """<0xE2> is a byte, and a run of bytes is UTF-8 or no text at all.

    A run that is not valid gives one replacement character for each byte, as in `tokenizers`
    (SentencePiece itself keeps its valid part). So a later byte can change all of them.
    """

    _PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")

    def __init__(self):
        self._run = bytearray()

    def push(self, item):
        if self._PIECE.fullmatch(item):
            self._run.append(int(item[3:5], 16))
            return []
        return [*self.finish(), item]

    def finish(self):
        raw, self._run = bytes(self._run), bytearray()
        try:
            return [raw.decode()] if raw else []
        except UnicodeDecodeError:
            return ["\N{REPLACEMENT CHARACTER}"] * len(raw)


class _Ctc(_Step):
    """Tokens that repeat the one before count once, and those without text are left out."""

    def __init__(self, decode):
        self._decode = decode
        self._last = None

    def push(self, item):
        if item == self._last:
            return []
        self._last = item
        text = self._decode([item])
        return [text] if text else []


class _WordEnds(_Step):
    """BPEDecoder: a suffix is a space, but in the last token it is nothing."""

    def __init__(self, suffix, *, is_last):
        """`is_last`: no step follows, so a token can be given in two parts."""
        self._suffix = suffix
        self._is_last = is_last
        self._held = None

    def push(self, item):
        before = [] if self._held is None else [self._held.replace(self._suffix, " ")]
        if not self._is_last:
            self._held = item
            return before
        certain, found, rest = item.partition(self._suffix)
        self._held = found + rest
        return [*before, certain]

    def finish(self):
        held, self._held = self._held, None
        return [] if held is None else [held.replace(self._suffix, "")]


class _TextReplaced(_Step):
    """A word of the text replaced, wherever the pieces divide it."""

    def __init__(self, word, content):
        self._word, self._content = word, content
        self._held = ""

    def push(self, item):
        *parts, rest = (self._held + item).split(self._word)
        n_held = overlap(rest, self._word)
        self._held = rest[len(rest) - n_held :]
        return [self._content.join([*parts, rest[: len(rest) - n_held]])]

    def finish(self):
        held, self._held = self._held, ""
        return [held]


class _TextStripped(_Step):
    """Up to so many characters taken from the text's beginning and from its end."""

    def __init__(self, character, start, stop):
        self._character, self._start, self._stop = character, start, stop
        self._held = ""

    def push(self, item):
        text = self._held + item
        if self._start and text:
            kept = text.lstrip(self._character)
            n_stripped = min(self._start, len(text) - len(kept))
            self._start = 0 if kept else self._start - n_stripped
            text = text[n_stripped:]
        n_end = min(self._stop, len(text) - len(text.rstrip(self._character)))
        self._held = text[len(text) - n_end :]
        return [text[: len(text) - n_end]]


class _Held(_Step):
    """Any other step: nothing is certain before the end."""

    def __init__(self, decode, *, is_text):
        self._decode, self._is_text = decode, is_text
        self._items = []

    def push(self, item):
        self._items.append(item)
        return []

    def finish(self):
        items, self._items = self._items, []
        return [self._decode(["".join(items)] if self._is_text and items else items)]


def _each(spec, **_):
    decode = _library_decoder([spec])
    return _Each(lambda item: decode([item]))


def _text_replaced(spec, **_):
    word = spec["pattern"].get("String")
    return _TextReplaced(word, spec["content"]) if word else None


def _text_stripped(spec, *, continues, **_):
    start = 0 if continues else spec["start"]
    return _TextStripped(spec["content"], start, spec["stop"])


def _text_spaces(spec, *, continues, **_):
    """Metaspace takes the whole text for its first token, so it may leave out all spaces."""
    keeps = continues or spec["prepend_scheme"] == "never"
    return _Each(lambda item: item.replace(spec["replacement"], " " if keeps else ""))


def _word_ends(spec, *, is_last, **_):
    return _WordEnds(spec["suffix"], is_last=is_last) if spec["suffix"] else None


def _first_apart(spec, *, continues, **_):
    return _FirstApart(_library_decoder([spec]), continues=continues)


_ON_TOKENS = {
    "ByteFallback": lambda spec, **_: _ByteFallback(),
    "ByteLevel": lambda spec, **_: _ByteLevel(),
    "BPEDecoder": _word_ends,
    "CTC": lambda spec, **_: _Ctc(_library_decoder([spec])),
    "Metaspace": _first_apart,
    "Replace": _each,
    "Strip": _each,
    "WordPiece": _first_apart,
}
_ON_TEXT = {
    "BPEDecoder": lambda spec, **_: _TextReplaced(spec["suffix"], "") if spec["suffix"] else None,
    "Metaspace": _text_spaces,
    "Replace": _text_replaced,
    "Strip": _text_stripped,
}
