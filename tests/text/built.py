"""Builds a small tokenizer of a given shape: its parts as in a published tokenizer.json, and a
vocabulary that is trained with them on a few lines."""

import functools
import json
from dataclasses import dataclass, field

from tests.text.reference import token, write

CORPUS = [
    *["a king was there. a queen, and the king said: hello! there was a girl"] * 20,
    *["the cat sat on the mat 123", "Once upon a time", "don't I'll we've 2024"] * 10,
    *(f"word{i} the thing number {i} went home early in the morning" for i in range(40)),
    *["def f(x):\n    return x**2\n\n\n", "naïve café ÀÉÎ\u0300 日本語 中文"] * 6,
]
# How the regular expressions of published files split text into words.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACES_TO_PIECES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
TO_TEXT = (
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODE_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
DECODE_BYTES = {**DECODE_BYTES, "use_regex": True}
NFC = {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}


def byte_level(*, use_regex=True, space=False):
    whole = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True}
    return {**whole, "use_regex": use_regex}


def sequence(*parts, key="pretokenizers"):
    return {"type": "Sequence", key: list(parts)}


def split(pattern):
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return sequence({**rule, "invert": False}, byte_level(use_regex=False))


def begins_with(*tokens):
    """A post-processor that puts tokens before a text; their ids are filled in later."""
    before = [{"SpecialToken": {"id": text, "type_id": 0}} for text in tokens]
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, text],
        "pair": [*before, text, *before, other],
        "special_tokens": {each: {"id": each, "ids": [None], "tokens": [each]} for each in tokens},
    }


@dataclass(frozen=True)
class Built:
    """One tokenizer. model_type: of its config.json. specials: the first ids, special tokens.
    of_bytes: byte-level, or else pieces with byte fallback. parts: of tokenizer.json. more: rows of
    added tokens after the vocabulary. settings: tokenizer_config.json."""

    model_type: str
    specials: tuple
    parts: dict
    settings: dict
    of_bytes: bool = True
    more: tuple = ()
    model: dict = field(default_factory=dict)
    unigram: bool = False


def pieces(model_type, specials, settings, *more, normalizer, strip=True, **parts):
    """A SentencePiece vocabulary as it is converted."""
    steps = [*TO_TEXT, STRIP] if strip else TO_TEXT
    parts = {"normalizer": normalizer, "decoder": sequence(*steps, key="decoders"), **parts}
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return Built(model_type, specials, parts, settings, of_bytes=False, more=more, model=model)


def bytes_of(model_type, specials, settings, *more, words, post=None, **parts):
    parts = {"pre_tokenizer": words, "decoder": DECODE_BYTES, "post_processor": post, **parts}
    return Built(model_type, specials, parts, settings, more=more)


def rows(*texts, **flags):
    return tuple(token(text, **flags) for text in texts)


@functools.cache
def vocabulary(normalizer, words, specials, of_bytes, unigram):
    """(vocabulary, merges) trained with the parts of a tokenizer.json, given as JSON."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    kind = "Unigram" if unigram else "BPE"
    model = {"type": "Unigram", "unk_id": None, "vocab": []} if unigram else {"type": "BPE"}
    model = model if unigram else {**model, "vocab": {}, "merges": []}
    spec = {"version": "1.0", "model": model, "normalizer": json.loads(normalizer)}
    library = Tokenizer.from_str(json.dumps({**spec, "pre_tokenizer": json.loads(words)}))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if of_bytes else []
    first = [*specials, *(() if of_bytes else (f"<0x{n:02X}>" for n in range(256)))]
    make = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    options = {"unk_token": "<unk>"} if unigram else {}
    trainer = make(
        vocab_size=len(first) + (60 if unigram else 400 if of_bytes else 200),
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
        **options,
    )
    library.train_from_iterator(CORPUS, trainer)
    found = json.loads(library.to_str())["model"]
    assert found["type"] == kind
    return found["vocab"], found.get("merges")


def files_of(built):
    """tokenizer.json, tokenizer_config.json and config.json."""
    normalizer, words = (built.parts.get(key) for key in ("normalizer", "pre_tokenizer"))
    vocab, merges = vocabulary(
        json.dumps(normalizer), json.dumps(words), built.specials, built.of_bytes, built.unigram
    )
    model = {"type": "BPE", "vocab": vocab, "merges": merges, **built.model}
    if built.unigram:
        model = {"type": "Unigram", "vocab": vocab, "unk_id": 0, "byte_fallback": True}
    again = {row["content"] for row in built.more}
    added = [*rows(*(text for text in built.specials if text not in again)), *built.more]
    known = {piece: n for n, (piece, _) in enumerate(vocab)} if built.unigram else vocab
    listed = []
    for row in added:
        at = known.get(row["content"], len(known) + sum(r["id"] >= len(known) for r in listed))
        listed.append({"id": at, **row})
    ids = {row["content"]: row["id"] for row in listed}
    parts = json.loads(json.dumps(built.parts))
    for each in _templates(parts.get("post_processor")):
        for row in each["special_tokens"].values():
            row["ids"] = [ids[row["id"]]]
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": listed}
    spec |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder")) | parts
    decoder = {str(r["id"]): {k: v for k, v in r.items() if k != "id"} for r in listed}
    return {
        "config.json": {"model_type": built.model_type},
        "tokenizer.json": {**spec, "model": model},
        "tokenizer_config.json": {**built.settings, "added_tokens_decoder": decoder},
    }


def _templates(post):
    steps = (post or {}).get("processors") or [post]
    return [step for step in steps if step and step["type"] == "TemplateProcessing"]


def folder_of(built, folder):
    return write(folder, files_of(built))
