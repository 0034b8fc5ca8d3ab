"""Whether two models speak the same tokens, so that one can guess for the other."""

from __future__ import annotations

import os

from jlayer.errors import UsageError
from jlayer.small_files import files_of
from jlayer.text.declared import read_declared
from jlayer.text.load import load

ADVICE = "give a draft model with the tokenizer of the model"


def check_same_tokens(
    folder: str | os.PathLike,
    draft_folder: str | os.PathLike,
    *,
    vocab_size: int,
    draft_vocab_size: int,
) -> None:
    """Raises UsageError unless every id means the same token in both folders, added tokens
    included, and the draft has a row for each of them; and what reading their tokenizers raises.

    The vocabularies may be padded: what is beyond the tokens is never drawn. How text is split is
    of no matter. Where neither has a tokenizer, both vocabularies must have one size.
    """
    problem = _difference(_tokens(folder), _tokens(draft_folder), vocab_size, draft_vocab_size)
    if problem is not None:
        raise UsageError(
            f"draft: {os.fspath(draft_folder)} has other tokens than {os.fspath(folder)}: "
            f"{problem}; {ADVICE}"
        )


def _tokens(folder):
    """Id -> token, of all that a folder's tokenizer has; None where there is none."""
    files = files_of(folder)
    loaded = load(files, read_declared(files))
    if loaded is None:
        return None
    vocabulary = loaded.library.get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in vocabulary.items()}


def _difference(tokens, drafts, vocab_size, draft_vocab_size):
    """What differs first, in words; None where nothing does. `tokens`, `drafts`: of the model and
    of the draft."""
    if tokens is None and drafts is None:
        if vocab_size == draft_vocab_size:
            return None
        return f"its vocabulary has {draft_vocab_size} tokens, expected {vocab_size}"
    if tokens is None or drafts is None:
        without, other = ("it", "the model") if drafts is None else ("the model", "it")
        return f"{without} has no tokenizer, and {other} has one"
    if tokens != drafts:
        ids = tokens.keys() | drafts.keys()
        first = min(id_ for id_ in ids if tokens.get(id_) != drafts.get(id_))
        return f"token {first} is {_shown(drafts, first)}, expected {_shown(tokens, first)}"
    needed = min(max(tokens, default=-1) + 1, vocab_size)
    if draft_vocab_size < needed:
        return f"its vocabulary has {draft_vocab_size} tokens, expected at least {needed}"
    return None


def _shown(tokens, token_id):
    return f"{tokens[token_id]!r:.80}" if token_id in tokens else "none"
