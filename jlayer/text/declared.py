"""What the files beside a tokenizer say of it: its tokens, their names, its flags and its class.

Which file wins is the rule of transformers (5.24). tokenizer_config.json with added_tokens_decoder
says everything. Without it the older files count: special_tokens_map.json goes before
tokenizer_config.json, and added_tokens.json has ids. The post-processor of tokenizer.json goes
before the flags add_bos_token and add_eos_token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jlayer.errors import CheckpointError
from jlayer.small_files import SmallFiles
from jlayer.text.model_class import class_of_model
from jlayer.text.tekken import is_to_be_mended

CONFIG, NAMES_FILE, TOKENS_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("add_bos_token", "add_eos_token")
# Tokens without a name are a list, under a new key and an old one, which counts if alone.
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_SETTINGS = (CONFIG, NAMES_FILE, TOKENS_FILE)
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Defaults:
    """What a tokenizer has by itself, where no file beside it says otherwise.

    named: bos_token and so on. flags: add_bos_token and add_eos_token.
    extra: added tokens without a name, which go before additional_special_tokens; None where the
    file has no list of them. more_extra: those that a class has besides.
    user_defined: pieces that are taken whole. The tokenizer itself does that; a class that
    replaces its parts (`classes`) needs them as added tokens.
    matches_raw_text: tokens are looked for in the text before it is normalized.
    goes_by_flags: BOS and EOS follow from the flags even if there is a post-processor.
    makes_special: named and extra tokens are special whatever the files say; keeps_flags: how they
    take spaces beside them stays as the files say.
    is_tiktoken: no class replaces how the tokenizer splits text.
    """

    named: dict[str, object] = field(default_factory=dict)
    extra: Sequence[object] | None = None
    more_extra: Sequence[object] = ()
    flags: Mapping[str, bool] = field(default_factory=dict)
    user_defined: Sequence[object] = ()
    matches_raw_text: bool = False
    goes_by_flags: bool = False
    makes_special: bool = False
    keeps_flags: bool = False
    is_tiktoken: bool = False


@dataclass(frozen=True)
class Declared:
    """The files of one folder, merged.

    settings: tokenizer_config.json, under special_tokens_map.json if that counts.
    more_names: named tokens of the model's own kinds, such as image_token, from a list of them.
    tokens: id → AddedToken, from added_tokens_decoder or added_tokens.json.
    tokens_where: the file that says so, for messages.
    is_complete: added_tokens_decoder is there, so `tokens` are all that there are.
    has_settings: there is a file with settings, so the folder is not one of Meta's own.
    tokenizer_class: the one that counts (`model_class`), without "Fast".
    is_to_be_mended: see `tekken`.
    """

    settings: Mapping[str, object]
    more_names: Mapping[str, object]
    tokens: Mapping[int, object]
    tokens_where: str
    is_complete: bool
    has_settings: bool
    tokenizer_class: str
    is_to_be_mended: bool
    where: str

    def named_tokens(
        self, defaults: Mapping[str, object], tokens: Mapping[int, object]
    ) -> dict[str, object]:
        """bos_token and so on → text or AddedToken, the seven usual names first.

        `defaults`: for names that no file has. A name that is null has no token. `tokens`: id →
        AddedToken, of which a name's token has the flags.
        Raises CheckpointError where one is not text.
        """
        settings = {**defaults, **self.settings}
        found = {name: settings[name] for name in NAMES if settings.get(name) is not None}
        found |= {name: value for name, value in settings.items() if _names_another(name, value)}
        found |= self.more_names
        same = {str(token.content): token for token in tokens.values()}
        return {
            name: same.get(text_of(token), token) if name in NAMES else token
            for name, token in self._checked(found).items()
        }

    def extra_tokens(self, own: Defaults) -> list:
        """Special tokens without a name, text or AddedToken."""
        key = _EXTRA if _EXTRA in self.settings else _OLD_EXTRA
        found = self.settings.get(key) or []
        if not isinstance(found, list):
            raise CheckpointError(f"{self.where}: {key} is {found!r}, expected a list")
        if key == _OLD_EXTRA:
            found = [*(found if own.extra is None else own.extra), *own.more_extra]
        return list(self._checked(dict(enumerate(found)), key).values())

    def extra_texts(self) -> list[str]:
        """The texts of extra_special_tokens."""
        if _EXTRA not in self.settings:
            return []
        return [text_of(token) for token in self.extra_tokens(Defaults())]

    def _checked(self, found, what=""):
        """The values as text or AddedToken."""
        tokens = {}
        for name, value in found.items():
            token = added_token(value) if isinstance(value, Mapping) else value
            if not isinstance(token, str) and not _is_token(token):
                label = f"{what}[{name}]" if isinstance(name, int) else name
                raise CheckpointError(
                    f"{self.where}: {label} is {value!r}, expected text or an object with a content"
                )
            tokens[name] = token
        return tokens


def read_declared(files: SmallFiles) -> Declared:
    """Raises CheckpointError where a file cannot be read."""
    config = _object(files, CONFIG)
    is_complete = config.get("added_tokens_decoder") is not None
    settings = dict(config)
    if files.has("tokenizer.json"):
        settings = {key: value for key, value in settings.items() if key not in FLAGS}
    if _OLD_EXTRA in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_OLD_EXTRA)
    more_names = _take_names(settings)
    if not is_complete:
        settings = _with_names(settings, _object(files, NAMES_FILE))
        more_names |= _take_names(settings)
    source = CONFIG if is_complete else TOKENS_FILE
    rows = config["added_tokens_decoder"] if is_complete else _object(files, TOKENS_FILE)
    where = files.where(source)
    model = _object(files, "config.json")
    tokenizer_class = config.get("tokenizer_class") or model.get("tokenizer_class")
    return Declared(
        settings=settings,
        more_names=more_names,
        tokens=_tokens_by_id(rows, where) if is_complete else _added_tokens(rows, settings, where),
        tokens_where=where,
        is_complete=is_complete,
        has_settings=bool(tokenizer_class) or any(map(files.has, _SETTINGS)),
        tokenizer_class=class_of_model(
            str(model.get("model_type")),
            str(tokenizer_class or "").removesuffix("Fast"),
            has_code="auto_map" in config,
        ),
        is_to_be_mended=is_to_be_mended(config, model),
        where=files.where(CONFIG),
    )


def added_token(row: Mapping) -> object | None:
    """The AddedToken that an object of a file stands for; None where it is none."""
    from tokenizers import AddedToken

    try:
        return AddedToken(
            row["content"], **{flag: row[flag] for flag in _TOKEN_FLAGS if flag in row}
        )
    except (KeyError, TypeError):
        return None


def _object(files, name):
    return files.json(name) if files.has(name) else {}


def _take_names(settings):
    """extra_special_tokens is a list of tokens, or an object of named ones, which is taken out."""
    return dict(settings.pop(_EXTRA)) if isinstance(settings.get(_EXTRA), Mapping) else {}


def _with_names(settings, names):
    """`settings` with those of special_tokens_map.json, where all tokens are special."""
    for key, value in names.items():
        if isinstance(value, Mapping) and key != _EXTRA:
            names[key] = added_token({**value, "special": True}) or value
    lists = [side.get(_EXTRA) for side in (settings, names)]
    if all(isinstance(each, list) for each in lists):
        names[_EXTRA] = lists[0] + [token for token in lists[1] if token not in lists[0]]
    return settings | names


def _names_another(name, value):
    """Whether a setting names a token of the model's own kind, such as eot_token."""
    if name in NAMES or not name.endswith("_token"):
        return False
    is_object = isinstance(value, Mapping) and value.get("__type") == "AddedToken"
    return is_object or isinstance(value, str) or _is_token(value)


