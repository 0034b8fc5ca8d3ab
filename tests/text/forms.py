"""A published form of a tokenizer's files: the side files' shape, with a small vocabulary.

Ids of added tokens follow the small vocabulary, and long lists of reserved tokens are cut. Keys,
classes and kinds of values are as in the source; templates are cut to what user and assistant say.
"""

from dataclasses import dataclass, field

from tests.text.reference import named, token

LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
TEXTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
UNCLEANED = {"clean_up_tokenization_spaces": False}


def objects(**flags):
    """bos_token and so on as tokenizer_config.json has them where they are no text."""
    return {name: named(text, **flags) for name, text in TEXTS.items()}


def bare(config):
    """The same, as special_tokens_map.json has them."""
    return {
        name: {key: value for key, value in row.items() if key != "__type"}
        for name, row in config.items()
    }


OBJECTS, NORMALIZED = objects(), objects(normalized=True)


@dataclass(frozen=True)
class Form:
    """source: see `tests.sources`. vocabulary: a name of `reference`. config:
    tokenizer_config.json, whose added_tokens_decoder is `base`, then `added` from the first free
    id on; none where `base` is None. in_json: tokens that tokenizer.json has itself. files: the
    others. fails_there: transformers fails on itself with it."""

    family: str
    source: str
    vocabulary: str
    config: dict | None
    added: tuple = ()
    base: dict | None = None
    in_json: tuple = ()
    fails_there: bool = False
    files: dict = field(default_factory=dict)


def form(
    family, source, vocabulary, config, *added, base=None, in_json=(), fails_there=False, **files
):
    rows = tuple(token(each) if isinstance(each, str) else each for each in added)
    named_files = {
        {"names": "special_tokens_map.json", "tokens": "added_tokens.json"}.get(name, name): value
        for name, value in files.items()
    }
    return Form(family, source, vocabulary, config, rows, base, in_json, fails_there, named_files)


def jinja(source, name="chat_template.jinja"):
    return {name: source.encode()}
