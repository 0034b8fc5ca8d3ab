"""How byte-level tokenizers split text into words, by the names in `tokenizer.ggml.pre`.

The expressions are those of the published tokenizer.json files; llama.cpp, whose names these are,
has the same in its own spelling.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_LLAMA3 = f"{_CONTRACTIONS}{_WORDS}{{1,3}}{_OTHERS}{_SPACES}"
_QWEN2 = f"{_CONTRACTIONS}{_WORDS}{_OTHERS}{_SPACES}"
# Combining marks are parts of a word.
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_BEFORE, _UPPER, _LOWER = (
    r"[^\r\n\p{L}\p{N}]?",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_SEED = rf"{_CONTRACTIONS}{_WORDS}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"


@dataclass(frozen=True)
class SplitKind:
    """splits: expressions, one after another, whose matches are words by themselves.
    normalizer: of the text before. whole_words_first: a word that is a token is taken whole.
    adds_bos: where the file does not say whether BOS comes before a text.
    """

    splits: tuple[str, ...]
    normalizer: str | None = None
    whole_words_first: bool = False
    adds_bos: bool = False


_LLAMA_BPE = SplitKind((_LLAMA3,), whole_words_first=True, adds_bos=True)
_QWEN = SplitKind((_QWEN2,), normalizer="NFC")
_DIGITS = SplitKind((r"\p{N}", _GPT2))
KINDS: dict[str, SplitKind] = {
    **dict.fromkeys(("gpt-2", "phi-2", "exaone4"), SplitKind((_GPT2,))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA_BPE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), _QWEN),
    "qwen35": SplitKind((_QWEN35,), normalizer="NFC"),
    "glm4": SplitKind((_LLAMA3,), whole_words_first=True),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "smaug-bpe"), SplitKind((_LLAMA3,))),
    **dict.fromkeys(("gpt-4o", "minimax-m2"), SplitKind((_GPT4O,))),
    "tekken": SplitKind((_TEKKEN,), whole_words_first=True, adds_bos=True),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), SplitKind(_DEEPSEEK3)),
    "seed-coder": SplitKind((_SEED,)),
    "olmo": SplitKind((_GPT2,), normalizer="NFC"),
    "command-r": SplitKind(_DIGITS.splits, normalizer="NFC"),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
}