def _tokens_by_id(rows, where):
    """Id → AddedToken, in ascending order: added_tokens_decoder of tokenizer_config.json."""
    try:
        found = {int(token_id): added_token(row) for token_id, row in rows.items()}
    except (ValueError, AttributeError):
        found = {0: None}
    if None in found.values():
        raise CheckpointError(
            f"{where}: added_tokens_decoder cannot be read; expected objects with a content by id"
        )
    return dict(sorted(found.items()))


def _added_tokens(rows, settings, where):
    """Id → AddedToken, in ascending order: added_tokens.json, which has text and ids alone."""
    from tokenizers import AddedToken

    for text, token_id in rows.items():
        if type(token_id) is not int or token_id < 0:
            raise CheckpointError(f"{where}: {text!r} has {token_id!r}, expected an id")
    extra = settings.get(_EXTRA)
    values = [*(settings.get(name) for name in NAMES), *(extra if isinstance(extra, list) else [])]
    special = {text_of(value) for value in values if not isinstance(value, Mapping)}
    return {
        token_id: AddedToken(text, normalized=text not in special, special=text in special)
        for text, token_id in sorted(rows.items(), key=lambda row: row[1])
    }


def _is_token(value):
    return hasattr(value, "content")


def text_of(token: object) -> str | None:
    """The text of a token as a file or the library has it."""
    if isinstance(token, Mapping):
        return token.get("content")
    return str(token.content) if _is_token(token) else token
