"""Tokenizers in the shapes of the dense families, against the installed transformers."""

import json
import random

import pytest

from jlayer.families.registry import FAMILIES as KNOWN
from jlayer.text.model_class import CLASS_OF, FILE_AS_IT_IS, OVERRULED
from jlayer.text.stream import TextStream
from tests.text.built import CL100K, byte_level, files_of, folder_of, split
from tests.text.families import FAMILIES, METASPACE
from tests.text.reference import attempt, differences, ours, theirs, write

pytestmark = pytest.mark.reference
TRICKY = (
    "",
    " ",
    "\n",
    "  \n\n \n\n\n  x",
    "a king",
    " a king said: don't, I'LL we'Ve",
    "  two  spaces   three    four\t\ttabs ",
    "▁x ▁▁ y▁",
    "e\u0301 o\u0302\u0323 \u1e9b\u0323 ﬁ Å \u212b",  # NFC changes some of these
    "naïve café ÀÉÎ\u0300 🇫🇷👩‍👩‍👧 日本語 中文 \u200d\u00a0\u3000",
    "12 345 6789 ٣٤ 四 ½²",
    "def f(x):\n    return x**2  # ok\n\n",
    "HelloWorld camelCase XMLHttp",
    "a . b , c ! do n't it 's",
    "https://a.b/c//d?e=f/ ...!!! \r\n\r\n",
    "\u0000\u0001\ufffd \U0001d518",
)


def around(rows, rng):
    """Texts with the added tokens: alone, glued to words, beside spaces, doubled."""
    texts = [row["content"] for row in rows]
    found = [f"a {text}  b{text}c\n{text}\n {text}{text}" for text in texts]
    for _ in range(12):
        parts = [*texts, " ", "  ", "\n", "a king", "12", "é", "<", "|>", "▁"]
        found.append("".join(rng.choice(parts) for _ in range(7)))
    return found


def compare(one, other, texts):
    for text in texts:
        for add in (True, False):
            ids = other.encode(text, add_special_tokens=add)
            assert one.encode(text, add_special_tokens=add) == ids, (text, add)
        for skip in (True, False):
            expected = other.decode(ids, skip_special_tokens=skip)
            assert one.decode(ids, skip_special_tokens=skip) == expected, text
            stream = TextStream(one, skip_special_tokens=skip)
            found = "".join([*map(stream.step, ids), stream.finish()])
            assert found == expected, text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_speaks_as_transformers_has_it(tmp_path, name):
    """As it is published, and as transformers saves what it made of that."""
    built = FAMILIES[name]
    rng = random.Random(name)
    rows = files_of(built)["tokenizer.json"]["added_tokens"]
    texts = [*TRICKY, *around(rows, rng)]
    published = folder_of(built, tmp_path / "published")
    other = theirs(published)
    assert not isinstance(other, Exception), other
    saved = tmp_path / "saved"
    other.save_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({"model_type": built.model_type}))
    for folder, reference in ((published, other), (saved, theirs(saved))):
        one = ours(folder)
        compare(one, reference, texts)
        assert differences(one, reference) == []
        ids = [rng.randrange(one.vocab_size) for _ in range(300)]
        for at in range(0, 300, 10):
            some = ids[at : at + 10]
            assert one.decode(some) == reference.decode(some, skip_special_tokens=True)
    assert other.encode("a king")


def test_a_stream_of_any_ids_is_their_text(tmp_path):
    rng = random.Random(4)
    for number, (name, built) in enumerate(FAMILIES.items()):
        one = ours(folder_of(built, tmp_path / str(number)))
        for _ in range(30):
            ids = [rng.randrange(one.vocab_size) for _ in range(rng.randrange(20))]
            for skip in (True, False):
                stream = TextStream(one, skip_special_tokens=skip)
                found = "".join([*map(stream.step, ids), stream.finish()])
                assert found == one.decode(ids, skip_special_tokens=skip), (name, ids)


