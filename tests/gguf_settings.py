"""The metadata of GGUF files of models that Transformers has saved, as llama.cpp's converter writes
it: by its own package `gguf`."""

from __future__ import annotations

import math

import gguf
import numpy as np

# Whose head_dim llama.cpp's converter leaves out.
_SHARES_OUT = ("granite", "granitemoe", "phi3", "stablelm")
# What each of these keys of a config becomes, whatever the model.
_NUMBERS = {
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_eps": "add_layer_norm_eps",
    "norm_epsilon": "add_layer_norm_eps",
    "num_local_experts": "add_expert_count",
    "num_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
}
_GRANITE = {
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
_QWEN_SHARED = {
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
}
_GLM = {
    "n_routed_experts": "add_expert_count",
    "n_shared_experts": "add_expert_shared_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "first_k_dense_replace": "add_leading_dense_block_count",
    "routed_scaling_factor": "add_expert_weights_scale",
    "norm_topk_prob": "add_expert_weights_norm",
}
_DEEPSEEK = {
    **_GLM,
    "n_group": "add_expert_group_count",
    "topk_group": "add_expert_group_used_count",
    "q_lora_rank": "add_q_lora_rank",
    "kv_lora_rank": "add_kv_lora_rank",
}
# The same, of one model type.
_OWN = {
    "qwen2_moe": _QWEN_SHARED,
    "qwen3_moe": {"moe_intermediate_size": "add_expert_feed_forward_length"},
    "olmo": {"clip_qkv": "add_clamp_kqv"},
    "olmo3": {"sliding_window": "add_sliding_window"},
    "exaone4": {"sliding_window": "add_sliding_window"},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "glm4_moe": _GLM,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
    "qwen3_next": _QWEN_SHARED,
    "qwen3_5_moe_text": _QWEN_SHARED,
    "phi3": {"original_max_position_embeddings": "add_rope_scaling_orig_ctx_len"},
    "ernie4_5_moe": {
        "moe_num_experts": "add_expert_count",
        "moe_k": "add_expert_used_count",
        "moe_num_shared_experts": "add_expert_shared_count",
        "moe_intermediate_size": "add_expert_feed_forward_length",
        "moe_layer_start_index": "add_leading_dense_block_count",
        "moe_layer_interval": "add_interleave_moe_layer_step",
    },
    "hunyuan_v1_moe": {
        "moe_topk": "add_expert_used_count",
        "intermediate_size": "add_expert_feed_forward_length",
    },
    "cohere": {"logit_scale": "add_logit_scale"},
    "cohere2": {"logit_scale": "add_logit_scale", "sliding_window": "add_sliding_window"},
    "minimax_m2": {"intermediate_size": "add_expert_feed_forward_length"},
    "stablelm": {"use_parallel_residual": "add_parallel_residual"},
    "nemotron": {"norm_eps": "add_layer_norm_eps"},
    "gemma2": {
        "sliding_window": "add_sliding_window",
        "attn_logit_softcapping": "add_attn_logit_softcapping",
        "final_logit_softcapping": "add_final_logit_softcapping",
    },
    "gemma3_text": {"sliding_window": "add_sliding_window"},
}
# How many elements of a head are turned, where the converter says so.
_TURNED = {
    **dict.fromkeys(("llama", "mixtral", "ministral3", "smollm3", "arcee"), 1.0),
    **dict.fromkeys(("glm4", "glm4_moe", "nemotron"), 0.5),
    **dict.fromkeys(("granite", "granitemoe", "phi3", "cohere2", "minimax_m2"), 1.0),
    **dict.fromkeys(("stablelm", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 0.25),
}


def write_settings(writer, config: dict, *, older: bool = False) -> None:
    """Adds what `config` says of the model. `older`: as of `gguf_files.write`."""
    kind, heads = config["model_type"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    if config.get("intermediate_size"):
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if "kv_lora_rank" in config:
        _write_latent(writer, config, older)
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
    if kind not in _SHARES_OUT and "kv_lora_rank" not in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    for key, method in {**_NUMBERS, **_OWN.get(kind, {})}.items():
        if config.get(key) is not None:
            getattr(writer, method)(config[key])
    if kind in _TURNED:
        turned = full.get("partial_rotary_factor", _TURNED[kind])
        writer.add_rope_dimension_count(int(head_dim * turned))
    if kind in _MORE:
        _MORE[kind](writer, config)


def _write_latent(writer, config, older):
    """Files of today have one key for all heads, the latent; those of 2024 a key for each."""
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    key, value = config["qk_nope_head_dim"] + turned, config["v_head_dim"]
    writer.add_head_count_kv(config["num_attention_heads"] if older else 1)
    writer.add_key_length(key if older else rank + turned)
    writer.add_value_length(value if older else rank)
    if not older:
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)
    writer.add_rope_dimension_count(turned)
    if "mscale_all_dim" in config["rope_parameters"]:
        writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_parameters"]["mscale_all_dim"])
    if config["model_type"] == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _of_delta(writer, config):
    n_values = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(n_values)
    writer.add_ssm_inner_size(n_values * config["linear_value_head_dim"])
    writer.add_full_attention_interval(4)
    if config["model_type"] != "qwen3_next":
        writer.add_rope_dimension_sections([2, 1, 1, 0])


def _flags(writer, config):
    if config.get("sliding_window"):
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        writer.add_sliding_window_pattern(slides)


def _of_olmo3(writer, config):
    _flags(writer, config)
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def _of_phi3(writer, config):
    writer.add_sliding_window(config["sliding_window"] or 0)
    rope, length = config["rope_parameters"], config["max_position_embeddings"]
    if "long_factor" in rope:
        original = config["original_max_position_embeddings"]
        scale = math.log(length / original) / math.log(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + scale))
        for own in ("long", "short"):
            factors = np.array(rope[f"{own}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{own}.weight", factors)


def _of_ernie(writer, config):
    """Twice the width of an expert, in released models."""
    width = config["intermediate_size"] // config["num_key_value_heads"]
    writer.add_expert_shared_feed_forward_length(width)


def _of_ministral3(writer, config):
    writer.add_rope_scaling_yarn_log_mul(config["rope_parameters"]["mscale_all_dim"])
    writer.add_attn_temperature_scale(config["rope_parameters"]["llama_4_scaling_beta"])


_MORE = {
    "ministral3": _of_ministral3,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _of_delta),
    "ernie4_5_moe": _of_ernie,
    "olmo": lambda writer, config: writer.add_layer_norm_eps(1e-5),
    "olmo3": _of_olmo3,
    "exaone4": _flags,
    "phi3": _of_phi3,
    "hunyuan_v1_moe": lambda writer, config: writer.add_expert_shared_feed_forward_length(
        config["intermediate_size"]
    ),
    **dict.fromkeys(
        ("glm4_moe", "minimax_m2"),
        lambda writer, config: writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
    ),
}
