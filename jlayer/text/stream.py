"""Text as its tokens arrive: whole characters as soon as they are certain, cut at a stop string.

Why not `tokenizers.decoders.DecodeStream` (0.23): with byte fallback (Llama 2, Mistral) it fails
with "Invalid prefix", or gives text that a later byte makes wrong, for two of five random lists of
ids. And nothing ends it: an unfinished character or a replacement character at the end is lost.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable

from jlayer.text.bpe import BYTE_OF


class TextStream:
    """The pieces of `step`, then that of `finish`, add up to `Tokenizer.decode`, exactly.

    A piece holds whole characters only, and no step looks at the text before it. Held back is only
    what is not certain yet: the bytes of an unfinished character, with byte fallback the whole run
    of byte tokens (a later byte can make replacement characters of all of them), and everything for
    the few decoders whose text depends on the tokens that follow (CTC, BPEDecoder).
    """

    def __init__(self, tokenizer, *, skip_special_tokens: bool = True, continues: bool = False):
        """`tokenizer`: a `Tokenizer`; `continues` as in its `decode`."""
        self._token_of = tokenizer.library.id_to_token
        special = tokenizer.special_tokens.values() if skip_special_tokens else ()
        self._skipped = frozenset(special)
        self._text = _text_of(tokenizer.library.decoder, continues=continues)

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        token = None if token_id in self._skipped else self._token_of(int(token_id))
        return "" if token is None else self._text.push(token)

    def finish(self) -> str:
        """What was held back."""
        return self._text.finish()


class StopWatcher:
    """Cuts text at the first of `stops` to be complete, wherever its pieces are divided.

    Held back is only what may still become a stop string. `stopped`: the stop string found, or
    None; of several that are complete at one character, the longest.
    """

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.stopped: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is now certain to stand before any stop string."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops]
        found = [each for each in found if each[0] + each[1] >= 0]
        if found:
            end, minus_length, self.stopped = min(found)
            certain, self._held = text[: end + minus_length], ""
            return certain
        n_certain = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[n_certain:]
        return text[:n_certain]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text, stop):
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0


# How tokens become text: `push` a token, then `finish`


def _text_of(decoder, *, continues):
    """The text of a decoder of the `tokenizers` library, by the steps that it consists of."""
    if decoder is None:
        return _SeparateText(" ".join, continues=continues)
    steps = _flat_steps(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevelText()
    if _SEPARATE.issuperset(kinds):
        return _SeparateText(decoder.decode, continues=continues)
    spaces = _fallback_spaces(steps)
    if spaces is not None:
        return _FallbackText(0 if continues else spaces)
    return _HeldText(decoder.decode)


def _flat_steps(spec):
    if spec["type"] == "Sequence":
        return [flat for step in spec["decoders"] for flat in _flat_steps(step)]
    return [spec]


# Steps that turn each token into text by itself; some treat the first token in another way.
_SEPARATE = frozenset({"Metaspace", "WordPiece", "Replace", "Strip"})
_TO_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def _fallback_spaces(steps):
    """The leading spaces that a SentencePiece decoder takes away; None where it is another."""
    if steps[:3] != [_TO_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        return None
    if len(steps) == 3:
        return 0
    strip = {"type": "Strip", "content": " ", "start": steps[3].get("start"), "stop": 0}
    return strip["start"] if steps[3:] == [strip] else None


class _ByteLevelText:
    """Byte-level BPE: each character of a token stands for a byte, and the bytes are UTF-8."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        try:
            raw = bytes(map(BYTE_OF.__getitem__, token))
        except KeyError:  # an added token with other characters stands for its own bytes
            raw = token.encode()
        return self._utf8.decode(raw)

    def finish(self):
        return self._utf8.decode(b"", final=True)


class _FallbackText:
    """SentencePiece: ▁ is a space, <0xE2> a byte, and a run of bytes is UTF-8 or no text at all.

    A run that is not valid gives one replacement character for each byte, as in `tokenizers`
    (SentencePiece itself keeps its valid part).
    """

    def __init__(self, spaces: int):
        """`spaces`: how many leading spaces of the text are taken away."""
        self._spaces = spaces
        self._run = bytearray()

    def push(self, token):
        if _BYTE_PIECE.fullmatch(token):
            self._run.append(int(token[3:5], 16))
            return ""
        return self._strip(self._take_run() + token.replace("▁", " "))

    def finish(self):
        return self._strip(self._take_run())

    def _take_run(self):
        raw, self._run = bytes(self._run), bytearray()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(raw)

    def _strip(self, text):
        if not self._spaces or not text:
            return text
        kept = text.lstrip(" ")
        n_stripped = min(self._spaces, len(text) - len(kept))
        self._spaces = 0 if kept else self._spaces - n_stripped
        return text[n_stripped:]


_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


class _SeparateText:
    """Decoders that turn each token into text by itself, apart from the first token of a text."""

    _BEFORE = "a"  # any token that stands before another

    def __init__(self, decode: Callable[[list[str]], str], *, continues: bool):
        self._decode = decode
        self._is_first = not continues
        self._n_before = len(decode([self._BEFORE]))

    def push(self, token):
        if self._is_first:
            self._is_first = False
            return self._decode([token])
        return self._decode([self._BEFORE, token])[self._n_before :]

    def finish(self):
        return ""


class _HeldText:
    """Any other decoder: nothing is certain before the end."""

    def __init__(self, decode: Callable[[list[str]], str]):
        self._decode = decode
        self._tokens = []

    def push(self, token):
        self._tokens.append(token)
        return ""

    def finish(self):
        tokens, self._tokens = self._tokens, []
        return self._decode(tokens)
