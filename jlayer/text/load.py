"""A folder's tokenizer files → a tokenizer of the `tokenizers` library with all its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata

from jlayer.small_files import SmallFiles
from jlayer.text.bpe import build
from jlayer.text.classes import CLASSES, SPACE, rebuilt, replaces_parts
from jlayer.text.declared import FLAGS, Declared, Defaults, text_of
from jlayer.text.sentencepiece import from_sentencepiece
from jlayer.text.special_tokens import add_tokens, check_ids, mark_special
from jlayer.text.tekken import mend
from jlayer.text.tiktoken import from_tiktoken
from jlayer.tokenizer_files import is_tiktoken

_MERGES = "merges.txt"  # beside vocab.json
_VERSIONED = re.compile(r"tokenizer\.([0-9.]+)\.json")


@dataclass(frozen=True)
class Loaded:
    """library: the tokenizer, with all tokens that the files declare; its post-processor adds BOS
    and EOS.
    named: bos_token and so on → text.
    doubles_first_space: a text that begins with a space gets another one before it.
    cleans_up: decoded text loses its spaces before punctuation.
    where: the file that the vocabulary is from, for messages.
    """

    library: object
    named: Mapping[str, str]
    doubles_first_space: bool
    cleans_up: bool
    where: str


def load(files: SmallFiles, declared: Declared) -> Loaded | None:
    """None where there is no tokenizer.

    Raises CheckpointError (a damaged file) or UnsupportedModelError (a kind that no Llama uses).
    """
    own_class = CLASSES.get(declared.tokenizer_class)
    name, read = _vocabulary_file(files, own_class, declared.settings)
    if read is None:
        return None
    file, own = read(files, name, declared)
    library = file
    if own_class is not None and (own.is_tiktoken or replaces_parts(own_class, file)):
        # Of the class a tokenizer that is taken whole has the tokens alone.
        if not own.is_tiktoken and not _is_whole(read, declared.settings):
            library = rebuilt(file, own_class, declared.settings)
        own = _with_class(own, own_class)
    tokens = dict(declared.tokens)
    if not declared.is_complete:
        tokens |= file.get_added_tokens_decoder() if read is _from_json else {}
    if own.matches_raw_text:
        tokens = {token_id: _raw(token) for token_id, token in tokens.items()}
    named = _add_declared(library, declared, own, tokens)
    if declared.is_to_be_mended:
        mend(library)
    flags = {**own.flags, **declared.settings}
    by_flags = own.goes_by_flags or any(flag in flags for flag in FLAGS)
    if by_flags or library.post_processor is None:
        library.post_processor = _ends_by_flags(library, flags, named)
    return Loaded(
        library=library,
        named=named,
        doubles_first_space=_doubles_first_space(file, library),
        cleans_up=_cleans_up(library, flags),
        where=files.where(name),
    )


def _vocabulary_file(files, own_class, settings):
    """(the file that the vocabulary is in, what reads it), or (None, None)."""
    json_name = _json_name(files, settings.get("fast_tokenizer_files"))
    for name, read in ((json_name, _from_json), ("tokenizer.model", _from_model_file)):
        if files.has(name):
            return name, read
    is_byte_level = own_class is not None and own_class.is_byte_level
    if is_byte_level and all(map(files.has, ("vocab.json", _MERGES))):
        return "vocab.json", _from_vocabulary_and_merges
    return None, None


def _json_name(files, versioned):
    """The file in the place of tokenizer.json.

    `versioned`: files for releases of transformers from a version on, such as tokenizer.4.0.0.json.
    The newest counts that the installed release takes.
    """
    matches = [_VERSIONED.fullmatch(str(name)) for name in versioned or ()]
    names = {_numbers(m[1]): m[0] for m in matches if m and files.has(m[0])}
    usable = [v for v in names if v <= _numbers(metadata.version("transformers"))]
    return names[max(usable)] if usable else "tokenizer.json"


def _numbers(version):
    return tuple(int(word) for word in re.findall(r"\d+", version)[:3])


def _is_whole(read, settings):
    """Whether a tokenizer.json splits text its own way, whatever the class. transformers takes it
    so where tokenizer_config.json says trust_remote_code. (No code is run for that.)"""
    return read is _from_json and bool(settings.get("trust_remote_code"))


def _with_class(own, own_class):
    """What a class says goes before what its file says."""
    return Defaults(
        own_class.named,
        None if own.extra is None else [*own.extra, *own.user_defined],
        own_class.extra,
        flags={**own.flags, **own_class.flags},
        goes_by_flags=own_class.goes_by_flags,
        makes_special=own_class.makes_special,
        keeps_flags=own_class.keeps_flags,
    )


def _add_declared(library, declared, own, tokens):
    """Adds all tokens that the files declare; bos_token and so on → text."""
    named, extra = declared.named_tokens(own.named, tokens), declared.extra_tokens(own)
    add_tokens(library, tokens, named.values(), extra)
    if own.makes_special:
        mark_special(library, [*named.values(), *extra], keeps_flags=own.keeps_flags)
    check_ids(library, declared.tokens, where=declared.tokens_where)
    library.encode_special_tokens = bool(declared.settings.get("split_special_tokens"))
    return {name: text_of(token) for name, token in named.items()}


def _from_json(files, name, declared):
    from tokenizers import Tokenizer as Library

    raw = files.read(name)
    library = build(lambda: Library.from_buffer(raw), where=files.where(name))
    # Some files keep the settings of training; a prompt is never cut or padded here.
    library.no_truncation()
    library.no_padding()
    return library, Defaults()


def _from_vocabulary_and_merges(files, name, declared):
    """The two files of GPT-2's form, which only a class of byte-level tokenizers completes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    vocab, raw, other = files.json(name), files.read(_MERGES), files.where(_MERGES)
    lines = build(raw.decode, where=other).split("\n")
    rows = (line for line in lines if line and not line.startswith("#version"))
    merges = [tuple(row.rstrip("\r").split(" ")) for row in rows]
    return build(lambda: Library(models.BPE(vocab, merges)), where=other), Defaults()


