"""Tokenizer classes of transformers that go before what tokenizer.json says of itself.

Such a class takes the vocabulary, the merges and the post-processor of the file. How it splits text
and joins tokens is the class's own. All other classes take the file as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SPACE = "▁"  # stands for a space in SentencePiece's pieces
# How Qwen 2 splits text into words; Llama 3's pattern differs in its numbers.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 3.5's takes combining marks (\p{M}) for parts of a word.
_QWEN3_5_SPLIT = _QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}"
)
_INFILL = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_END = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerClass:
    """settings of tokenizer_config.json → the parts, in the form of tokenizer.json.

    model: attributes of the BPE model. named, extra: its tokens where the files name none.
    flags: add_bos_token and add_eos_token where the files have none.
    goes_by_flags: BOS and EOS follow from the flags even if the file has a post-processor.
    makes_special: its named and extra tokens are special whatever the files say; keeps_flags: how
    they take spaces beside them stays as the files say.
    yields_to_bytes: a byte-level file is taken as it is; Llama 3's often name Llama 2's class.
    """

    pre_tokenizer: Callable[[Mapping], dict]
    decoder: Callable[[Mapping], dict]
    named: Mapping[str, str]
    normalizer: dict | None = None
    model: Mapping[str, object] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    flags: Mapping[str, bool] = field(default_factory=dict)
    goes_by_flags: bool = False
    makes_special: bool = False
    keeps_flags: bool = False
    yields_to_bytes: bool = False

    @property
    def is_byte_level(self) -> bool:
        return self.decoder is _bytes


def _has_prefix(settings):
    """Whether a space is put before the text; absent and null mean that it is."""
    return settings.get("add_prefix_space") in (None, True)


def _llama_spaces(settings):
    scheme = ("always" if settings.get("legacy") else "first") if _has_prefix(settings) else "never"
    return _metaspace(scheme)


def _code_llama_spaces(settings):
    return _metaspace("first" if _has_prefix(settings) else "never")


def _metaspace(scheme):
    return {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": scheme,
        "split": False,
    }


def _pieces_to_text(*, strip: bool):
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bytes(settings, *, use_regex=True):
    return {
        "type": "ByteLevel",
        "add_prefix_space": bool(settings.get("add_prefix_space")),
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _words(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}

    def of(settings):
        words = [split | {"invert": False}, _bytes(settings, use_regex=False)]
        return {"type": "Sequence", "pretokenizers": words}

    return of


def _digits_and_words(settings):
    words = [{"type": "Digits", "individual_digits": True}, _bytes(settings)]
    return {"type": "Sequence", "pretokenizers": words}


_BYTE_PIECES = {"unk_token": None, "fuse_unk": True, "byte_fallback": True}
_BYTE_LEVEL = {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_ONE_END = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_QWEN = {"eos_token": _END, "unk_token": _END, "pad_token": _END}
_NFC = {"type": "NFC"}

CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        _llama_spaces,
        lambda settings: _pieces_to_text(strip=_has_prefix(settings)),
        named=_SENTENCE,
        model=_BYTE_PIECES,
        yields_to_bytes=True,
    ),
    "CodeLlamaTokenizer": TokenizerClass(
        _code_llama_spaces,
        lambda settings: _pieces_to_text(strip=True),
        named=_SENTENCE | _INFILL,
        model=_BYTE_PIECES | {"unk_token": "<unk>"},
        extra=tuple(_INFILL.values()),
        flags={"add_bos_token": True},
    ),
    "GemmaTokenizer": TokenizerClass(
        lambda settings: {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        lambda settings: _pieces_to_text(strip=False),
        named={
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        model=_BYTE_PIECES | {"unk_token": "<unk>"},
    ),
    **dict.fromkeys(
        ("GPT2Tokenizer", "CodeGenTokenizer"),
        TokenizerClass(_bytes, _bytes, named=_ONE_END, model=_BYTE_LEVEL),
    ),
    "GPTNeoXTokenizer": TokenizerClass(
        _bytes,
        _bytes,
        named=_ONE_END | {"pad_token": "<|padding|>"},
        normalizer=_NFC,
        model=_BYTE_LEVEL,
        goes_by_flags=True,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _words(_QWEN2_SPLIT),
        _bytes,
        named=_QWEN,
        normalizer=_NFC,
        model=_BYTE_LEVEL,
        makes_special=True,
    ),
    "Qwen3_5Tokenizer": TokenizerClass(
        _words(_QWEN3_5_SPLIT), _bytes, named=_QWEN, normalizer=_NFC, model=_BYTE_LEVEL
    ),
    "CohereTokenizer": TokenizerClass(
        _digits_and_words,
        _bytes,
        named={
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "unk_token": "<UNK>",
            "sep_token": "<SEP>",
            "pad_token": "<PAD>",
            "cls_token": "<CLS>",
            "mask_token": "<MASK_TOKEN>",
        },
        normalizer=_NFC,
        model=_BYTE_LEVEL,
        makes_special=True,
        keeps_flags=True,
    ),
}


def replaces_parts(found: TokenizerClass, library) -> bool:
    """Whether the class goes before the parts of `library`, or these are taken as they are."""
    if type(library.model).__name__ != "BPE":
        return False
    parts = (library.pre_tokenizer, library.decoder)
    is_byte_level = any(part and b'"ByteLevel"' in part.__getstate__() for part in parts)
    return not (found.yields_to_bytes and is_byte_level)


def rebuilt(library, found: TokenizerClass, settings: Mapping):
    """A tokenizer with the model and the post-processor of `library`, and no added tokens."""
    from tokenizers import Tokenizer as Library

    parts = {
        "normalizer": found.normalizer,
        "pre_tokenizer": found.pre_tokenizer(settings),
        "decoder": found.decoder(settings),
    }
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = Library.from_str(json.dumps({"version": "1.0", "model": empty, **parts}))
    tokenizer.model = model = library.model
    for name, value in {"dropout": None, "ignore_merges": False, **found.model}.items():
        setattr(model, name, value)
    if library.post_processor is not None:
        tokenizer.post_processor = library.post_processor
    return tokenizer
