"""config.json of families with latent attention: read as Transformers reads it, or refused by name;
and the layers of a checkpoint that guess further tokens."""

import json
import math
import shutil
from copy import deepcopy

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.registry import is_dropped, published_tensors
from jlayer.model.ops import rope_frequencies
from tests.convert.checkpoints import edit_tensors, tensor_of
from tests.reference.latent_forms import FORMS, INDEX, ONE_GROUP, SIZES, YARN, save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

LEFT_OUT = object()  # the key is not there at all
# Sizes that every family's defaults go with: 256 or 64 experts, in 8 groups.
BARE = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}
CHANGES = {
    "silent": {},
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear-weighted": {"rope_scaling": {"type": "linear", "factor": 4.0, "mscale_all_dim": 0.7}},
    "yarn": {"rope_scaling": {key: YARN[key] for key in YARN if "mscale" not in key}},
    "yarn-weighted": {"rope_scaling": YARN},
    "yarn-parameters": {"rope_parameters": YARN},
    "yarn-shrinks": {"rope_scaling": {**YARN, "factor": 0.5}},
    "yarn-factor": {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    "positions": {"max_position_embeddings": 777},
    "ranks": {"q_lora_rank": 12, "kv_lora_rank": 20, "qk_rope_head_dim": 4, "v_head_dim": 9},
    "eps": {"rms_norm_eps": 1e-3},
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "dense": {"first_k_dense_replace": 4},
    "all-sparse": {"first_k_dense_replace": 0},
    "shared": {"n_shared_experts": 3, "moe_intermediate_size": 10},
    "experts": {"n_routed_experts": 32},
    "no-further": {"num_nextn_predict_layers": 0},
    "act": {"hidden_act": "gelu"},
}
# Where Transformers does not look at it, and it is refused here unless it says what counts.
REFUSED = {("glm4_moe_lite", "dense"), ("glm4_moe_lite", "all-sparse")}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_config_is_read_as_transformers_reads_it(model_type, change):
    raw = {**BARE, **NEEDED.get(model_type, {}), **CHANGES[change], "model_type": model_type}
    if (model_type, change) in REFUSED:
        with pytest.raises(UnsupportedModelError, match="first_k_dense_replace"):
            model_config(raw, where="config.json")
        return
    cfg = model_config(raw, where="config.json")
    config = transformers.CONFIG_MAPPING[model_type](**deepcopy(raw))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert per_expert(there, cfg) == published_tensors(cfg)
    how, layer = cfg.attention, model.model.layers[-1]
    assert how.scale == pytest.approx(layer.self_attn.scaling)
    assert how.norm.eps == layer.self_attn.kv_a_layernorm.variance_epsilon
    assert cfg.norm.eps == layer.input_layernorm.variance_epsilon
    rotary = type(model.model.rotary_emb)(config)
    found = rope_frequencies(how.rope, how.head_dim)
    np.testing.assert_allclose(found, rotary.inv_freq.numpy(), rtol=5e-7)
    assert how.rope.attention_factor == pytest.approx(rotary.attention_scaling)
    longest = config.max_position_embeddings
    if "index_topk" in config.to_dict():
        longest = min(longest, config.index_topk)
    assert cfg.max_position_embeddings == longest
    assert cfg.tie_word_embeddings == config.tie_word_embeddings
    assert cfg.n_further == raw.get("num_nextn_predict_layers", int(model_type != "deepseek_v2"))
    if cfg.experts:
        gate = next(each.mlp.gate for each in model.model.layers if hasattr(each.mlp, "gate"))
        router = cfg.experts.router
        assert router.n_chosen == config.num_experts_per_tok
        assert router.scale == gate.routed_scaling_factor
        if model_type != "deepseek_v2":
            assert (router.n_groups, router.n_chosen_groups) == (gate.num_group, gate.topk_group)
            assert router.renormalizes == gate.norm_topk_prob


def per_expert(shapes, cfg):
    """The shapes of Transformers' module as it saves them: each expert's matrices by themselves."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith("experts.gate_up_proj"):
            for number in range(shape[0]):
                lead = f"{name.removesuffix('gate_up_proj')}{number}."
                for part in ("gate_proj", "up_proj"):
                    found[f"{lead}{part}.weight"] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            for number in range(shape[0]):
                lead = f"{name.removesuffix('down_proj')}{number}."
                found[f"{lead}down_proj.weight"] = shape[1:]
        elif not is_dropped(cfg, name):
            found[name] = shape
    return found


GIVEN = {"model_type": "deepseek_v3", **SIZES, **ONE_GROUP}
OTHERS = {
    "v2": {"model_type": "deepseek_v2", "num_nextn_predict_layers": LEFT_OUT},
    "lite": {"model_type": "glm4_moe_lite"},
    "v32": {"model_type": "deepseek_v32", **INDEX},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, expected num_attention_heads 6"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
        ({"head_dim": 16}, "head_dim is 16, supported: 8"),
        ({"n_group": 5}, "n_routed_experts is 12, expected a multiple of n_group 5"),
        ({"n_group": 12}, "at least 2 for each group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5"),
        ({"n_group": 6, "topk_group": 1}, "topk_group is 1"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok is 13"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', supported: 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', supported: 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2, supported: 1"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"norm_topk_prob": None}, "norm_topk_prob is null"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"num_local_experts": 9}, "n_routed_experts is 12, but num_local_experts 9"),
        ({"num_mtp_layers": 2, "num_nextn_predict_layers": 1}, "but num_mtp_layers 2"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "type 'longrope'"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": "a"}}, "mscale_all_dim is 'a'"),
        ({"rope_interleave": None}, "rope_interleave is null"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"v_head_dim": None}, "v_head_dim is null"),
        ({**OTHERS["v2"], "norm_topk_prob": True}, "norm_topk_prob is True, supported: False"),
        ({**OTHERS["v2"], "topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ({**OTHERS["v2"], "scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({**OTHERS["v2"], "num_experts_per_tok": LEFT_OUT}, "num_experts_per_tok is missing"),
        ({**OTHERS["lite"], "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**OTHERS["lite"], "mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1 entries"),
        ({**OTHERS["lite"], "mlp_layer_types": ["moe"] * 3}, "mlp_layer_types is"),
        ({**OTHERS["lite"], "head_dim": 16}, "qk_rope_head_dim is 8, but head_dim 16"),
        ({**OTHERS["v32"], "q_lora_rank": None}, "q_lora_rank is null"),
        ({**OTHERS["v32"], "rope_interleave": False}, "rope_interleave is False"),
        ({**OTHERS["v32"], "layer_types": ["full_attention"] * 3}, "layer_types is"),
    ],
)
def test_it_is_refused_by_name(changes, words):
    raw = {key: value for key, value in (GIVEN | changes).items() if value is not LEFT_OUT}
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        model_config(raw, where="config.json")
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


def test_kimi_k2_is_a_deepseek_v3_by_another_name():
    raw = {**GIVEN, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    known = model_config({**raw, "model_type": "deepseek_v3"}, where="config.json")
    found = model_config(raw, where="config.json")
    assert found.model_type == "kimi_k2"
    assert (found.attentions, found.experts) == (known.attentions, known.experts)
    assert published_tensors(found) == published_tensors(known)
    by_name = model_config({**raw, "model_type": None}, where="config.json")
    assert by_name.model_type == "deepseek_v3"


def test_the_scale_of_deepseek_v3_is_what_was_measured():
    """FAMILIES.md: 1.874 for a factor of 40."""
    scaled = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    how = model_config({**GIVEN, "rope_scaling": scaled}, where="here").attention
    assert how.scale * math.sqrt(18) == pytest.approx(1.874, abs=5e-4)
    assert how.rope.attention_factor == 1.0


# Layers that guess further tokens.


def with_further(folder, source, layers):
    """A copy of a checkpoint with more layers: some of the tensors of its last one, and the heads
    that DeepSeek publishes with it."""
    shutil.copytree(source, folder)

    def change(tensors):
        last = {name: tensor for name, tensor in tensors.items() if "layers.2.input" in name}
        for layer in layers:
            for name, tensor in last.items():
                tensors[name.replace("layers.2.", f"layers.{layer}.")] = tensor
            eh_proj = np.ones((24, 48), np.float32)
            tensors[f"model.layers.{layer}.eh_proj.weight"] = tensor_of(eh_proj)
        tensors["mtp.fc.weight"] = tensor_of(np.ones((24, 48), np.float32))

    edit_tensors(folder / "model.safetensors", change)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("further") / "deepseek_v3", "deepseek_v3")


def test_layers_that_guess_further_tokens_are_left_out(source, tmp_path):
    """As a note says, and as if they were not there."""
    ids = np.random.default_rng(0).integers(3, 133, (1, 9))
    folder = with_further(tmp_path / "more", source, [3])
    logits = []
    for each in (source, folder):
        with AutoModel.from_pretrained(each, device="cpu") as model:
            logits.append(model.logits(ids))
            if each is folder:
                assert any("layer 3 (2 tensors" in note for note in model.notes)
    np.testing.assert_array_equal(*logits)
    report = convert_checkpoint(folder, tmp_path / "layered")
    assert any("layer 3 (2 tensors" in note for note in report.notes)


def test_a_layer_that_no_config_says_anything_of_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.eh_proj\.weight"):
        convert_checkpoint(with_further(tmp_path / "more", source, [3, 4]), tmp_path / "layered")
    folder = with_further(tmp_path / "none", source, [3])
    config = json.loads((folder / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    config["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        convert_checkpoint(folder, tmp_path / "layered")


# Layers that choose what they attend to.


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_texts_are_as_long_as_all_that_a_layer_may_choose(name, tmp_path):
    folder = save(tmp_path / name, name)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert model.context_limit == FORMS[name].config["index_topk"] == 64
        assert any("indexer (" in note for note in model.notes)
        assert any("runs up to 64 tokens (index_topk)" in note for note in model.notes)
        with pytest.raises(UsageError, match="64"):
            model.logits(np.full((1, 65), 5))
