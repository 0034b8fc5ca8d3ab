"""Stop strings where transformers finds them: in all of the text, the prompt and special tokens
included, as long as they end in the newest token. (jlayer's own `stop` looks at new text alone.)"""

from __future__ import annotations

import re

from jlayer.text.bpe import BYTE_OF
from jlayer.text.load import Loaded
from jlayer.text.stream import TextStream
from jlayer.text.tokenizer import Tokenizer

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class StopStrings:
    """Tells of each new token whether a stop string ends in it. Works on UTF-8, since a token may
    end within a character."""

    def __init__(self, stops: tuple[str, ...], *, text: Tokenizer, prompt: list[int]):
        self._stops = [stop.encode() for stop in stops]
        self._text = text
        self._kept = max(map(len, self._stops)) - 1  # bytes of the past that a stop may begin in
        self._tail = b"".join(map(self._bytes_of, prompt[-self._kept :] if self._kept else ()))

    def end_in(self, token: int) -> bool:
        new = self._bytes_of(token)
        past = self._tail[-self._kept :] if self._kept else b""
        seen = past + new
        self._tail = seen
        return any(seen.find(stop, max(0, len(past) - len(stop) + 1)) >= 0 for stop in self._stops)

    def _bytes_of(self, token):
        """What a token stands for within a text."""
        stream = TextStream(self._text, skip_special_tokens=False, continues=True)
        found = stream.step(token) + stream.finish()
        if "\N{REPLACEMENT CHARACTER}" not in found:
            return found.encode()
        piece = self._text.library.id_to_token(token)  # part of a character
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        is_bytes = all(character in BYTE_OF for character in piece)
        return bytes(BYTE_OF[character] for character in piece) if is_bytes else found.encode()


def given_tokenizer(tokenizer) -> Tokenizer | None:
    """transformers' tokenizer as ours, for the texts of its tokens alone. None where it is not made
    with the `tokenizers` library."""
    library = getattr(tokenizer, "backend_tokenizer", None)
    if library is None:
        return None
    copied = type(library).from_str(library.to_str())
    loaded = Loaded(copied, named={}, doubles_first_space=False, cleans_up=False, where="tokenizer")
    return Tokenizer(loaded, templates={})
