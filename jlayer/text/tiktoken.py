"""Llama 3's tokenizer.model (tiktoken's form) as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

from jlayer.text.bpe import CHARACTER_OF, bpe_merges, build
from jlayer.text.declared import Declared, Defaults
from jlayer.tokenizer_files import (
    LLAMA3_BEGIN,
    LLAMA3_ENDS,
    LLAMA3_RANKS,
    LLAMA3_SPECIAL_TOKENS,
    read_tiktoken,
)

# How Llama 3's code splits text into words.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_tiktoken(raw: bytes, declared: Declared, *, where: str) -> tuple[object, Defaults]:
    """The tokenizer, and what Llama 3's code says of it where no file beside it says anything.

    Raises CheckpointError (a damaged file).
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    ranks = read_tiktoken(raw, where=where)
    vocab = {"".join(CHARACTER_OF[b] for b in token): rank for token, rank in ranks.items()}
    # tiktoken takes a whole word that is a token as it is, without looking at merges.
    model = build(
        lambda: models.BPE(vocab=vocab, merges=bpe_merges(vocab, vocab.get), ignore_merges=True),
        where=where,
    )
    tokenizer = Library(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = _special_tokens(declared, len(ranks))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    ends = {"bos_token": LLAMA3_BEGIN, "eos_token": LLAMA3_ENDS[0]}
    return tokenizer, Defaults({} if declared.has_settings else ends, is_tiktoken=True)


def _special_tokens(declared, n_ranks):
    """The texts of the ids after the ranks: as declared, else Llama 3's, which only its code has.

    Ids that are left out get a name of their own, the one that transformers gives them.
    """
    last = max(declared.tokens, default=0)
    if last < n_ranks:
        is_llama3 = n_ranks == LLAMA3_RANKS or not declared.has_settings
        return LLAMA3_SPECIAL_TOKENS if is_llama3 else declared.extra_texts()
    names = [f"<|reserved_token_{token_id}|>" for token_id in range(n_ranks, last + 1)]
    for token_id, token in declared.tokens.items():
        if token_id >= n_ranks:
            names[token_id - n_ranks] = str(token.content)
    return [*names, *(text for text in declared.extra_texts() if text not in names)]
