"""A folder's tokenizer files → a tokenizer of the `tokenizers` library with all its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jlayer.errors import CheckpointError
from jlayer.strict import read_small_file
from jlayer.text.bpe import build
from jlayer.text.classes import CLASSES, SPACE, rebuilt, replaces_parts
from jlayer.text.declared import FLAGS, Declared, Defaults, text_of
from jlayer.text.sentencepiece import from_sentencepiece
from jlayer.text.special_tokens import add_tokens, check_ids, mark_special
from jlayer.text.tiktoken import from_tiktoken
from jlayer.tokenizer_files import is_tiktoken


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


def load(folder: Path, declared: Declared) -> Loaded | None:
    """None where the folder has no tokenizer.json and no tokenizer.model.

    Raises CheckpointError (a damaged file) or UnsupportedModelError (a kind that no Llama uses).
    """
    is_json = (folder / "tokenizer.json").exists()
    path = folder / ("tokenizer.json" if is_json else "tokenizer.model")
    if not path.exists():
        return None
    raw, where = read_small_file(path), str(path)
    file, own = _from_json(raw, where) if is_json else _from_model_file(raw, declared, where)
    library, own_class = file, CLASSES.get(declared.tokenizer_class)
    if own_class is not None and (is_tiktoken(raw) or replaces_parts(own_class, file)):
        # A tiktoken file keeps its parts: of the class it takes the tokens alone.
        library = file if is_tiktoken(raw) else rebuilt(file, own_class, declared.settings)
        own = _with_class(own, own_class)
    tokens = dict(declared.tokens)
    if is_json and not declared.is_complete:
        tokens |= file.get_added_tokens_decoder()
    if own.matches_raw_text:
        tokens = {token_id: _raw(token) for token_id, token in tokens.items()}
    named = _add_declared(library, declared, own, tokens)
    flags = {**own.flags, **declared.settings}
    by_flags = own.goes_by_flags or any(flag in flags for flag in FLAGS)
    if by_flags or library.post_processor is None:
        library.post_processor = _ends_by_flags(library, flags, named, where)
    return Loaded(
        library, named, _doubles_first_space(file, library), _cleans_up(library, flags), where
    )


def _with_class(own, own_class):
    """What a class says goes before what its file says."""
    lists = (own.extra, own.user_defined, own_class.extra)
    return Defaults(
        own_class.named,
        [token for each in lists for token in each or ()] if any(lists) else None,
        flags={**own.flags, **own_class.flags},
        goes_by_flags=own_class.goes_by_flags,
        makes_special=own_class.makes_special,
    )


def _add_declared(library, declared, own, tokens):
    """Adds all tokens that the files declare; bos_token and so on → text."""
    named, extra = declared.named_tokens(own.named, tokens), declared.extra_tokens(own.extra)
    add_tokens(library, tokens, named.values(), extra)
    if own.makes_special:
        mark_special(library, [*named.values(), *extra])
    check_ids(library, declared.tokens, where=declared.tokens_where)
    library.encode_special_tokens = bool(declared.settings.get("split_special_tokens"))
    return {name: text_of(token) for name, token in named.items()}


def _from_json(raw, where):
    from tokenizers import Tokenizer as Library

    library = build(lambda: Library.from_buffer(raw), where=where)
    # Some files keep the settings of training; a prompt is never cut or padded here.
    library.no_truncation()
    library.no_padding()
    return library, Defaults()


def _from_model_file(raw, declared, where):
    """The tokenizer, and what it has by itself. Where nothing stands beside it, it is Meta's own
    folder, and Meta's code puts BOS before a text."""
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


def _ends_by_flags(library, flags, named, where):
    """What puts BOS before a text by add_bos_token, and EOS after it by add_eos_token."""
    from tokenizers import processors

    ids = {}
    for name in ("bos", "eos"):
        text = named.get(f"{name}_token") if flags.get(f"add_{name}_token") else None
        if text is not None:
            ids[name] = library.token_to_id(text)
        if ids.get(name, 0) is None:
            raise CheckpointError(
                f"{where}: add_{name}_token is set, but {name}_token {text!r} is no token of the "
                "vocabulary; name another one in tokenizer_config.json"
            )
    parts = [name for name in ("bos", "$A", "eos") if name == "$A" or name in ids]
    return processors.TemplateProcessing(single=parts, special_tokens=list(ids.items()))
