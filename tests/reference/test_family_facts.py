"""The facts of every family, where its config.json is silent and where it speaks: those of
the model that Transformers makes of the same file. Where it refuses, so do we."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from jlayer.config import model_config
from jlayer.families import deepseek
from jlayer.families.registry import FAMILIES
from tests.reference.facts import differences
from tests.reference.mixture_forms import MIXTURES

pytestmark = pytest.mark.reference
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

N_LAYERS = 7  # more than the longest pattern of layers
# Heads that every family's default number of key/value heads divides. No memory is taken for them.
SIZES = {
    "vocab_size": 300_000,  # has every default of the padding token in it
    "hidden_size": 2560,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 320,
}
# What a family's config class has no default for that its model runs with.
GIVEN = {
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "mixtral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "hunyuan_v1_moe": {"head_dim": 8},
}
# The numbers of experts by all of their names: 7 layers of 512 of them take their time.
FEW = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
}


def rope(kind, **more):
    return {"rope_type": kind, **more}


LINEAR = {"type": "linear", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
LONGER = {**ORIGINAL, "max_position_embeddings": 256}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
BY_TYPE = {
    FULL: rope("linear", factor=4.0, rope_theta=7e5),
    SLIDING: rope("default", rope_theta=300.0),
}
MIXED = [SLIDING, FULL] * 3 + [SLIDING]
WINDOW = {"sliding_window": 8}

CHANGES = {
    "the-sizes-alone": {},
    "heads-of-keys": {"num_key_value_heads": 4},
    "heads-of-keys-null": {"num_key_value_heads": None},
    "head-dim": {"head_dim": 12},
    "head-dim-null": {"head_dim": None},
    "window": WINDOW,
    "window-null": {"sliding_window": None},
    "window-used": {"use_sliding_window": True, "max_window_layers": 3, **WINDOW},
    "window-used-but-not-said": {"use_sliding_window": True, "max_window_layers": 3},
    "window-not-used": {"use_sliding_window": False, "max_window_layers": 3, **WINDOW},
    "types": {"layer_types": MIXED, **WINDOW},
    "types-full": {"layer_types": [FULL] * N_LAYERS},
    "types-null": {"layer_types": None},
    "types-too-few": {"layer_types": [FULL] * 2},
    "types-of-another-family": {"layer_types": ["linear_attention"] * N_LAYERS},
    "pattern": {"sliding_window_pattern": 3},
    "pattern-and-window": {"sliding_window_pattern": 3, **WINDOW},
    "theta": {"rope_theta": 7e5},
    "theta-null": {"rope_theta": None},
    "theta-of-sliding-layers": {"rope_local_base_freq": 5e4},
    "parameters": {"rope_parameters": rope("default", rope_theta=7e5)},
    "parameters-without-theta": {"rope_parameters": rope("default")},
    "parameters-by-type": {"rope_parameters": BY_TYPE},
    "parameters-of-full-layers": {"rope_parameters": {FULL: LINEAR}, "rope_theta": 7e5},
    "parameters-linear": {"rope_parameters": {**LINEAR, "rope_theta": 7e5}},
    "linear": {"rope_scaling": LINEAR},
    "linear-in-the-new-word": {"rope_scaling": rope("linear", factor=4.0)},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 7e5},
    "yarn": {"rope_scaling": rope("yarn", factor=4.0, **ORIGINAL)},
    "longrope": {"rope_scaling": {"type": "longrope", **LONGROPE}, **LONGER},
    "su": {"rope_scaling": {"type": "su", **LONGROPE}, **LONGER},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic-with-alpha": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "partial": {"partial_rotary_factor": 0.5},
    "partial-whole": {"partial_rotary_factor": 1.0},
    "partial-null": {"partial_rotary_factor": None},
    "partial-inside": {
        "rope_parameters": rope("default", rope_theta=1e4, partial_rotary_factor=0.75)
    },
    "layers-without-rope": {"no_rope_layers": [1, 0, 1, 1, 0, 1, 1]},
    "each-third-without-rope": {"no_rope_layer_interval": 3},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "tied-null": {"tie_word_embeddings": None},
    "gelu": {"hidden_act": "gelu"},
    "gelu-in-the-other-word": {"hidden_activation": "gelu"},
    "gelu-new": {"hidden_act": "gelu_new"},
    "silu": {"hidden_act": "silu", "hidden_activation": "silu"},
    "relu": {"hidden_act": "relu", "hidden_activation": "relu"},
    "activation-null": {"hidden_act": None},
    "activation-null-in-the-other-word": {"hidden_activation": None},
    "context": {"max_position_embeddings": 77},
    "context-null": {"max_position_embeddings": None},
    "eps": {"rms_norm_eps": 0.1, "layer_norm_eps": 0.2, "norm_eps": 0.3, "norm_epsilon": 0.4},
    "eps-null": dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon")),
    "bias": {"attention_bias": True},
    "no-bias": {"attention_bias": False},
    "bias-null": {"attention_bias": None},
    "bias-of-the-mlp": {"mlp_bias": True},
    "bias-everywhere": {"use_bias": True},
    "bias-nowhere": {"use_bias": False},
    "bias-of-the-output": {"attention_out_bias": True},
    "bias-of-the-inputs": {"use_qkv_bias": True},
    "norms-of-heads": {"qk_layernorm": True},
    "norms-of-heads-in-the-other-word": {"use_qk_norm": True},
    "parallel": {"use_parallel_residual": True},
    "factors": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "logit_scale": 0.25,
    },
    "caps": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 4.0},
    "caps-null": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "scalar": {"query_pre_attn_scalar": 7},
    "clip": {"clip_qkv": 0.7},
    "both-directions": {"use_bidirectional_attention": True},
    "not-causal": {"is_causal": False},
    "dtype": {"torch_dtype": "float16"},
    "more-experts": dict.fromkeys(FEW, 5),
    "experts-of-a-token-null": {"num_experts_per_tok": None, "moe_k": None},
    "no-experts": dict.fromkeys(tuple(FEW)[:4], 0),
    "experts-null": dict.fromkeys(tuple(FEW)[:4]),
    "more-of-a-token-than-there-are": {"num_experts_per_tok": 5, "moe_k": 5, "moe_topk": 5},
    "a-number-for-each-layer": {"moe_topk": [2] * N_LAYERS},
    "a-number-for-each-layer-that-differs": {"moe_topk": [2, 1] + [2] * (N_LAYERS - 2)},
    "width-of-experts": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "width-of-experts-null": {"moe_intermediate_size": None},
    "normed": {"norm_topk_prob": True},
    "not-normed": {"norm_topk_prob": False},
    "normed-null": {"norm_topk_prob": None},
    "experts-in-each-second-layer": {"decoder_sparse_step": 2, "moe_layer_interval": 2},
    "dense-layers": {"mlp_only_layers": [0, 5], "first_k_dense_replace": 3},
    "dense-layers-none": {"mlp_only_layers": [], "first_k_dense_replace": 0},
    "dense-layers-null": {"mlp_only_layers": None},
    "dense-layers-all": {
        "mlp_only_layers": list(range(N_LAYERS)),
        "first_k_dense_replace": N_LAYERS,
        "moe_layer_start_index": N_LAYERS,
    },
    "layers-with-experts": {"moe_layer_start_index": 0, "moe_layer_end_index": 4},
    "shared-experts": {"n_shared_experts": 3, "moe_num_shared_experts": 3},
    "shared-experts-none": {"moe_num_shared_experts": 0},
    "factor-of-experts": {"routed_scaling_factor": 2.5},
    "groups": {"n_group": 2, "topk_group": 1},
    "groups-that-do-not-divide": {"n_group": 3, "topk_group": 1},
    "groups-of-one": {"n_group": 4, "topk_group": 4},
    "least-sum": {"moe_norm_min": 0.25},
    "jitter": {"router_jitter_noise": 0.25, "input_jitter_noise": 0.5},
    "jitter-none": {"router_jitter_noise": 0.0},
    "turned-part": {"rotary_dim": 4},
    "turned-part-null": {"rotary_dim": None},
    "turned-part-twice": {"rotary_dim": 4, "partial_rotary_factor": 0.25},
    "bias-of-queries": {"qkv_bias": False},
    "beside": {"enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 24},
    "beside-without-numbers": {"enable_moe_block": True},
}
# What some families of Transformers take, and we refuse, in words that name the field: either it is
# another model, or Transformers itself fails in the first forward pass.
OURS_ALONE = {
    "a-number-for-each-layer-that-differs": "supported: one number for all layers",
    "bias-everywhere": "use_bias is True, supported: False",  # ERNIE's head would have one
    "both-directions": "use_bidirectional_attention",
    "dynamic": "'dynamic'",
    "dynamic-with-alpha": "'dynamic'",
    "eps-null": "layer_norm_eps is null",
    # gpt-oss has an activation of its own, whatever the file says.
    **{
        name: f"hidden_act is '{name.replace('-', '_')}', supported: 'silu'"
        for name in ("gelu", "gelu-new", "relu")
    },
    "experts-of-a-token-null": "is null, expected an integer",
    "groups-of-one": "expected groups of two and more",
    "groups-that-do-not-divide": "expected groups of two and more",
    "head-dim": "head_dim is 12, expected hidden_size",
    "longrope": "short_factor and long_factor have 4",
    "more-experts": "num_experts_per_tok is 5, supported: 2",  # of PhiMoE
    "more-of-a-token-than-there-are": "is 5, ",
    "no-experts": "experts is 0, expected an integer from 1",
    "not-causal": "is_causal",
    "parameters-by-type": "differs by kind of layer",
    "parameters-of-full-layers": "differs by kind of layer",
    "partial": "partial_rotary_factor is 0.5",
    "partial-null": "partial_rotary_factor is None",
    "turned-part-twice": "partial_rotary_factor is 0.25",
    "types": "layer_types",
    "types-of-another-family": "layer_types",
}
# What some families of Transformers refuse, and we take: a null of a size is as in a llama (the
# tensors then show whether it is meant), and "su" is what Phi 3 called LongRoPE.
THEIRS_ALONE = ("heads-of-keys-null", "head-dim-null", "su")


# Those with latent attention are in test_latent_configs.
OF_HEADS = [name for name in FAMILIES if name not in {row.model_type for row in deepseek.FAMILIES}]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OF_HEADS)
def test_facts_are_those_of_transformers(tmp_path, model_type):
    for name, change in CHANGES.items():
        raw = {"model_type": model_type, **SIZES, **FEW, **GIVEN.get(model_type, {}), **change}
        lines = differences(raw, tmp_path)
        if lines[:1] == ["refused by Transformers alone"]:
            assert name in THEIRS_ALONE
        elif lines and lines[0].startswith("refused here alone"):
            assert OURS_ALONE.get(name, "no difference") in lines[0], name
        else:
            assert not lines, name


WITH_EXPERTS = sorted({*(each.model_type for each in MIXTURES.values()), "gpt_oss"})


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_numbers_of_experts_where_nothing_is_said(tmp_path, model_type):
    raw = {"model_type": model_type, **SIZES, **GIVEN.get(model_type, {}), "num_hidden_layers": 4}
    assert differences(raw, tmp_path) == []


OF_LLAMA4 = {
    "chunks": {"attention_chunk_size": 8},
    "chunks-null": {"attention_chunk_size": None},
    "chunks-as-long-as-the-context": {"attention_chunk_size": 64, "max_position_embeddings": 64},
    "types": {"layer_types": [CHUNKED, FULL] * 3 + [FULL]},
    "types-of-a-window": {"layer_types": [SLIDING] * N_LAYERS},
    "no-layer-without-rope": {"no_rope_layers": [1] * N_LAYERS},
    "layers-without-rope-empty": {"no_rope_layers": []},
    "layers-without-rope-too-few": {"no_rope_layers": [1, 0]},
    "layers-with-experts": {"moe_layers": [0, 5]},
    "layers-with-experts-none": {"moe_layers": []},
    "layers-with-experts-null": {"moe_layers": None, "interleave_moe_layer_step": 3},
    "each-ninth-layer": {"interleave_moe_layer_step": 9},
    "widths": {"intermediate_size": 24, "intermediate_size_mlp": 48},
    "no-growth": {"attn_temperature_tuning": False},
    "growth-null": {"attn_temperature_tuning": None},
    "growth-another-number": {"attn_temperature_tuning": 3},
    "growth": {"attn_scale": 0.5, "floor_scale": 16},
    "growth-by-a-fraction": {"floor_scale": 1.5},
    "no-norms-of-heads": {"use_qk_norm": False},
    "jitter": {"router_jitter_noise": 0.1},
    "scout": {
        "rope_scaling": {**LLAMA3, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    },
}


@pytest.mark.parametrize("name", OF_LLAMA4)
def test_facts_of_llama_4(tmp_path, name):
    raw = {"model_type": "llama4_text", **SIZES, **FEW, **OF_LLAMA4[name]}
    assert differences(raw, tmp_path) == []


def test_growth_as_the_first_files_of_llama_4_have_it(tmp_path):
    """A 4, where files say true today: Transformers refuses it now, as it does any number."""
    raw = {"model_type": "llama4_text", **SIZES, **FEW, "attn_temperature_tuning": 4}
    assert differences(raw, tmp_path) == ["refused by Transformers alone"]
    said = {**raw, "attn_temperature_tuning": True}
    assert model_config(raw, where="here") == model_config(said, where="here")


@pytest.mark.parametrize("model_type", GIVEN)
def test_what_must_be_given_is_refused_without_it(tmp_path, model_type):
    raw = {"model_type": model_type, **SIZES}
    assert differences(raw, tmp_path) == (
        ["refused here alone: config.json: " + REFUSED[model_type]] if model_type in REFUSED else []
    )


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma4_text"])
def test_sizes_that_published_files_leave_out(tmp_path, model_type):
    left_out = ("vocab_size", "num_attention_heads")
    raw = {"model_type": model_type, **SIZES, **GIVEN.get(model_type, {})}
    raw = {key: value for key, value in raw.items() if key not in left_out}
    assert differences(raw, tmp_path) == []


REFUSED = {  # Transformers makes them, and what it makes does not run, or is another model
    "gemma4_text": "hidden_size_per_layer_input is 256, supported: 0, or none at all",
    "helium": "head_dim is 128, expected hidden_size 2560 divided by num_attention_heads 320",
}


@pytest.mark.slow
def test_every_exception_is_one(tmp_path):
    """No name stands in a list of exceptions that is none."""
    met = set()
    for model_type in OF_HEADS:
        for name in (*OURS_ALONE, *THEIRS_ALONE):
            given = {**SIZES, **FEW, **GIVEN.get(model_type, {})}
            raw = {"model_type": model_type, **given, **CHANGES[name]}
            if any("alone" in line for line in differences(raw, tmp_path)):
                met.add(name)
    assert met == {*OURS_ALONE, *THEIRS_ALONE}
