"""Special tokens: how they come into a tokenizer, and text in which they are plain words.

Functions here change a tokenizer of the `tokenizers` library, or make another one from it.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from jlayer.errors import CheckpointError
from jlayer.text.bpe import ids_of, spelled
from jlayer.text.declared import text_of


def add_tokens(tokenizer, tokens: Mapping[int, object], names: Iterable, extra: Iterable) -> None:
    """Adds tokens in the order of transformers, which gives those that are new their ids.

    `tokens`: id → AddedToken, in ascending order; a known token gets its flags from here. `names`:
    the named tokens, text or AddedToken, and `extra`: other special tokens.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_added_tokens_decoder().values()
    new = list(tokens.values())
    listed = {str(token.content) for token in (*known, *new)}
    names = list(names)
    new += [token for token in (*names, *extra) if text_of(token) not in listed]
    named = {text_of(token) for token in names}
    for at, token in enumerate(new):
        if isinstance(token, str):
            new[at] = AddedToken(token, special=True, normalized=False)
        elif str(token.content) in named:
            token.special = True  # even where the file forgot
    tokenizer.add_tokens(new)  # in one call: each builds the search for all tokens anew


def mark_special(tokenizer, tokens: Iterable, *, keeps_flags: bool = False) -> None:
    """Makes `tokens`, text or AddedToken, special tokens that are found exactly as written, or
    with `keeps_flags` in the way that an AddedToken says."""
    from tokenizers import AddedToken

    texts = {text_of(token): token for token in tokens}
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            if isinstance(token, str) or not keeps_flags
            else token
            for text, token in texts.items()
        ]
    )


def check_ids(tokenizer, tokens: Mapping[int, object], *, where: str) -> None:
    """Raises CheckpointError where a token did not get the id that `where` says.

    The library gives a new token the next free id, whatever the file says.
    """
    for token_id, token in tokens.items():
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{where}: token {token.content!r} is to have id {token_id}, but the vocabulary "
                f"gives it {found}; the file belongs to another tokenizer, or ids before it are "
                "missing: fetch all tokenizer files of the model again"
            )


@dataclass(frozen=True)
class RenamedTokenizer:
    """A copy of a tokenizer that knows some tokens only under names that nobody can guess.

    Text of a user that holds such a token's own name is encoded as plain text. A template's token
    is written under the secret name. One call then does all that the tokenizer does around tokens
    and at seams. The copy shares the vocabulary of the original.
    """

    tokenizer: object
    names: Mapping[str, str]  # token → secret name
    real_ids: Mapping[int, int]  # id in the copy → id in the original

    @classmethod
    def of(cls, tokenizer, control: Collection[str]) -> RenamedTokenizer:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        copy = Library(tokenizer.model)
        if tokenizer.normalizer is not None:
            copy.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            copy.pre_tokenizer = tokenizer.pre_tokenizer
        secret = secrets.token_hex(16)
        names, real_ids = {}, {}
        for real_id, token in tokenizer.get_added_tokens_decoder().items():
            text = name = str(token.content)
            if text in control:
                names[text] = name = f"<{secret}-{real_id}>"
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "normalized")}
            # A secret name is never part of a word, so what stands around it does not matter.
            single_word = token.single_word and name == text
            copy.add_tokens([AddedToken(name, special=False, single_word=single_word, **flags)])
            real_ids[copy.token_to_id(name)] = real_id
        return cls(copy, names, real_ids)

    def encode(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Original ids of `parts`, pairs of (text, whether it is a control token)."""
        encoded = ids_of(self.tokenizer, self._renamed(parts), add_special_tokens=False)
        return [self.real_ids.get(token, token) for token in encoded]

    def spell(self, parts: Iterable[tuple[str, bool]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and of each the (begin, end) of its characters in the text that the
        parts make."""
        parts = list(parts)
        encoded, spans = spelled(self.tokenizer, self._renamed(parts), add_special_tokens=False)
        ids = [self.real_ids.get(token, token) for token in encoded]
        # Where each part begins: in the text with secret names, and in the real one.
        secret = list(accumulate((len(self._renamed([part])) for part in parts), initial=0))
        real = list(accumulate((len(text) for text, _ in parts), initial=0))

        def place(at):
            n = min(bisect_right(secret, at), len(parts)) - 1
            if parts[n][1] and at > secret[n]:  # no token ends within a name
                return real[n + 1]
            return real[n] + at - secret[n]

        return ids, [(place(begin), place(end)) for begin, end in spans]

    def _renamed(self, parts):
        return "".join(self.names[text] if is_control else text for text, is_control in parts)
