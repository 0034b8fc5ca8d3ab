"""A published tokenizer as the metadata of a GGUF file: the inverse of `tokenizer`.

SentencePiece is written from its tokenizer.model; where there is a tokenizer.json alone, the scores
follow from the order of its merges. Of a byte-level tokenizer the way in which it splits text must
be one that has a name in `splits`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf.splits import KINDS, SplitKind
from jlayer.gguf.tokenizer import BYTE, END_TEXTS, ENDS, NAMED, UNUSED
from jlayer.strict import parse_json_object
from jlayer.tokenizer_files import BPE, PieceKind, is_tiktoken, read_sentencepiece

JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_GENERATION, _MODEL_CONFIG = "generation_config.json", "config.json"
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates/"
_BYTE_TEXT = re.compile("<0x[0-9A-F]{2}>")
# Under which of the names in KINDS a way of splitting is written: those that llama.cpp's own
# converter writes.
_WRITTEN = (
    *("gpt-2", "llama-bpe", "qwen2", "qwen35", "glm4", "chatglm-bpe", "gpt-4o", "tekken"),
    *("deepseek-v3", "smollm", "seed-coder", "olmo", "command-r"),
)
# Splitting that needs no expression of its own: what `split into single digits` is.
_DIGIT = r"\p{N}"


@dataclass
class _Tokens:
    """By id: the text, its score (of SentencePiece alone), and its kind."""

    texts: dict[int, str]
    kinds: dict[int, int]
    scores: dict[int, float] | None = None


def vocabulary_of(files: Mapping[str, bytes], *, vocab_size: int, where: str) -> dict[str, object]:
    """The metadata of the tokenizer among a model's small `files` (name -> content).

    Raises CheckpointError (a damaged file, more tokens than the model has rows) or
    UnsupportedModelError (a kind of tokenizer that GGUF has no name for).
    """
    raw = _object(files, JSON, where)
    model = _pieces(files, where)
    if raw:
        kind, tokens, more = _of_json(raw, model, where)
    elif model is not None:
        kind, tokens, more = "llama", _of_pieces(model), _flags_of_pieces(model)
    elif MODEL in files or "vocab.json" in files:
        raise UnsupportedModelError(
            f"{where}: a tokenizer without {JSON} that is not SentencePiece's cannot be exported "
            f"to GGUF; put its {JSON} there"
        )
    else:
        return {"tokenizer.ggml.model": "none"}
    config = _object(files, CONFIG, where)
    _add(tokens, raw, config, files, where)
    named = _named(config, files, where)
    begins, ends = _around(raw, config, named, where)
    found = {"model": kind, **more, **_listed(tokens, vocab_size, where)}
    found |= _ids(tokens, named, files, where)
    for key, is_added in (("bos", begins), ("eos", ends)):
        if is_added and f"{key}_token_id" not in found:
            raise CheckpointError(f"{where}: {CONFIG} names no {key}_token, which its text gets")
    found |= {"add_bos_token": begins, "add_eos_token": ends}
    values = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return {**values, **_templates(files, config, where)}


def _object(files, name, where):
    if name not in files:
        return {}
    return parse_json_object(files[name], what=f"{where}/{name}")


def _pieces(files, where):
    """The SentencePiece model; None where there is none."""
    raw = files.get(MODEL)
    if raw is None or is_tiktoken(raw):
        return None
    return read_sentencepiece(raw, where=f"{where}/{MODEL}")


def _of_json(raw, pieces, where):
    """(model, tokens, further keys) of a tokenizer.json."""
    model = raw.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"{where}/{JSON}: a tokenizer of type {model.get('type')!a:.40} cannot be exported to "
            "GGUF; supported: BPE"
        )
    texts = {number: text for text, number in model["vocab"].items()}
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    if not model.get("byte_fallback"):
        name = _name_of_splitting(_splitting(raw, where), where)
        kinds = dict.fromkeys(texts, int(PieceKind.NORMAL))
        more = {"pre": name, "merges": tuple(" ".join(merge) for merge in merges)}
        return "gpt2", _Tokens(texts, kinds), {key: value for key, value in more.items() if value}
    if pieces is not None:
        tokens = _of_pieces(pieces)
        if any(tokens.texts.get(number, text) != text for number, text in texts.items()):
            raise CheckpointError(f"{where}: {JSON} and {MODEL} have other tokens; remove one")
        return "llama", tokens, _flags_of_pieces(pieces)
    return (
        "llama",
        _of_merges(texts, merges, model, where),
        {
            "pre": "default",
            "add_space_prefix": _puts_a_space(raw, where),
        },
    )


def _of_pieces(model):
    if model.model_type != BPE:
        raise UnsupportedModelError(
            f"{MODEL}: SentencePiece of another kind than BPE cannot be exported to GGUF"
        )
    rows = dict(enumerate(model.pieces))
    return _Tokens(
        {number: piece.text for number, piece in rows.items()},
        {number: int(piece.kind) for number, piece in rows.items()},
        {number: piece.score for number, piece in rows.items()},
    )


def _flags_of_pieces(model):
    return {
        "pre": "default",
        "add_space_prefix": bool(model.add_dummy_prefix),
        "remove_extra_whitespaces": bool(model.remove_extra_whitespaces),
    }


def _of_merges(texts, merges, model, where):
    """The tokens of a SentencePiece tokenizer of which only the merges are known. Its own scores
    are the ranks of its pieces, and the merges were made in that order."""
    ranks, last = {}, None
    for merge in merges:
        whole = "".join(merge)
        if whole != last and whole in ranks:
            raise UnsupportedModelError(
                f"{where}/{JSON}: the merges of {whole!a:.40} do not follow one another, so that "
                f"no scores of tokens say their order; put its {MODEL} there"
            )
        last = whole
        ranks.setdefault(whole, len(ranks))
    kinds = {}
    for number, text in texts.items():
        kind = BYTE if _BYTE_TEXT.fullmatch(text) else PieceKind.NORMAL
        kinds[number] = int(PieceKind.UNKNOWN if text == model.get("unk_token") else kind)
    # A token that no merge leads to is never joined: its score is the least.
    scores = {number: -float(ranks.get(text, len(ranks))) for number, text in texts.items()}
    return _Tokens(texts, kinds, scores)


def _puts_a_space(raw, where):
    """Whether a space is put before a text."""
    normalizer, words = raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    known = [
        step
        for step in steps
        if step.get("type") == "Prepend"
        or (step.get("type") == "Replace" and step.get("content") == "\u2581")
    ]
    is_metaspace = words.get("type") == "Metaspace"
    if (words and not is_metaspace) or [step for step in steps if step and step not in known]:
        raise UnsupportedModelError(
            f"{where}/{JSON}: splits or normalizes text in another way than SentencePiece, which "
            f"cannot be exported to GGUF; put its {MODEL} there"
        )
    if is_metaspace:
        return words.get("prepend_scheme", "always") != "never"
    return any(step["type"] == "Prepend" for step in known)


def _splitting(raw, where) -> SplitKind:
    """How a byte-level tokenizer.json splits text."""
    words = raw.get("pre_tokenizer") or {}
    splits = []
    for step in words.get("pretokenizers", [words]):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        how = (step.get("behavior"), step.get("invert"))
        if kind == "Split" and how in (("Isolated", False), ("Removed", True)):
            splits.append(pattern.get("Regex"))
        elif kind == "Digits" and step.get("individual_digits"):
            splits.append(_DIGIT)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            splits += KINDS["gpt-2"].splits if step.get("use_regex", True) else ()
        else:
            raise _not_named(where, f"its step {kind!a:.40}")
    normalizer = raw.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise _not_named(where, f"its normalizer {normalizer.get('type')!a:.40}")
    return SplitKind(
        tuple(splits),
        normalizer=normalizer and "NFC",
        whole_words_first=bool(raw["model"].get("ignore_merges")),
    )


def _name_of_splitting(found, where):
    for name in _WRITTEN:
        known = KINDS[name]
        if (known.splits, known.normalizer, known.whole_words_first) == (
            *(found.splits, found.normalizer),
            found.whole_words_first,
        ):
            return name
    raise _not_named(where, f"its expressions {found.splits!a:.80}")


def _not_named(where, what):
    return UnsupportedModelError(
        f"{where}/{JSON}: splits text in a way that has no name in GGUF ({what}); "
        f"named are: {', '.join(_WRITTEN)}"
    )


def _add(tokens, raw, config, files, where):
    """Adds the tokens that are found in a text as they are written."""
    rows = {row["id"]: row for row in raw.get("added_tokens") or ()}
    try:
        rows |= {int(n): row for n, row in (config.get("added_tokens_decoder") or {}).items()}
    except ValueError:
        raise CheckpointError(f"{where}/{CONFIG}: added_tokens_decoder has no ids") from None
    special = {_content(value) for key, value in config.items() if key.endswith("_token")}
    for text, number in _object(files, "added_tokens.json", where).items():
        rows.setdefault(number, {"content": text, "special": text in special})
    for number, row in rows.items():
        _refuse_flags(row, where)
        kind = PieceKind.CONTROL if row.get("special") else PieceKind.USER_DEFINED
        tokens.texts[number] = row["content"]
        if tokens.kinds.get(number) not in (PieceKind.UNKNOWN, BYTE):
            tokens.kinds[number] = int(kind)


def _refuse_flags(row, where):
    """Raises UnsupportedModelError for an added token that takes text besides its own, or is found
    between words alone: a file has no place for that, and the ids would be others."""
    found = next((flag for flag in ("lstrip", "rstrip", "single_word") if row.get(flag)), None)
    if found:
        raise UnsupportedModelError(
            f"{where}: its token {row['content']!a:.40} has {found}, which GGUF cannot say, so a "
            "text would get other tokens; export with --format huggingface"
        )


def _listed(tokens, vocab_size, where):
    """The tokens as lists of one length, that of the embedding, which may have more rows."""
    last = max(tokens.texts)
    if last >= vocab_size:
        raise CheckpointError(
            f"{where}: token {last} of the tokenizer is beyond the vocabulary of {vocab_size}, "
            "which GGUF has no place for"
        )
    numbers = range(vocab_size)
    found = {
        "tokens": tuple(tokens.texts.get(number, f"[PAD{number}]") for number in numbers),
        "token_type": tuple(tokens.kinds.get(number, UNUSED) for number in numbers),
    }
    if tokens.scores is not None:
        least = min(tokens.scores.values())
        found["scores"] = tuple(tokens.scores.get(number, least) for number in numbers)
    return found


def _named(config, files, where):
    """bos_token and so on -> its text."""
    said = {**_object(files, "special_tokens_map.json", where), **config}
    found = {name: _content(said.get(name)) for name in NAMED}
    return {name: text for name, text in found.items() if text is not None}


def _content(value):
    return value.get("content") if isinstance(value, Mapping) else value


def _around(raw, config, named, where):
    """Whether BOS is put before a text, and EOS after it. With a tokenizer.json by what it puts
    there, else by the flags, where BOS is usual of SentencePiece."""
    if not raw:
        flags = (config.get("add_bos_token", True), config.get("add_eos_token", False))
        return tuple(map(bool, flags))
    last = raw.get("post_processor") or {}
    steps = [
        step for step in last.get("processors", [last]) if step and step.get("type") != "ByteLevel"
    ]
    if any(step.get("type") != "TemplateProcessing" for step in steps) or len(steps) > 1:
        raise UnsupportedModelError(
            f"{where}/{JSON}: a post-processor of type {last.get('type')!a:.40} cannot be exported "
            "to GGUF; supported: TemplateProcessing"
        )
    parts = steps[0]["single"] if steps else [{"Sequence": {}}]
    texts = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in parts]
    text = texts.index(None)
    expected = ([], [named.get("bos_token")]), ([], [named.get("eos_token")])
    if texts[:text] not in expected[0] or texts[text + 1 :] not in expected[1]:
        raise UnsupportedModelError(
            f"{where}/{JSON}: puts {[one for one in texts if one]!a:.80} around a text, which "
            "cannot be exported to GGUF; supported: BOS before it and EOS after it"
        )
    return bool(texts[:text]), bool(texts[text + 1 :])


def _ids(tokens, named, files, where):
    """The ids of named tokens, and of further ends."""
    numbers = {text: number for number, text in tokens.texts.items()}
    missing = next((text for text in named.values() if text not in numbers), None)
    if missing is not None:
        raise CheckpointError(f"{where}/{CONFIG}: token {missing!a:.40} is not in the vocabulary")
    found = {NAMED[name]: numbers[text] for name, text in named.items()}
    said = {**_object(files, _MODEL_CONFIG, where), **_object(files, _GENERATION, where)}
    ends = said.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([*(found[key] for key in ENDS[:1] if key in found), *ends]))
    # Who reads the file knows these by their texts; so the keys are for others first.
    known = [
        end
        for end in ends[1:]
        if tokens.texts.get(end) in END_TEXTS and tokens.kinds[end] == PieceKind.CONTROL
    ]
    ends = [*ends[:1], *(end for end in ends[1:] if end not in known), *known]
    lost = [end for end in ends[len(ENDS) :] if end not in known]
    if lost:
        raise UnsupportedModelError(
            f"{where}: {len(ends)} tokens end a text, of which a GGUF file names {len(ENDS)} "
            f"(token {lost[0]}, {tokens.texts.get(lost[0])!a:.40}, has no place); take it out of "
            f"eos_token_id in {_GENERATION}, or export with --format huggingface"
        )
    return {**found, **dict(zip(ENDS, ends, strict=False))}


def _templates(files, config, where):
    """The chat templates: chat_template.jinja and those beside it go before the config's."""
    found = {}
    for name, raw in files.items():
        if name == _TEMPLATE:
            found["default"] = _text(raw, f"{where}/{name}")
        elif name.startswith(_TEMPLATES) and name.endswith(".jinja"):
            own = name.removeprefix(_TEMPLATES).removesuffix(".jinja")
            found[own] = _text(raw, f"{where}/{name}")
    said = config.get("chat_template")
    if not found and isinstance(said, str):
        found = {"default": said}
    elif not found and isinstance(said, list):
        found = {row["name"]: row["template"] for row in said}
    start = "tokenizer.chat_template"
    others = tuple(name for name in found if name != "default")
    return {
        **({start: found["default"]} if "default" in found else {}),
        **({f"{start}s": others} if others else {}),
        **{f"{start}.{name}": found[name] for name in others},
    }


def _text(raw, where):
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: not UTF-8") from None
