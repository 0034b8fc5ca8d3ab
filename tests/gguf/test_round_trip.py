"""Files that are converted and exported again: every tensor has its type, its shape and its bytes,
and the metadata says the same of the model and of its tokenizer."""

import json
import shutil

import gguf
import numpy as np
import pytest

from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.encodings.blocks import BLOCKS
from jlayer.errors import UnsupportedModelError
from jlayer.gguf.splits import KINDS
from jlayer.text.tokenizer import Tokenizer
from tests.campaigns import slow_but
from tests.conftest import BUNDLED
from tests.convert.kills import killed
from tests.gguf import test_gpt_oss
from tests.gguf.forms import FIRST, MODELS, NOT_EXPORTED, save
from tests.gguf.test_llamacpp import numbered
from tests.gguf.test_models import IDS, MIXES, rope_factors, scaling
from tests.gguf.words import of_json, of_sentencepiece
from tests.gguf_files import write
from tests.reference.gpt_oss_forms import drawn
from tests.text.samples import SPECIAL, TEXTS, folder_of

# Keys that a writer may leave out where they say what is usual.
USUAL = (
    *("attention.key_length", "attention.value_length", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.freq_base_swa", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "expert_group_count", "expert_group_used_count"),
    *("general.quantization_version", "general.file_type", "tokenizer.ggml.model", "vocab_size"),
)


def back(path, folder, **options):
    """The file that `path` becomes when it is converted and exported again."""
    convert_checkpoint(path, folder / "layered")
    export_checkpoint(folder / "layered", folder / "back.gguf", format="gguf", **options)
    return folder / "back.gguf"


def tensors_of(path):
    return {
        one.name: (one.tensor_type.name, tuple(one.shape), np.asarray(one.data).tobytes())
        for one in gguf.GGUFReader(path).tensors
    }


def values_of(path):
    fields = gguf.GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


def assert_same(path, other):
    found, expected = tensors_of(other), tensors_of(path)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    found, expected = values_of(other), values_of(path)
    assert {key: found.get(key) for key in expected} == expected
    assert [key for key in found.keys() - expected.keys() if not key.endswith(USUAL)] == []


@pytest.mark.parametrize(
    "name", slow_but([name for name in MODELS if name not in NOT_EXPORTED], FIRST)
)
def test_a_file_of_each_architecture(name, tmp_path):
    folder, freqs = save(name, tmp_path / "model"), None
    if "llama3" in name:
        from transformers import AutoConfig

        freqs = rope_factors(AutoConfig.from_pretrained(folder))
    write(folder, tmp_path / "m.gguf", settings=scaling, freqs=freqs)
    assert_same(tmp_path / "m.gguf", back(tmp_path / "m.gguf", tmp_path))


@pytest.mark.parametrize("mix", MIXES)
def test_blocks_of_all_types(mix, tmp_path):
    types = {kind.lower() for table in MIXES.values() for kind in table.values()}
    assert BLOCKS.keys() - types == {"gguf_mxfp4"}  # gpt-oss has it, below
    path = tmp_path / "m.gguf"
    write(save("wide", tmp_path / "model"), path, kind="Q4_0", kinds=MIXES[mix], drawn=True)
    assert_same(path, back(path, tmp_path))


def test_experts_in_blocks(tmp_path):
    write(save("mixtral", tmp_path / "model"), tmp_path / "m.gguf", kind="Q8_0")
    assert_same(tmp_path / "m.gguf", back(tmp_path / "m.gguf", tmp_path))


def test_experts_of_gpt_oss(tmp_path):
    test_gpt_oss.write(tmp_path / "m.gguf", *drawn(swiglu_limit=7.0))
    assert_same(tmp_path / "m.gguf", back(tmp_path / "m.gguf", tmp_path))


def test_files_whose_experts_are_apart_and_parts_become_one_of_today(tmp_path):
    model = save("mixtral", tmp_path / "model")
    write(model, tmp_path / "m.gguf", kind="Q8_0")
    write(model, tmp_path / "apart.gguf", kind="Q8_0", experts_apart=True)
    write(model, tmp_path / "split.gguf", kind="Q8_0", split_max_tensors=10)
    for number, name in enumerate(("apart.gguf", "split-00001-of-00004.gguf")):
        (tmp_path / str(number)).mkdir()
        found = back(tmp_path / name, tmp_path / str(number))
        assert tensors_of(found) == tensors_of(tmp_path / "m.gguf")


def test_experts_of_several_types_have_no_tensor_of_all(tmp_path):
    model, kinds = save("mixtral", tmp_path / "model"), {"blk.0.ffn_up.2.": "F16"}
    write(model, tmp_path / "m.gguf", kind="Q8_0", kinds=kinds, experts_apart=True)
    with pytest.raises(UnsupportedModelError, match=r"of blk\.0\.ffn_up_exps.* \(float16, q8_0\)"):
        back(tmp_path / "m.gguf", tmp_path)


def test_layers_that_guess_further_tokens_are_left_out(tmp_path):
    model = save("glm4_moe", tmp_path / "model")

    def settings(writer, config):
        writer.kv_data[0].pop("glm4moe.block_count")
        writer.add_block_count(config["num_hidden_layers"] + 1)
        writer.add_nextn_predict_layers(1)

    write(model, tmp_path / "m.gguf", settings=settings)
    write(model, tmp_path / "plain.gguf")
    assert_same(tmp_path / "plain.gguf", back(tmp_path / "m.gguf", tmp_path))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with as many rows of an embedding as the bundled tokenizer has tokens, or more."""
    return save("vocabulary of 4100", tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("pre", slow_but(sorted(KINDS), ("gpt-2", "llama-bpe", "qwen2")))
def test_a_tokenizer_of_bytes(pre, small, tmp_path):
    """A name of a way of splitting may become another one of the same way."""
    size = json.loads((small / "config.json").read_text())["vocab_size"]
    words = of_json(BUNDLED, pre, adds_bos=True, size=size)

    def more(writer):
        words(writer)
        writer.add_array("tokenizer.chat_templates", ["tool_use"])
        writer.add_string("tokenizer.chat_template.tool_use", "{{ tools }}")
        writer.add_eot_token_id(7)

    write(small, tmp_path / "m.gguf", words=more)
    found, expected = (
        values_of(p) for p in (back(tmp_path / "m.gguf", tmp_path), tmp_path / "m.gguf")
    )
    names = [values.pop("tokenizer.ggml.pre") for values in (found, expected)]
    assert KINDS[names[0]].splits == KINDS[names[1]].splits
    for key in expected:
        assert found[key] == expected[key], key
    files = (tmp_path / "m.gguf", tmp_path / "back.gguf")
    own, other = (Tokenizer.from_folder(path) for path in files)
    for text in TEXTS:
        assert own.encode(text) == other.encode(text), text


def test_a_tokenizer_of_sentencepiece(tmp_path):
    source = folder_of("llama2") / "tokenizer.model"
    model, path = save("vocabulary of 32000", tmp_path / "model"), tmp_path / "m.gguf"
    write(model, path, words=of_sentencepiece(source, add_space_prefix=False))
    assert_tokenizer(values_of(back(path, tmp_path)), values_of(path))


def assert_tokenizer(found, expected):
    for key, value in expected.items():
        if key.startswith("tokenizer."):
            assert found[key] == value, key


V1 = ("mistral-v1", True)


@pytest.mark.parametrize("case", slow_but([("llama2", False), V1], [V1]), ids="{0[0]}".format)
def test_a_published_tokenizer_model(case, tmp_path):
    """Its pieces, scores and kinds are those of the library sentencepiece, and text gets the same
    ids."""
    name, has_json = case
    folder = folder_of(name)
    model = save("vocabulary of 32000", tmp_path / "model")
    json_alone = ("tokenizer.json",) if has_json else ()
    for file in ("tokenizer.model", "tokenizer_config.json", *json_alone):
        if (folder / file).exists():
            shutil.copy(folder / file, model)
    write(model, tmp_path / "m.gguf", words=of_sentencepiece(folder / "tokenizer.model"))
    convert_checkpoint(model, tmp_path / "layered")
    export_checkpoint(tmp_path / "layered", tmp_path / "out.gguf", format="gguf")
    expected = values_of(tmp_path / "m.gguf")
    assert_tokenizer(values_of(tmp_path / "out.gguf"), expected)
    own, published = (Tokenizer.from_folder(one) for one in (tmp_path / "out.gguf", model))
    for text in (*TEXTS, *SPECIAL):
        assert own.encode(text) == published.encode(text), text


@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "qwen3_moe", "glm4_moe", "gemma2", "gemma3", "qwen2_moe", "ernie4_5_moe"),
        *("granitemoe", "minimax_m2", "phi3, long texts", "stablelm, parallel", "cohere2", "olmo3"),
    ],
)
def test_llama_cpp_takes_what_is_exported_as_the_same_model(name, tmp_path):
    served, path = pytest.importorskip("tests.gguf.llamacpp").Served, tmp_path / "m.gguf"
    write(save(name, tmp_path / "model"), path, settings=numbered)
    found, expected = (served(each).greedy(IDS, 3) for each in (back(path, tmp_path), path))
    assert found == expected


def test_an_export_killed_at_any_moment_leaves_none_or_all_of_it(tmp_path):
    write(save("mixtral", tmp_path / "model"), tmp_path / "m.gguf", kind="Q8_0")
    whole = back(tmp_path / "m.gguf", tmp_path)
    states = killed("export gguf", tmp_path / "layered", whole)
    assert len(states) > 5
    assert set(states) == {"none", "new"}


def test_what_a_folder_of_blocks_is_not_exported_to(tmp_path):
    write(save("wide", tmp_path / "model"), tmp_path / "m.gguf", kind="Q8_0")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "layered")
    for form in ("huggingface", "orbax"):
        with pytest.raises(UnsupportedModelError, match=r"from a GGUF file.*with --format gguf"):
            export_checkpoint(tmp_path / "layered", tmp_path / "out", format=form)
    with pytest.raises(UnsupportedModelError, match=r"in blocks already \(q8_0\).*leave out the"):
        export_checkpoint(tmp_path / "layered", tmp_path / "o.gguf", format="gguf", type="f16")
    assert not (tmp_path / "out").exists()
