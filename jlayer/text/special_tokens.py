"""Special tokens: what tokenizer_config.json says of them, and text in which they are plain words.

Functions here change a tokenizer of the `tokenizers` library, or make another one from it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from jlayer.errors import CheckpointError

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def named_tokens(config: Mapping, *, where: str) -> dict[str, str]:
    """bos_token and so on → text, as far as the config has them.

    Raises CheckpointError where one is not text.
    """
    found = {}
    for name in _NAMES:
        value = config.get(f"{name}_token")
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {name}_token is {value!r}, expected text")
        found[f"{name}_token"] = value
    return found


def configured_tokens(config: Mapping, *, where: str) -> dict[int, object]:
    """Id → AddedToken, in ascending order: added_tokens_decoder of tokenizer_config.json.

    Raises CheckpointError where that cannot be read.
    """
    from tokenizers import AddedToken

    try:
        rows = config.get("added_tokens_decoder") or {}
        rows = sorted((int(token_id), dict(row)) for token_id, row in rows.items())
        return {
            token_id: AddedToken(
                row["content"], **{flag: row[flag] for flag in _FLAGS if flag in row}
            )
            for token_id, row in rows
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: added_tokens_decoder cannot be read ({error})") from None


def add_tokens(tokenizer, tokens: Mapping[int, object], *, where: str) -> None:
    """Adds what `tokens` (id → AddedToken) knows beyond tokenizer.json.

    Raises CheckpointError where a token would get another id.
    """
    known = tokenizer.get_added_tokens_decoder()
    for token_id, token in tokens.items():
        if repr(known.get(token_id)) == repr(token):
            continue
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{where}: token {token.content!r} has id {found}, "
                f"but added_tokens_decoder says {token_id}"
            )


def mark_special(tokenizer, names: Iterable[str]) -> None:
    """Makes named tokens special even where the file does not say so, as transformers does."""
    from tokenizers import AddedToken

    added = {str(token.content): token for token in tokenizer.get_added_tokens_decoder().values()}
    for name in names:
        token = added.get(name)
        if token is None and tokenizer.token_to_id(name) is not None:
            token = AddedToken(name, normalized=False)
        if token is not None and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])


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
        text = "".join(self.names[text] if is_control else text for text, is_control in parts)
        encoded = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.real_ids.get(token, token) for token in encoded]
