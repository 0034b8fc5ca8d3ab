"""What a GGUF file's metadata and tensors say of a model, and what is refused of them."""

import math
import re
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest

from jlayer.checkpoint.gguf import open_gguf
from jlayer.checkpoint.store import Store
from jlayer.config import model_config, read_config
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.gguf.architectures import ARCHITECTURES
from jlayer.gguf.config import config_of
from jlayer.gguf.metadata import shortest
from jlayer.gguf.names import NAMES
from jlayer.gguf.parts import open_head
from tests.gguf.forms import MODELS, save
from tests.gguf.test_models import scaling
from tests.gguf_files import ARCHITECTURES as WRITTEN
from tests.gguf_files import write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("qwen3", tmp_path_factory.mktemp("model") / "model")


def test_names_are_those_of_llama_cpp():
    """Each name within a layer is the one that the package gguf has for the published tensor."""
    archs = {model_type: arch for model_type, (arch, *_) in WRITTEN.items()}
    archs["gpt_oss"] = gguf.MODEL_ARCH.GPT_OSS
    assert archs.keys() == NAMES.keys()
    assert {gguf.MODEL_ARCH_NAMES[arch] for arch in archs.values()} == ARCHITECTURES.keys()
    for model_type, arch in archs.items():
        names = gguf.get_tensor_name_map(arch, 1)
        for own, published in NAMES[model_type].items():
            name = re.sub(r"(\.norms)?\.{number}", "", f"model.layers.0.{published}")
            base = own.removesuffix(".weight").removesuffix(".bias")
            found = names.get_name(name.replace("e_score_correction_bias", "e_score_correction"))
            # A table has names that its architecture lacks: norms of heads, of Llama.
            assert found in (None, f"blk.0.{base}"), (model_type, own)


def test_numbers_of_32_bits_become_what_a_config_says():
    for value in (1e-5, 1e-6, 5e5, 1e6, 0.1, 3.0, 1.5625e-7, 8.0, 1 / 3):
        stored = struct.unpack("<f", struct.pack("<f", value))[0]
        found = shortest(stored)
        assert found == value or value == 1 / 3
        assert np.float32(found) == np.float32(value)
    assert shortest(1e-300) == 1e-300


def raw(name, kind, value):
    """Writes a key under its whole name, in the place of the one that is there."""

    def settings(writer, config):
        for values in writer.kv_data:
            values.pop(name, None)
        if kind is not None:
            getattr(writer, f"add_{kind}")(name, value)

    return settings


REFUSED = [
    (raw("general.architecture", "string", "mamba"), UnsupportedModelError, "'mamba'"),
    (raw("general.architecture", None, 0), CheckpointError, "architecture is missing"),
    (raw("qwen3.block_count", None, 0), CheckpointError, "block_count is missing"),
    (raw("qwen3.block_count", "string", "3"), CheckpointError, "expected a whole number"),
    (raw("qwen3.attention.head_count_kv", "array", [2, 1, 2]), UnsupportedModelError, "differs by"),
    (raw("qwen3.attention.value_length", "uint32", 16), UnsupportedModelError, "value_length"),
    (raw("qwen3.logit_scale", "float32", 0.5), UnsupportedModelError, "qwen3.logit_scale is 0.5"),
    (raw("qwen3.from_the_future", "uint32", 1), UnsupportedModelError, "from_the_future is 1"),
    (raw("qwen3.rope.scaling.type", "string", "ntk"), UnsupportedModelError, "'ntk'"),
    (raw("qwen3.rope.dimension_count", "uint32", 16), UnsupportedModelError, "dimension_count"),
    (raw("qwen3.embedding_length", "uint32", 65), CheckpointError, "by config.json"),
    (raw("qwen3.block_count", "uint32", 4), CheckpointError, "missing: model.layers.3"),
    (raw("qwen3.block_count", "uint32", 2), CheckpointError, "not of this model"),
    (raw("qwen3.attention.layer_norm_rms_epsilon", "float32", -1.0), CheckpointError, "rms_norm"),
]


