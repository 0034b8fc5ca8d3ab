"""Tokenizers inside GGUF files give the ids of the published files, and those of llama.cpp."""

import json
import random
import unicodedata

import pytest

import jlayer
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf.splits import KINDS
from jlayer.small_files import files_of
from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED
from tests.gguf.forms import save
from tests.gguf.words import of_json, of_sentencepiece
from tests.gguf_files import write
from tests.text.built import TEKKEN
from tests.text.samples import SPECIAL, TEXTS, folder_of, load

SIZE = 1500
# Parts of texts at which the ways of splitting differ.
PARTS = [
    *("the", "The", "THE", "kingDom", "don't", "DON'T", "I'll", "we've", "naïve", "ÀÉ", "e\u0301"),
    *("1", "12", "123", "1234", "12345678", "٣٤", "½", ".", "...", "!?", "->", "x**2", "/", "//"),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\u00a0", "日本語", "中文", "かな"),
    *("カナ", "Привет", "שלום", "กำ", "😀", "👩\u200d👧", "_", "a_b", "#", "'s", "'S", "''", '"'),
]


def texts(count):
    rng = random.Random(5)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("vocabulary of 1500", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a byte-level tokenizer whose merges go over every border between words, and
    with tokens that no merge leads to."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("trained")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    ends = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 10,
        special_tokens=ends,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=12,
    )
    library.train_from_iterator(texts(3000), trainer)
    library.add_tokens(["user_defined"])
    library.save(str(folder / "tokenizer.json"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"] = [m for n, m in enumerate(raw["model"]["merges"]) if n % 9 != 8]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {"bos_token": ends[0], "eos_token": ends[1], "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# llama.cpp knows of capitals in ASCII alone.
ABOUT = ("gpt-4o", "tekken")


@pytest.mark.parametrize("kind", ABOUT)
def test_words_are_those_of_the_published_expression(kind, monkeypatch):
    import regex
    import tiktoken_ext.openai_public as published

    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *_, **__: {})
    pattern = {"gpt-4o": published.o200k_base()["pat_str"], "tekken": TEKKEN}[kind]
    (own,) = KINDS[kind].splits
    for text in (*TEXTS, *texts(1000)):
        words, expected = (
            [match[0] for match in regex.finditer(each, text)] for each in (own, pattern)
        )
        assert words == expected


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_text_is_split_as_llama_cpp_splits_it(kind, model, trained, tmp_path):
    served = pytest.importorskip("tests.gguf.llamacpp").Served
    path = tmp_path / "m.gguf"
    write(model, path, words=of_json(trained, kind, size=SIZE))
    own, peer = Tokenizer.from_folder(path), served(path)
    is_about = KINDS[kind].splits in [KINDS[other].splits for other in ABOUT]
    forms = ["NFC"] if KINDS[kind].normalizer else ["NFC", "NFD"]  # llama.cpp does not normalize
    for form in forms:
        for text in (*TEXTS, *texts(300), "a<|end|>b user_defined"):
            if is_about and not text.isascii():
                continue
            text = unicodedata.normalize(form, text).replace("\0", "")
            ids = own.encode(text)
            assert ids == peer.tokenize(text), text
            assert own.decode(ids) == text.replace("<|end|>", "")


def test_text_is_normalized_as_the_published_files_say(model, trained, tmp_path):
    """Of Qwen, OLMo and Command R: letters with marks become one character where there is one."""
    for kind in ("qwen2", "qwen35", "olmo", "command-r"):
        write(model, tmp_path / "m.gguf", words=of_json(trained, kind, size=SIZE))
        own = Tokenizer.from_folder(tmp_path / "m.gguf")
        assert own.encode("e\u0301 n\u0303") == own.encode("\u00e9 \u00f1")


def test_ids_are_those_of_the_published_files(tmp_path, model):
    path = tmp_path / "m.gguf"
    for name, pre in (("llama3", "llama-bpe"), ("llama2", None), ("mistral-v1", None)):
        folder = folder_of(name)
        words = of_json(folder, pre) if pre else of_sentencepiece(folder / "tokenizer.model")
        write(model, path, words=words)
        own, published = Tokenizer.from_folder(path), load(name)
        published = published if pre else load(name, "tokenizer.model")
        for text in (*TEXTS, *SPECIAL, *texts(100)):
            assert own.encode(text) == published.encode(text), (name, text)
            ids = own.encode(text, add_special_tokens=False)
            assert own.decode(ids) == published.decode(ids)
        assert own.bos_token_id == published.bos_token_id
        assert own.eos_token_id == published.eos_token_id
        assert own.special_tokens == published.special_tokens


@pytest.mark.parametrize("name", ["llama2", "mistral-v1"])
def test_pieces_are_joined_as_llama_cpp_joins_them(name, tmp_path):
    served = pytest.importorskip("tests.gguf.llamacpp").Served
    words = of_sentencepiece(folder_of(name) / "tokenizer.model")
    path = tmp_path / "m.gguf"
    write(save("vocabulary of 32000", tmp_path / "model"), path, words=words)
    own, peer = Tokenizer.from_folder(path), served(path)
    for text in (*TEXTS, *texts(150), "a <s>b</s> c"):
        text = text.replace("\0", "")
        if "▁" in text or text[:1] in ("", " "):
            continue  # SentencePiece's own ids, which the test above looks at, are others here
        assert own.encode(text) == peer.tokenize(text), text


def test_pieces_without_a_space_before_the_text(tmp_path, model):
    """As Gemma has it."""
    folder = folder_of("llama2")
    words = of_sentencepiece(
        folder / "tokenizer.model", add_space_prefix=False, add_bos_token=False
    )
    write(model, tmp_path / "m.gguf", words=words)
    own = Tokenizer.from_folder(tmp_path / "m.gguf")
    own_ids = [own.encode(text, add_special_tokens=False) for text in ("a cat", " a cat")]
    with_space = load("llama2", "tokenizer.model").encode("a cat", add_special_tokens=False)
    assert own_ids[0] != with_space == own_ids[1]
    assert [own.decode(ids) for ids in own_ids] == ["a cat", " a cat"]


def test_what_stands_beside_the_tokens(tmp_path, trained, model):
    path = tmp_path / "m.gguf"
    write(model, path, words=of_json(trained, "gpt-2", adds_bos=True))
    own, published = Tokenizer.from_folder(path), Tokenizer.from_folder(trained)
    assert own.encode("a", add_special_tokens=True)[0] == own.bos_token_id == 0
    assert own.chat_templates == published.chat_templates == {"default": "{{ messages }}"}
    assert own.special_tokens == published.special_tokens == {"<|begin|>": 0, "<|end|>": 1}
    assert files_of(path).json("generation_config.json") == {
        "bos_token_id": 0,
        "eos_token_id": [1],
    }
    write(model, path, words=of_json(trained, "gpt-2"))
    assert Tokenizer.from_folder(path).encode("a") == own.encode("a", add_special_tokens=False)


def test_several_templates_and_ends(tmp_path, trained, model):
    def words(writer):
        of_json(trained, "gpt-2")(writer)
        writer.add_array("tokenizer.chat_templates", ["tool_use"])
        writer.add_string("tokenizer.chat_template.tool_use", "{{ tools }}")
        writer.add_eot_token_id(7)

    write(model, tmp_path / "m.gguf", words=words)
    own = Tokenizer.from_folder(tmp_path / "m.gguf")
    assert own.chat_templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    ends = files_of(tmp_path / "m.gguf").json("generation_config.json")["eos_token_id"]
    assert ends == [1, 7]


def test_a_converted_file_has_the_same_tokenizer(tmp_path, trained, model):
    for number, words in enumerate(
        (of_json(trained, "llama-bpe"), of_sentencepiece(folder_of("llama2") / "tokenizer.model"))
    ):
        path, target = tmp_path / f"{number}.gguf", tmp_path / str(number)
        write(model, path, words=words)
        convert_checkpoint(path, target)
        own, converted = Tokenizer.from_folder(path), Tokenizer.from_folder(target)
        for text in (*TEXTS, *texts(30), *SPECIAL):
            assert own.encode(text) == converted.encode(text)
        assert own.chat_templates == converted.chat_templates
        assert own.library.to_str() == converted.library.to_str()


def test_a_bundled_model_with_text(tmp_path):
    path = tmp_path / "m.gguf"
    write(BUNDLED, path, kind="F16", words=of_json(BUNDLED, "gpt-2", adds_bos=True))
    own, published = Tokenizer.from_folder(path), Tokenizer.from_folder(BUNDLED)
    for text in (*TEXTS, *texts(50)):
        assert own.encode(text) == published.encode(text)


def test_transformers_has_the_same_ids(tmp_path, trained, model):
    path = tmp_path / "m.gguf"
    for words in (
        of_json(trained, "llama-bpe", size=SIZE),
        of_sentencepiece(folder_of("llama2") / "tokenizer.model"),
    ):
        write(model, path, words=words)
        own, other = Tokenizer.from_folder(path), jlayer.AutoTokenizer.from_pretrained(path)
        for text in (*TEXTS, *texts(50)):
            if text.isascii() and text.strip() == text and text:
                assert other(text)["input_ids"] == own.encode(text)


def broken(name, value, kind="add_string"):
    return lambda writer: getattr(writer, kind)(f"tokenizer.ggml.{name}", value)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (broken("model", "bert"), UnsupportedModelError, "tokenizer.ggml.model is 'bert'"),
        (broken("pre", "from-the-future"), UnsupportedModelError, "'from-the-future', a way of"),
        (broken("token_type", [1, 2], "add_array"), CheckpointError, "has 2 numbers"),
        (broken("merges", ["a"], "add_array"), CheckpointError, r"merges\[0\] is no pair"),
        (broken("merges", ["zz zz"], "add_array"), CheckpointError, "not a tokenizer"),
        (broken("tokens", ["a", "a"], "add_array"), CheckpointError, "token_type has"),
        (broken("bos_token_id", 10**6, "add_uint32"), CheckpointError, "below 1"),
        (broken("add_bos_token", 1, "add_uint32"), CheckpointError, "expected true or false"),
    ],
)
def test_what_is_refused_of_a_tokenizer(change, kind, words, tmp_path, trained, model):
    """Token ids run all the same."""

    def written(writer):
        of_json(trained, "gpt-2")(writer)
        (metadata,) = writer.kv_data
        kept, before = dict(metadata), set(metadata)
        metadata.clear()
        change(writer)
        changed = dict(metadata)
        assert changed.keys() <= before | {"tokenizer.ggml.add_bos_token"}
        metadata.clear()
        metadata.update(kept | changed)

    path = tmp_path / "m.gguf"
    write(model, path, words=written)
    with pytest.raises(kind, match=words) as caught:
        Tokenizer.from_folder(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    assert read_config(path).vocab_size == SIZE


def test_a_file_without_a_tokenizer_has_none(tmp_path, model):
    write(model, tmp_path / "m.gguf")
    assert Tokenizer.from_folder(tmp_path / "m.gguf") is None
