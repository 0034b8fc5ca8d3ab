"""Llama 3's tokenizer.model (tiktoken's form) as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping

from jlayer.text.bpe import CHARACTER_OF, bpe_merges, build
from jlayer.tokenizer_files import LLAMA3_SPECIAL_TOKENS, read_tiktoken

# How Llama 3's code splits text into words.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_tiktoken(raw: bytes, renamed: Mapping[int, object], *, where: str) -> tuple[object, dict]:
    """The tokenizer, and defaults for tokenizer_config.json that only Llama 3's code states.

    `renamed`: id → AddedToken of special tokens that tokenizer_config.json gives other names.
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
    special = list(LLAMA3_SPECIAL_TOKENS)
    for token_id, token in renamed.items():
        if 0 <= token_id - len(ranks) < len(special):
            special[token_id - len(ranks)] = str(token.content)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer, {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True}
