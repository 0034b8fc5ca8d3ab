"""Every crossing of tokenizer files and flags, against the installed transformers.

What differs is a row of EXPLAINED, with its reason; a row that nothing needs any more fails.
"""

import itertools
import random

import pytest

from tests.campaigns import slow_but
from tests.text.reference import (
    VOCABULARIES,
    differences,
    n_tokens,
    named,
    ours,
    theirs,
    token,
    vocabulary,
    write,
)

pytestmark = pytest.mark.reference

CLASSES = (
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizerFast",
    "Qwen2Tokenizer",
    "GemmaTokenizerFast",
    "LLaMATokenizer",
)
SENTENCE_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")
REPLACING = (*SENTENCE_CLASSES, "GPT2Tokenizer", "GPTNeoXTokenizerFast", "Qwen2Tokenizer")
REPLACING = (*REPLACING, "GemmaTokenizerFast")


def first_space(case, kind, text, a, b):
    """A space before a text that begins with one: SentencePiece puts it, as the golden files have
    it and as the file's own normalizer says. Transformers' class for such files leaves it out."""
    return (
        kind in ("ids", "text")
        and text[:1] in (" ", "▁")
        and case["class"] in SENTENCE_CLASSES
        and case["vocabulary"] in ("json", "json and model", "bpe")
    )


def unigram_as_bpe(case, kind, text, a, b):
    """A class that is made for BPE splits a unigram model by merges that it makes up. Ours are the
    ids of SentencePiece, which the model was trained with."""
    return case["vocabulary"].startswith("unigram") and case["class"] in REPLACING


def impossible_id(case, kind, text, a, b):
    """Files that contradict each other: a token is said to have an id that the vocabulary gives to
    another, or that is not the next free one. Transformers gives another id, without a word."""
    return kind == "refused" and "is to have id" in str(a)


def tokens_as_objects(case, kind, text, a, b):
    """additional_special_tokens of objects in special_tokens_map.json: older versions wrote it,
    transformers 5 fails with "Input must be a List[Union[str, AddedToken]]"."""
    return kind == "refused" and "Input must be a List" in str(b)


def nameless(case, kind, text, a, b):
    """A token named "", as some early files have it: transformers 5 fails on itself if that is
    unk_token, and with add_bos_token puts the unknown token before the text. Ours is no token."""
    if kind == "refused":
        return isinstance(b, RecursionError)
    config = case["files"].get("tokenizer_config.json", {})
    return kind == "ids" and config.get("bos_token") == "" and len(b) > len(a)


def infill_piece(case, kind, text, a, b):
    """CodeLlama's class with another eot_token: transformers then no longer knows the usual piece
    as a token, ours knows both. No maker publishes that."""
    of_class = case["class"] == "CodeLlamaTokenizer" and "eot_token" in str(case["files"])
    return of_class and kind == "size"


def pieces_without_a_file(case, kind, text, a, b):
    """vocab.json and merges.txt with a class for SentencePiece's files, which has no such form:
    transformers makes a tokenizer that knows no text."""
    return (
        kind == "refused"
        and case["vocabulary"] == "vocab and merges"
        and case["class"] in (*SENTENCE_CLASSES, "GemmaTokenizerFast")
    )


EXPLAINED = (
    first_space,
    unigram_as_bpe,
    impossible_id,
    tokens_as_objects,
    nameless,
    infill_piece,
    pieces_without_a_file,
)


def unexplained(cases, folder):
    """(What no row explains, the rows that explained something.)"""
    left, used = [], set()
    for number, case in enumerate(cases):
        files = {**vocabulary(case["vocabulary"]), **case["files"]}
        if case["class"]:
            files["tokenizer_config.json"] = {
                **files.get("tokenizer_config.json", {}),
                "tokenizer_class": case["class"],
            }
        here = write(folder / str(number), files)
        for found in differences(ours(here), theirs(here)):
            reasons = [reason for reason in EXPLAINED if reason(case, *found)]
            used.update(reasons)
            if not reasons:
                left.append((case["vocabulary"], case["class"], case["files"], *found))
    return left, used