@pytest.mark.parametrize(("settings", "kind", "words"), REFUSED)
def test_what_is_refused_of_the_metadata(settings, kind, words, tmp_path, model):
    path = tmp_path / "m.gguf"
    write(model, path, settings=settings)
    with pytest.raises(kind) as caught:
        Store(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert words in message
    assert str(path) in message
    assert "\n" not in message


# Of other models: what is fixed in a family, and what only looks like saying nothing.
OF_OTHERS = [
    ("olmo", raw("olmo.attention.layer_norm_epsilon", "float32", 1e-6), "layer_norm_epsilon is 1e"),
    ("granite", raw("granite.rope.scaling.finetuned", "bool", False), "no rotary embedding"),
    ("granite", raw("granite.expert_shared_feed_forward_length", "uint32", 8), "shared_feed"),
    ("minimax_m2", raw("minimax-m2.expert_gating_func", "uint32", 1), "expert_gating_func is 1"),
    ("minimax_m2", raw("minimax-m2.expert_feed_forward_length", "uint32", 8), "length is 8, supp"),
    ("qwen2_moe", raw("qwen2moe.expert_weights_norm", "bool", True), "expert_weights_norm is True"),
    ("hunyuan_moe", raw("hunyuan-moe.expert_shared_count", "uint32", 2), "shared_count is 2"),
    ("ernie4_5_moe", raw("ernie4_5-moe.expert_shared_count", "uint32", 1), "length is 64, supp"),
    ("phi3", raw("phi3.rope.scaling.type", "string", "longrope"), "frequencies are missing"),
    ("phi3, long texts", raw("phi3.rope.scaling.type", "string", "yarn"), "expected one of them"),
    ("deepseek_v2", raw("deepseek2.expert_weights_norm", "bool", True), "norm_topk_prob is True"),
    ("qwen3_5", raw("qwen35.ssm.inner_size", "uint32", 95), "ssm.inner_size is 95"),
    ("qwen3_5", raw("qwen35.full_attention_interval", "uint32", 9), "supported: at least one"),
    ("glm4", raw("glm4.rope.dimension_count", "uint32", 64), "dimension_count is 64"),
]


@pytest.mark.parametrize(("name", "settings", "words"), OF_OTHERS)
def test_what_is_refused_of_other_models(name, settings, words, tmp_path):
    write(save(name, tmp_path / "model"), tmp_path / "m.gguf", settings=settings)
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        Store(tmp_path / "m.gguf")


def test_counts_beyond_the_file_are_refused(tmp_path, model):
    for key, value in (
        ("attention.head_count", 0),
        ("attention.key_length", 0),
        ("block_count", 1 << 30),
    ):
        write(model, tmp_path / "m.gguf", settings=raw(f"qwen3.{key}", "uint32", value))
        with pytest.raises(CheckpointError, match=f"{key} is {value}, expected"):
            Store(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["qwen2_moe", "ernie4_5_moe"])
def test_a_matrix_of_one_row_may_be_a_vector(name, tmp_path, monkeypatch):
    """It was one in files of 2024."""
    folder, paths = save(name, tmp_path / "model"), (tmp_path / "m.gguf", tmp_path / "n.gguf")
    write(folder, paths[0])
    expected, add = Store(paths[0]), gguf.GGUFWriter.add_tensor

    def add_vector(writer, own, array, **more):
        add(writer, own, array[0] if array.shape[0] == 1 else array, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_vector)
    write(folder, paths[1])
    assert Store(paths[1]).cfg == expected.cfg
    rows = [sum(t.shape[0] == 1 for t in head.tensors.values()) for head in map(open_head, paths)]
    assert rows[0] > rows[1] == 0


WRONG = (0, 1, 1 << 31, -1, 0.0, -1.0, math.nan, math.inf, True, "x", (), (1, 2), (0.5,), (True,))


def refusal(head):
    """Why a head is refused; "" where it is read."""
    try:
        model_config(config_of(head), where=head.path)
    except (CheckpointError, UnsupportedModelError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [name for name in MODELS if "rope" not in name])
def test_any_value_of_any_key_is_read_or_refused_in_one_line(name, tmp_path):
    path = tmp_path / "m.gguf"
    write(save(name, tmp_path / "model"), path, settings=scaling)
    head = open_head(path)
    own = [key for key in head.values if key.startswith(f"{head.values['general.architecture']}.")]
    told = [
        refusal(replace(head, values={**head.values, key: value})) for key in own for value in WRONG
    ]
    assert sum(map(bool, told)) > len(own)
    assert "\n" not in "".join(told)


def test_keys_that_say_nothing_are_no_matter(tmp_path, model):
    def settings(writer, config):
        writer.add_float32("qwen3.logit_scale", 1.0)
        writer.add_uint32("qwen3.expert_count", 0)
        writer.add_bool("qwen3.attention.causal", True)
        writer.add_string("general.name", "x")

    write(model, tmp_path / "m.gguf", settings=settings)
    write(model, tmp_path / "n.gguf")
    assert Store(tmp_path / "m.gguf").cfg == Store(tmp_path / "n.gguf").cfg


def test_a_config_has_what_the_published_one_has(tmp_path, model):
    write(model, tmp_path / "m.gguf")
    found = config_of(open_head(tmp_path / "m.gguf"))
    own, published = read_config(tmp_path / "m.gguf"), read_config(model)
    assert own == published
    assert found["rms_norm_eps"] == 1e-5


def test_encodings_that_are_not_known_are_named(tmp_path, model):
    path = tmp_path / "m.gguf"
    write(model, path)
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert content[at : at + 4] == bytes(4)
    content[at : at + 4] = (26).to_bytes(4, "little")  # int32, as wide
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"int32: blk.0.attn_q.weight"):
        open_gguf(str(path))


