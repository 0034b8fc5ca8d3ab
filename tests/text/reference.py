"""Small tokenizers of every published form, and how one of ours differs from that of transformers.

Everything is asked of the installed transformers; nothing is remembered.
"""

import base64
import functools
import io
import json

import pytest

from jlayer.errors import CheckpointError
from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer
from tests.conftest import BUNDLED
from tests.text.samples import folder_of

CORPUS = [
    *["a king was there. a queen, and the king said: hello! there was a girl"] * 20,
    *["the cat sat on the mat 123", "Once upon a time"] * 10,
    *(f"word{i} the thing number {i} went home early in the morning" for i in range(40)),
]
TEXTS = (
    "",
    " ",
    "a king",
    " a king",
    "  two  spaces",
    "▁x ▁",
    "é😀 日",
    "the cat. there , it 's",
    "<s>a king</s> b",
    "a </s>  b<unk>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x <pad> y[PAD]z",
    "<c1>a<u1>b the <u1>",
    "a<extra> b",
    "a  <extra>  b",
    "<|eot_id|> a<|begin_of_text|>",
)
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BPE = {"model_type": "bpe", "vocab_size": 360, "byte_fallback": True}
UNIGRAM = {"model_type": "unigram"}
SENTENCEPIECE = {
    "bpe": BPE | PLAIN,
    "bpe, normalized": BPE | {"user_defined_symbols": ["<u1>", "the"], "control_symbols": ["<c1>"]},
    "bpe, no first space": BPE | PLAIN | {"add_dummy_prefix": False},
    "unigram": UNIGRAM | {"vocab_size": 80},
    "unigram, bytes": UNIGRAM
    | {"vocab_size": 340, "byte_fallback": True, "user_defined_symbols": ["<u1>"]},
}


@functools.cache
def sentencepiece_file(name):
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **SENTENCEPIECE[name],
    )
    return out.getvalue()


def tiktoken_file():
    tokens = [*(bytes([n]) for n in range(256)), b"th", b"the", b" a"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    return "".join(lines).encode()


@functools.cache
def json_file(name):
    if name == "bytes":
        return (BUNDLED / "tokenizer.json").read_bytes()
    return (folder_of("stories260K") / "tokenizer.json").read_bytes()


def vocabulary(name):
    """The files of a vocabulary: tokenizer.json, tokenizer.model or both."""
    if name == "json and model":
        return {**vocabulary("json"), **vocabulary("bpe")}
    if name == "vocab and merges":
        model = json.loads(json_file("bytes"))["model"]
        merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
        return {"vocab.json": model["vocab"], "merges.txt": f"#version: 0.2\n{merges}".encode()}
    if name in ("json", "bytes"):
        return {"tokenizer.json": json_file(name)}
    raw = tiktoken_file() if name == "tiktoken" else sentencepiece_file(name)
    return {"tokenizer.model": raw}


VOCABULARIES = ("json", "bytes", "json and model", *SENTENCEPIECE, "tiktoken", "vocab and merges")


@functools.cache
def n_tokens(name):
    """The id of the first token that files beside the vocabulary may add."""
    files = vocabulary(name)
    if "vocab.json" in files:
        return len(files["vocab.json"])
    if "tokenizer.json" in files:
        return len(json.loads(files["tokenizer.json"])["model"]["vocab"])
    if name == "tiktoken":
        return files["tokenizer.model"].count(b"\n")
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    return processor.get_piece_size()


def token(content, **flags):
    """A row of added_tokens_decoder."""
    usual = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **usual, "special": True, **flags}


def named(content, **flags):
    """An object for bos_token and so on, as tokenizer_config.json has it."""
    row = token(content, **flags)
    del row["special"]
    return {"__type": "AddedToken", **row}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder


def theirs(folder):
    """The tokenizer of transformers; the error where it has none."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        return error


def ours(folder):
    try:
        return Tokenizer.from_folder(folder) or CheckpointError(NO_TOKENIZER)
    except CheckpointError as error:
        return error


def attempt(encode, text, **options):
    """The ids, or None where the tokenizers library fails; ours tells so in its own words."""
    try:
        return encode(text, **options)
    except Exception as error:  # the library raises this very class
        if not isinstance(error, CheckpointError) and "Unk token" not in str(error):
            raise
        return None


def differences(one, other):
    """(kind, text, ours, theirs) of everything in which two tokenizers differ."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        both = isinstance(one, Exception) and isinstance(other, Exception)
        return [] if both else [("refused", "", one, other)]
    found = []
    for text in TEXTS:
        for add in (True, False):
            a, b = (attempt(each.encode, text, add_special_tokens=add) for each in (one, other))
            found += [("ids", text, a, b)] * (a != b)
        for skip in (True, False) if isinstance(b, list) else ():
            a = one.decode(b, skip_special_tokens=skip)
            c = other.decode(b, skip_special_tokens=skip)
            found += [("text", text, a, c)] * (a != c)
    names = other.special_tokens_map
    found += [("names", "", one.named_tokens, names)] * (one.named_tokens != names)
    of = other.backend_tokenizer.token_to_id  # `eos_token_id` fails where the token is ""
    for name in ("bos_token", "eos_token"):
        a, b = getattr(one, f"{name}_id"), of(names[name]) if name in names else None
        found += [(f"{name}_id", "", a, b)] * (a != b)
    found += [("size", "", one.vocab_size, len(other))] * (one.vocab_size != len(other))
    return found
