"""A GGUF file's tokenizer as the files that the same tokenizer is published with.

SentencePiece becomes a tokenizer.model, BPE a tokenizer.json; both get a tokenizer_config.json with
the special tokens, the flags and the chat template. How text is split into words is not in the
file: it names a kind, which is looked up in a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf.reader import Head, short
from jlayer.gguf.splits import KINDS
from jlayer.tokenizer_files import BPE, Piece, PieceKind, SentencePieceModel, encode_sentencepiece

_MODEL, _PRE, _TEMPLATE = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"
_TOKENS, _TYPES, _MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
_TEMPLATES = "tokenizer.chat_templates"
# As tokenizer_config.json calls a token -> the key of its id.
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a turn in published chat templates. Files often name one end alone.
END_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
_NO_TOKEN = (1 << 64) - 1  # -1, as a message of protobuf has it
UNUSED, BYTE = 5, 6  # kinds of tokens besides those of PieceKind
# The file as it is, whatever class its model has: see `text.model_class`.
_CLASS = "TokenizersBackend"


@dataclass(frozen=True)
class _Vocabulary:
    """texts, kinds: of each token, by its id."""

    texts: Sequence[str]
    kinds: Sequence[int]

    def added(self) -> dict[int, dict]:
        """Id -> an added token, of those that are found in a text as they are written."""
        return {
            token_id: {
                "content": self.texts[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == PieceKind.CONTROL,
            }
            for token_id, kind in enumerate(self.kinds)
            if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)
        }


def tokenizer_files(head: Head) -> dict[str, bytes]:
    """Name -> content of the files of a model's tokenizer; none where the file has no tokenizer.

    Raises CheckpointError (a key is missing, or of another form) or UnsupportedModelError (a kind
    of tokenizer, or of splitting text, that is not known).
    """
    model = head.values.get(_MODEL, "none")
    if model in ("none", "no_vocab"):
        return {}
    if model not in _MAKERS:
        raise UnsupportedModelError(
            f"{head.path}: {_MODEL} is {short(model)}, which is not supported; supported: "
            f"{', '.join(_MAKERS)}; put the model's tokenizer.json into a folder of its own, or "
            "give token ids with --prompt-ids"
        )
    words = _vocabulary(head)
    files = _MAKERS[model](head, words)
    return {**files, "tokenizer_config.json": _encoded(_config(head, words, model))}


def generation_config(head: Head) -> dict:
    """The ids at which generation begins and ends, as a generation_config.json has them."""
    ends = [_id(head, key) for key in ENDS]
    found = [end for end in ends if end is not None]
    if _TOKENS in head.values:
        words = _vocabulary(head)
        found += [
            token_id
            for token_id, kind in enumerate(words.kinds)
            if kind == PieceKind.CONTROL and words.texts[token_id] in END_TEXTS
        ]
    begin = _id(head, "bos_token_id")
    return {
        **({"eos_token_id": list(dict.fromkeys(found))} if found else {}),
        **({"bos_token_id": begin} if begin is not None else {}),
    }


def _vocabulary(head):
    texts = head.array(_TOKENS)
    kinds = head.array(_TYPES) if _TYPES in head.values else (int(PieceKind.NORMAL),) * len(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{head.path}: {_TOKENS} is no list of texts; fetch the file again")
    if len(kinds) != len(texts) or not all(type(kind) is int for kind in kinds):
        raise CheckpointError(
            f"{head.path}: {_TYPES} has {len(kinds)} numbers, expected {len(texts)}, one for each "
            "token; fetch the file again"
        )
    return _Vocabulary(texts, kinds)


def _id(head, key, n_tokens=None):
    """The id under a key; None where there is none."""
    name = f"tokenizer.ggml.{key}"
    found = head.values.get(name)
    if found is not None and (type(found) is not int or found < 0):
        raise CheckpointError(f"{head.path}: {name} is {short(found)}, expected an id")
    if found is not None and n_tokens is not None and found >= n_tokens:
        raise CheckpointError(
            f"{head.path}: {name} is {found}, expected an id below {n_tokens}, the tokens"
        )
    return found


def _flag(head, key, default):
    value = head.values.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"{head.path}: tokenizer.ggml.{key} is {short(value)}, expected true or false"
        )
    return value


def _config(head, words, model):
    """The tokenizer_config.json."""
    n_tokens = len(words.texts)
    ids = {name: _id(head, key, n_tokens) for name, key in NAMED.items()}
    adds_bos = model == "llama" or (model == "gpt2" and _kind(head).adds_bos)
    config = {
        "tokenizer_class": _CLASS,
        "added_tokens_decoder": words.added(),
        "add_bos_token": _flag(head, "add_bos_token", adds_bos),
        "add_eos_token": _flag(head, "add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        **{name: words.texts[found] for name, found in ids.items() if found is not None},
    }
    template = _templates(head)
    return config if template is None else {**config, "chat_template": template}


def _templates(head):
    """The chat template, or a list of all where some have names of their own; None: there is
    none."""
    names = head.array(_TEMPLATES) if _TEMPLATES in head.values else ()
    keys = {"default": _TEMPLATE, **{name: f"{_TEMPLATE}.{name}" for name in names}}
    found = {name: head.values[key] for name, key in keys.items() if key in head.values}
    for name, text in found.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{head.path}: {keys[name]} is {short(text)}, expected a text")
    if found.keys() <= {"default"}:
        return found.get("default")
    return [{"name": name, "template": text} for name, text in found.items()]


def _sentencepiece(head, words):
    """A tokenizer.model. llama.cpp merges by scores, as SentencePiece's BPE does."""
    scores = head.array("tokenizer.ggml.scores")
    if len(scores) != len(words.texts) or not all(type(score) is float for score in scores):
        raise CheckpointError(
            f"{head.path}: tokenizer.ggml.scores has {len(scores)} entries, expected a number for "
            f"each of {len(words.texts)} tokens; fetch the file again"
        )
    if "tokenizer.ggml.precompiled_charsmap" in head.values:
        raise UnsupportedModelError(
            f"{head.path}: tokenizer.ggml.precompiled_charsmap is not supported for {_MODEL} llama"
        )
    rows = zip(words.texts, scores, words.kinds, strict=True)
    ids = {name: _id(head, f"{name}_token_id", len(scores)) for name in ("bos", "eos")}
    unknown = [n for n, kind in enumerate(words.kinds) if kind == PieceKind.UNKNOWN]
    if len(unknown) != 1:
        raise CheckpointError(
            f"{head.path}: {len(unknown)} tokens are marked as the unknown one, expected one"
        )
    named = {"unk": unknown[0], **{name: n for name, n in ids.items() if n is not None}}
    numbers = {name: named.get(name, _NO_TOKEN) for name in ("unk", "bos", "eos")}
    model = SentencePieceModel(
        tuple(Piece(*row) for row in rows),
        model_type=BPE,
        byte_fallback=int(BYTE in words.kinds),
        add_dummy_prefix=int(_flag(head, "add_space_prefix", True)),
        remove_extra_whitespaces=int(_flag(head, "remove_extra_whitespaces", False)),
        **{f"{name}_id": number for name, number in numbers.items()},
        **{f"{name}_piece": words.texts[number].encode() for name, number in named.items()},
    )
    return {"tokenizer.model": encode_sentencepiece(model)}