def test_a_router_in_blocks_is_refused(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model")
    path = tmp_path / "m.gguf"
    write(folder, path, kind="Q8_0", routers=True)
    with pytest.raises(UnsupportedModelError, match=r"ffn_gate_inp.weight is q8_0, but .* whole"):
        open_gguf(str(path))


def test_layers_that_guess_further_tokens_are_left_out(tmp_path):
    folder = save("glm4_moe", tmp_path / "model")

    def settings(writer, config):
        raw("glm4moe.block_count", "uint32", 4)(writer, config)
        writer.add_nextn_predict_layers(1)
        writer.add_tensor("blk.3.nextn.eh_proj.weight", np.zeros((4, 8), np.float32))
        writer.add_tensor("blk.3.attn_norm.weight", np.zeros(64, np.float32))

    write(folder, tmp_path / "m.gguf", settings=settings)
    write(folder, tmp_path / "n.gguf")
    own, other = Store(tmp_path / "m.gguf"), Store(tmp_path / "n.gguf")
    assert own.cfg.num_hidden_layers == other.cfg.num_hidden_layers == 3
    assert own.weight_bytes == other.weight_bytes
    (note,) = own.notes
    assert "blk.3.attn_norm.weight, blk.3.nextn.eh_proj.weight" in note
    assert other.notes == ()


def test_a_file_that_changes_has_another_fingerprint(tmp_path, model):
    path = tmp_path / "m.gguf"
    write(model, path)
    first = Store(path).fingerprint
    assert Store(path).fingerprint == first
    write(model, path, kind="F16")
    assert Store(path).fingerprint != first


def test_what_a_conversion_refuses(tmp_path, model):
    path = tmp_path / "m.gguf"
    write(model, path, kind="Q8_0")
    with pytest.raises(UsageError, match="a GGUF file, which is needed until the end"):
        convert_checkpoint(path, tmp_path / "out", delete_source=True)
    with pytest.raises((UsageError, UnsupportedModelError), match="without --quantize"):
        convert_checkpoint(path, tmp_path / "out", quantize="int8")
    write(model, path, kind="F16")
    done = convert_checkpoint(path, tmp_path / "out", quantize="int8")
    assert done.quantization["scheme"] == "int8"