@pytest.fixture(autouse=True)
def no_cache_of_tiktoken(monkeypatch):
    """It knows a file by its path alone, and keeps a copy of it for ever."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


FLAGS = [{}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}]
FLAGS += [{"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": None}]
FLAGS += [{"legacy": True}, {"legacy": False}, {"legacy": None}]
CLEAN_UP = "clean_up_tokenization_spaces"
FORCED = {CLEAN_UP: True, f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output": True}
FLAGS += [{CLEAN_UP: True}, FORCED]
FLAGS += [{"add_prefix_space": False}, {"add_prefix_space": True, "legacy": True}]
FLAGS += [{"trust_remote_code": True}, {"trust_remote_code": True, "legacy": True}]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("name", slow_but(VOCABULARIES, VOCABULARIES[::3]))
def test_flags_and_classes(tmp_path, name):
    """Of all crossings a seventh, another for each vocabulary."""
    crossing = list(itertools.product(CLASSES, FLAGS, ({}, NAMED)))
    cases = [
        {"vocabulary": name, "class": cls, "files": {"tokenizer_config.json": flags | names}}
        for cls, flags, names in crossing[VOCABULARIES.index(name) % 7 :: 7]
    ]
    left, _ = unexplained(cases, tmp_path)
    assert left == []


@pytest.mark.parametrize("name", ["json", "bpe", "bytes", "vocab and merges"])
def test_a_class_that_config_json_names(tmp_path, name):
    for cls in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2TokenizerFast"):
        files = {"config.json": {"model_type": "llama", "tokenizer_class": cls}}
        here = write(tmp_path / cls, {**vocabulary(name), **files})
        case = {"vocabulary": name, "class": cls, "files": {}}
        found = differences(ours(here), theirs(here))
        assert not [each for each in found if not any(row(case, *each) for row in EXPLAINED)]


def test_metas_own_folder(tmp_path):
    """tokenizer.model and nothing beside it: Meta's code puts BOS before a text. Transformers puts
    none; where it reads a model, there are other files."""
    for name in ("bpe", "tiktoken"):
        here = write(tmp_path / name, vocabulary(name))
        one, other = ours(here), theirs(here)
        bare = one.encode("a king", add_special_tokens=False)
        assert bare == other.encode("a king")
        assert one.encode("a king") == [one.bos_token_id, *bare]


def test_bos_and_eos_by_every_combination_of_files_and_flags(tmp_path):
    """216 of them; before they were held against the reference, 132 differed."""
    flag = ({}, True, False)
    crossing = itertools.product(
        ("json", "bpe", "json and model"),
        flag,
        flag,
        ({}, NAMED),
        (None, "LlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"),
    )
    cases = []
    for name, bos, eos, names, cls in crossing:
        config = dict(names)
        config |= {"add_bos_token": bos} if bos != {} else {}
        config |= {"add_eos_token": eos} if eos != {} else {}
        files = {"tokenizer_config.json": config}
        cases.append({"vocabulary": name, "class": cls, "files": files})
    assert len(cases) == 216
    left, used = unexplained(cases, tmp_path)
    assert left == []
    assert used == {first_space}


def added_files(n):
    """added_tokens.json, special_tokens_map.json and tokenizer_config.json in many forms; `n` is
    the first free id."""
    bare = {key: value for key, value in token("<extra>", lstrip=True).items() if key != "special"}
    added = [
        {},
        {"<|im_end|>": n, "<|im_start|>": n + 1},
        {"<|im_start|>": n + 1, "<|im_end|>": n},
        {"[PAD]": n},
        {"<extra>": n, "<pad>": n + 1},
        {"<extra>": n + 7},
    ]
    names = [
        {},
        NAMED,
        {"bos_token": named("<s>", lstrip=True), "eos_token": "<|im_end|>", "pad_token": "[PAD]"},
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None},
        {"additional_special_tokens": [bare], "eos_token": "<|im_end|>"},
        {"eot_token": "<|eot_id|>", "unk_token": bare},
        {"extra_special_tokens": ["<extra>"]},
        {"extra_special_tokens": {"image_token": "<extra>"}},
    ]
    for row in names:
        for value in row.values():
            if isinstance(value, dict):
                value.pop("__type", None)
    rows = {str(n): token("<|im_start|>"), str(n + 1): token("<|im_end|>", special=False)}
    stripped = {str(n): token("<extra>", lstrip=True, rstrip=True)}
    renamed = {"1": token("<s>", rstrip=True), "2": token("</s>", special=False)}
    configs = [
        {},
        NAMED,
        {"eos_token": named("<|im_end|>", lstrip=True), "bos_token": named("<s>", normalized=True)},
        {"eot_token": "<|eot_id|>", "image_token": "<extra>"},
        {"eot_token": named("<|eot_id|>"), "image_token": bare, "other_token": {"a": 1}},
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"additional_special_tokens": [], "unk_token": None},
        {"extra_special_tokens": {"boi_token": "<extra>"}, "pad_token": "[PAD]"},
        {"extra_special_tokens": ["<extra>"], "additional_special_tokens": ["<pad>"]},
        {"added_tokens_decoder": rows},
        {"added_tokens_decoder": rows, "eos_token": "<|im_end|>", "eot_token": "<|eot_id|>"},
        {
            "added_tokens_decoder": stripped,
            "additional_special_tokens": ["<extra>"],
            "eos_token": "<extra>",
            "pad_token": "<pad>",
        },
        {"added_tokens_decoder": renamed, **NAMED, "add_bos_token": True, "add_eos_token": True},
        {"added_tokens_decoder": {}},
        {"split_special_tokens": True, "bos_token": "<s>"},
        {"bos_token": "", "eos_token": "", "unk_token": ""},
        {"bos_token": None, "add_bos_token": True},
        {"add_bos_token": None, "pad_token": None, "mask_token": "<extra>"},
    ]
    return added, names, configs


def test_tokens_declared_outside_the_vocabulary(tmp_path):
    """Two hundred of the crossings, drawn once and for all. (Thousands more were tried once.)"""
    rng = random.Random(5)
    names = {"special_tokens_map.json": {"eot_token": "<|eot_id|>"}}
    cases = [{"vocabulary": "json", "class": "CodeLlamaTokenizer", "files": names}]
    for name in VOCABULARIES:
        crossing = list(itertools.product(CLASSES, *added_files(n_tokens(name))))
        for cls, added, names, config in rng.sample(crossing, 20):
            files = {
                "added_tokens.json": added,
                "special_tokens_map.json": names,
                "tokenizer_config.json": config,
            }
            files = {file: content for file, content in files.items() if content}
            cases.append({"vocabulary": name, "class": cls, "files": files})
    left, used = unexplained(cases, tmp_path)
    assert left == []
    assert used == set(EXPLAINED)
