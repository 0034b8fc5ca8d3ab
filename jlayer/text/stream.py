"""Text as its tokens arrive: whole characters as soon as they are certain, cut at a stop string.

Why not `tokenizers.decoders.DecodeStream` (0.23): with byte fallback (Llama 2, Mistral) it fails
with "Invalid prefix", or gives text that a later byte makes wrong, for two of five random lists of
ids. And nothing ends it: an unfinished character or a replacement character at the end is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from jlayer.text.decoders import Decoding, overlap


class TextStream:
    """The pieces of `step`, then that of `finish`, add up to `Tokenizer.decode`, exactly.

    A piece holds whole characters only, and no step looks at the text before it. Held back is only
    what is not certain yet: the bytes of an unfinished character, and with byte fallback the whole
    run of byte tokens (a later byte can make replacement characters of all of them).
    """

    def __init__(
        self,
        tokenizer,
        *,
        skip_special_tokens: bool = True,
        continues: bool = False,
        shown: Collection[int] = (),
    ):
        """`tokenizer`: a `Tokenizer`; `continues` as in its `decode`. `shown`: special tokens that
        are written out all the same, such as those that mark a call of a tool."""
        self._token_of = tokenizer.library.id_to_token
        special = tokenizer.special_tokens.values() if skip_special_tokens else ()
        self._skipped = frozenset(special).difference(shown)
        self._text = Decoding(
            tokenizer.library.decoder, continues=continues, cleans_up=tokenizer.cleans_up
        )

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
        n_certain = len(text) - max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[n_certain:]
        return text[:n_certain]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held