def _kind(head):
    """How text is split, by the name in the file."""
    name = head.values.get(_PRE)
    if name not in KINDS:
        found = "missing" if name is None else short(name)
        raise UnsupportedModelError(
            f"{head.path}: {_PRE} is {found}, a way of splitting text that is not known here; "
            f"known: {', '.join(sorted(KINDS))}; give token ids with --prompt-ids"
        )
    return KINDS[name]


def _bpe(head, words):
    """A tokenizer.json of byte-level BPE."""
    kind, merges = _kind(head), [merge.split(" ") for merge in head.array(_MERGES)]
    wrong = next((n for n, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{head.path}: {_MERGES}[{wrong}] is no pair; fetch the file again")
    ids = {n: text for n, text in enumerate(words.texts) if words.kinds[n] != UNUSED}
    vocabulary = {text: n for n, text in ids.items()}
    if len(vocabulary) != len(ids):
        raise CheckpointError(f"{head.path}: {_TOKENS} has a token twice; fetch the file again")
    body = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, **token} for n, token in words.added().items()],
        "normalizer": kind.normalizer and {"type": kind.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _words(kind)},
        "post_processor": _ends(head, words, kind),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.whole_words_first,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return {"tokenizer.json": _encoded(body)}


def _words(kind):
    splits = (
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in kind.splits
    )
    return [*splits, _byte_level()]


def _byte_level():
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "ByteLevel", **flags}


def _ends(head, words, kind):
    """What is put before and after a text."""
    wanted = {
        "bos": _flag(head, "add_bos_token", kind.adds_bos),
        "eos": _flag(head, "add_eos_token", False),
    }
    ids = {name: _id(head, f"{name}_token_id", len(words.texts)) for name in wanted}
    used = {
        name: (ids[name], words.texts[ids[name]])
        for name, is_wanted in wanted.items()
        if is_wanted and ids[name] is not None
    }

    def template(number):
        text = [{"Sequence": {"id": "A" if number == 0 else "B", "type_id": number}}]
        ends = {
            name: [{"SpecialToken": {"id": text_of, "type_id": number}}]
            for name, (_, text_of) in used.items()
        }
        return [*ends.get("bos", ()), *text, *ends.get("eos", ())]

    return {
        "type": "TemplateProcessing",
        "single": template(0),
        "pair": [*template(0), *template(1)],
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for token_id, text in used.values()
        },
    }


def _encoded(body: Mapping) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


# tokenizer.ggml.model -> what makes its files.
_MAKERS = {"llama": _sentencepiece, "gpt2": _bpe}