def test_a_token_that_one_file_calls_special_and_another_does_not(tmp_path):
    """Both leave it out of decoded text, so a stream leaves it out too."""
    files = files_of(FAMILIES["qwen 3"])
    decoder = files["tokenizer_config.json"]["added_tokens_decoder"]
    (key,) = (key for key, row in decoder.items() if row["content"] == "<|im_start|>")
    decoder[key]["special"] = False
    files["tokenizer_config.json"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    del files["tokenizer_config.json"]["additional_special_tokens"]
    folder = write(tmp_path, files)
    compare(ours(folder), theirs(folder), ["a<|im_start|>b<|im_end|>"])


@pytest.mark.parametrize("family", ["command r", "qwen 3"])
def test_a_named_token_that_takes_the_spaces_beside_it(tmp_path, family):
    """Cohere's class leaves it so. Qwen's looks for named tokens exactly as they are written."""
    files = files_of(FAMILIES[family])
    settings = files["tokenizer_config.json"]
    name = settings["eos_token"]
    rows = [*files["tokenizer.json"]["added_tokens"], *settings["added_tokens_decoder"].values()]
    for row in rows:
        if row["content"] == name:
            row.update(lstrip=True, rstrip=True, special=False, normalized=True)
    folder = write(tmp_path, files)
    texts = [f"a  {name}  b{name} c", f"{name} ", f" {name}"]
    compare(ours(folder), theirs(folder), texts)


@pytest.mark.parametrize(
    ("words", "config", "mended"),
    [
        (split(CL100K), {"model_type": "mistral", "transformers_version": "4.57.3"}, True),
        (METASPACE, {"model_type": "mistral3"}, True),
        (byte_level(use_regex=False), {"model_type": "pixtral"}, True),
        (split(CL100K), {"model_type": "mistral", "transformers_version": "5.1.0"}, False),
        (split(CL100K), {"model_type": "llama"}, False),
    ],
)
def test_a_tokenizer_of_mistral_that_is_to_be_mended(tmp_path, words, config, mended):
    """fix_mistral_regex in tokenizer_config.json, which counts from 100,000 tokens on."""
    files = files_of(FAMILIES["mistral, converted from tekken"])
    spec, settings = files["tokenizer.json"], files["tokenizer_config.json"]
    spec["pre_tokenizer"] = words
    n = max(row["id"] for row in spec["added_tokens"]) + 1
    vocab = spec["model"]["vocab"] | {row["content"]: row["id"] for row in spec["added_tokens"]}
    spec["model"]["vocab"] = vocab | {f"unused{i}": n + i for i in range(100_000 - n + 1)}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "fix_mistral_regex": True}
    folder = write(tmp_path, files | {"config.json": config})
    one, other = ours(folder), theirs(folder)
    compare(one, other, TRICKY)
    first = one.library.pre_tokenizer
    assert ("Lu" in str(first)) == mended


# Which class counts


def test_the_class_of_each_kind_of_model_is_that_of_transformers():
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    names = auto.TOKENIZER_MAPPING_NAMES
    for model_type in {*KNOWN, *CLASS_OF, "gemma4", "llama4", "mistral3"}:
        expected = names.get(model_type)
        if expected == "MistralCommonBackend":  # where mistral-common is installed: see `load`
            expected = FILE_AS_IT_IS
        assert CLASS_OF.get(model_type) == expected, model_type
        wrong = model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        assert (model_type in OVERRULED) == wrong, model_type


CLEAN_UP = "clean_up_tokenization_spaces"
FORCED = {CLEAN_UP: True, f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output": True}
NAMED = (None, "LlamaTokenizerFast", "GPT2Tokenizer", "CohereTokenizerFast", "CodeGenTokenizer")
NAMED += ("PreTrainedTokenizerFast", "ChatGLM4Tokenizer", "Qwen3_5Tokenizer", "GemmaTokenizer")


@pytest.mark.parametrize("kind", ["qwen 3", "command r", "mistral 7b v0.3", "gemma 1"])
def test_any_class_in_the_files_of_any_kind_of_model(tmp_path, kind):
    rng = random.Random(kind)
    files = files_of(FAMILIES[kind])
    rows = files["tokenizer.json"]["added_tokens"]
    texts = [*TRICKY, *around(rows, rng)]
    flags = ({}, {"add_prefix_space": True}, {"legacy": False}, {"add_bos_token": True}, FORCED)
    for number, model_type in enumerate([*CLASS_OF, "llama", "smollm3"]):
        settings = files["tokenizer_config.json"] | rng.choice(flags)
        settings.pop("tokenizer_class", None)
        if cls := rng.choice(NAMED):
            settings["tokenizer_class"] = cls
        config = {"config.json": {"model_type": model_type}, "tokenizer_config.json": settings}
        folder = write(tmp_path / str(number), files | config)
        one, other = ours(folder), theirs(folder)
        for text in texts:
            expected = attempt(other.encode, text)
            if attempt(one.encode, text) != expected:  # see `first_space` in test_files_and_flags
                assert text[:1] in (" ", "▁"), (model_type, cls, text)
                assert cls == "LlamaTokenizerFast", (model_type, cls, text)
                continue
            for skip in (True, False):
                shown = other.decode(expected or [], skip_special_tokens=skip)
                found = one.decode(expected or [], skip_special_tokens=skip)
                assert found == shown, (model_type, cls, text)