def _from_model_file(files, name, declared):
    """The tokenizer, and what it has by itself. Where nothing stands beside it, it is Meta's own
    folder, and Meta's code puts BOS before a text."""
    raw, where = files.read(name), files.where(name)
    if is_tiktoken(raw):
        library, own = from_tiktoken(raw, declared, where=where)
    else:
        has_class = declared.tokenizer_class in CLASSES
        names = {} if has_class else {i: token.content for i, token in declared.tokens.items()}
        legacy = has_class or bool(declared.settings.get("legacy", True))
        library, own = from_sentencepiece(raw, names, legacy=legacy, where=where)
    return library, own if declared.has_settings else replace(own, flags={"add_bos_token": True})


def _raw(token):
    """The token, looked for in the text as it stands, before that is normalized."""
    from tokenizers import AddedToken

    return AddedToken(**{**token.__getstate__(), "normalized": False})


def _doubles_first_space(file, library):
    """Whether the file puts a space before a text that begins with one, and the class does not.

    SentencePiece does, as the published models were trained; Metaspace, the class's way, does not.
    """
    if getattr(library.pre_tokenizer, "prepend_scheme", "never") == "never":
        return False
    return file.normalizer is not None and file.normalizer.normalize_str(" ") == 2 * SPACE


def _cleans_up(library, settings):
    """Whether clean_up_tokenization_spaces counts: for BPE it would take spaces of the text."""
    always = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    is_bpe = type(library.model).__name__ == "BPE"
    return bool(settings.get("clean_up_tokenization_spaces") and (always or not is_bpe))


def _ends_by_flags(library, flags, named):
    """What puts BOS before a text by add_bos_token, and EOS after it by add_eos_token, where the
    files name such a token."""
    from tokenizers import processors

    wanted = [name for name in ("bos", "eos") if flags.get(f"add_{name}_token")]
    found = {name: library.token_to_id(named.get(f"{name}_token", "")) for name in wanted}
    ids = {name: token_id for name, token_id in found.items() if token_id is not None}
    parts = [name for name in ("bos", "$A", "eos") if name == "$A" or name in ids]
    return processors.TemplateProcessing(single=parts, special_tokens=list(ids.items()))
