"""Mistral's tokenizers of the kind "tekken", of which files were published that split text wrongly.

transformers mends such a file where tokenizer_config.json says fix_mistral_regex, and saves that
setting beside a tokenizer that it has mended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# How tekken splits text into words.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MORE_TOKENS_THAN = 100_000  # tekken's have 131,072, those of SentencePiece 32,768
_MODELS = (None, "mistral", "mistral3", "voxtral", "ministral", "pixtral")


def is_to_be_mended(settings: Mapping, model: Mapping) -> bool:
    """`settings`: tokenizer_config.json; `model`: config.json. One that transformers 5 wrote is
    beside a file that is right."""
    version = re.match(r"\d+", str(model.get("transformers_version") or "0"))
    is_old = version is not None and int(version[0]) < 5
    is_mistrals = bool(model) and model.get("model_type") in _MODELS
    return settings.get("fix_mistral_regex") is True and is_old and is_mistrals


def mend(library) -> None:
    """Makes a large tokenizer of the `tokenizers` library split text as tekken does."""
    from tokenizers import Regex, pre_tokenizers

    words = library.pre_tokenizer
    if words is None or library.get_vocab_size() <= _MORE_TOKENS_THAN:
        return
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    if isinstance(words, pre_tokenizers.Sequence):
        words[0] = split
        return
    if isinstance(words, pre_tokenizers.Metaspace):  # it would lose the spaces between words
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, words])
