"""Tiny random models of every family with experts that runs here, saved by Transformers itself."""

from __future__ import annotations

import os

from tests.reference.dense_forms import (
    BOUND,
    CHUNKED,
    DELTA,
    EPS,
    FREE,
    FULL,
    GELU,
    GEMMA4,
    GRANITE,
    HALF,
    LINEAR,
    NO_WINDOW,
    THETA,
    TIED,
    WIDER,
    WINDOW,
    Dense,
    rope,
    save_model,
)

# No two axes are equal: an expert is 14 wide, a shared one 18 or a multiple of 14.
EXPERTS = {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 14}
SHARED = {"shared_expert_intermediate_size": 18}
FEWER = {"num_experts_per_tok": 3}
NORMED = {"norm_topk_prob": True}
NOT_NORMED = {"norm_topk_prob": False}
LFL = {"layer_types": [LINEAR, FULL, LINEAR]}

# Three groups of four experts, of which two may be chosen.
GLM4 = {
    **HALF,
    "moe_intermediate_size": 14,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}
GLM4_WRONG = (
    *(FEWER, NOT_NORMED, EPS, GELU),
    {"routed_scaling_factor": 1.0},
    {"topk_group": 1},
    {"topk_group": 3},
    {"n_group": 2},
    {"rope_parameters": rope(partial_rotary_factor=1.0)},
    {"rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
)
ERNIE = {**FREE, "moe_num_experts": 9, "moe_k": 4, "moe_intermediate_size": 14}
# So much that the weights of some tokens are divided by it, not by their sum.
ERNIE_WRONG = ({"moe_k": 3}, {"moe_norm_min": 0.7}, THETA, EPS, GELU)

# Dense layers are 40 wide, an expert and the shared one 14. Chunks of 6 and steps of 5.
LLAMA4 = {
    **FREE,
    "intermediate_size": 14,
    "intermediate_size_mlp": 40,
    "num_local_experts": 7,
    "attention_chunk_size": 6,
    "floor_scale": 5,
    "attn_scale": 0.5,
}
CCCF = [CHUNKED, CHUNKED, CHUNKED, FULL]

MIXTURES = {
    "mixtral": Dense(
        "mixtral",
        FREE | {"num_local_experts": 7, "num_experts_per_tok": 3},
        ({"num_experts_per_tok": 2}, WINDOW, THETA, EPS, GELU),
    ),
    "mixtral-sliding": Dense(
        "mixtral",
        FREE | TIED | WINDOW | {"num_local_experts": 7, "num_experts_per_tok": 1},
        (NO_WINDOW, WIDER, {"num_experts_per_tok": 2}),
    ),
    "qwen2_moe": Dense("qwen2_moe", BOUND | EXPERTS | SHARED, (FEWER, NORMED, THETA, EPS, GELU)),
    # Layers 0 and 2 have a window, layers 1 and 3 experts; layer 3 alone has both by no rule.
    "qwen2_moe-some": Dense(
        "qwen2_moe",
        BOUND
        | EXPERTS
        | SHARED
        | NORMED
        | WINDOW
        | {"num_hidden_layers": 4, "use_sliding_window": True, "decoder_sparse_step": 2},
        (FEWER, NOT_NORMED, WIDER, {"layer_types": [FULL] * 4}),
    ),
    "qwen3_moe": Dense("qwen3_moe", FREE | EXPERTS, (FEWER, NORMED, THETA, EPS, GELU)),
    "qwen3_moe-some": Dense(
        "qwen3_moe",
        FREE
        | EXPERTS
        | NORMED
        | WINDOW
        | {"mlp_only_layers": [1], "use_sliding_window": True, "attention_bias": True},
        (FEWER, NOT_NORMED, WIDER, {"use_sliding_window": False}),
    ),
    "olmoe": Dense(
        "olmoe",
        BOUND | {"num_experts": 9, "num_experts_per_tok": 4, "clip_qkv": 0.7},
        (FEWER, NORMED, {"clip_qkv": None}, THETA, EPS),
    ),
    "glm4_moe": Dense("glm4_moe", GLM4 | {"attention_bias": True}, GLM4_WRONG),
    "glm4_moe-norms": Dense(
        "glm4_moe",
        GLM4 | {"use_qk_norm": True, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
        (FEWER, {"n_group": 3}, EPS),
    ),
    "minimax_m2": Dense(
        "minimax_m2",
        FREE
        | {"num_local_experts": 7, "num_experts_per_tok": 3}
        | {"rope_parameters": rope(partial_rotary_factor=0.6)},
        (
            *({"num_experts_per_tok": 2}, EPS, GELU),
            {"rope_parameters": rope(partial_rotary_factor=1.0)},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.6)},
        ),
    ),
    "ernie4_5_moe": Dense("ernie4_5_moe", ERNIE, ERNIE_WRONG),
    "ernie4_5_moe-some": Dense(
        "ernie4_5_moe",
        ERNIE
        | {"num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_end_index": 2}
        | {"moe_layer_start_index": 0, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
        ({"moe_k": 3}, THETA),
    ),
    "hunyuan_v1_moe": Dense(
        "hunyuan_v1_moe",
        FREE | {"num_experts": 9, "moe_topk": 4},
        ({"moe_topk": 3}, THETA, EPS, GELU),
    ),
    "hunyuan_v1_moe-alpha": Dense(
        "hunyuan_v1_moe",
        FREE
        | TIED
        | {"num_experts": 9, "moe_topk": [4, 4, 4]}
        | {"rope_parameters": rope(100.0, "dynamic", alpha=50.0, factor=1.0)},
        (
            {"moe_topk": [3, 3, 3]},
            {"rope_parameters": rope(100.0)},
            {"rope_parameters": rope(100.0, "dynamic", alpha=5.0, factor=1.0)},
        ),
    ),
    "phimoe": Dense(
        "phimoe",
        BOUND
        | {"num_local_experts": 7, "attention_bias": True, "router_jitter_noise": 0.3}
        | {"lm_head_bias": True},
        ({"router_jitter_noise": 0.01}, {"router_jitter_noise": 0.0}, WINDOW, THETA, EPS, GELU),
    ),
    # LongRoPE within the length of short texts.
    "phimoe-longrope": Dense(
        "phimoe",
        BOUND
        | WINDOW
        | TIED
        | {"lm_head_bias": True}
        | {"num_local_experts": 7}
        | {
            "rope_parameters": rope(
                *(10_000.0, "longrope"),
                short_factor=[1.0, 1.5, 2.0],
                long_factor=[1.0, 4.0, 8.0],
                original_max_position_embeddings=64,
                short_mscale=1.3,
                long_mscale=1.2,
            )
        },
        (
            NO_WINDOW,
            {
                "rope_parameters": rope(
                    *(10_000.0, "longrope"),
                    short_factor=[1.0, 1.5, 3.0],
                    long_factor=[1.0, 4.0, 8.0],
                    original_max_position_embeddings=64,
                    short_mscale=1.0,
                    long_mscale=1.2,
                )
            },
        ),
    ),
    "qwen3_next": Dense(
        "qwen3_next",
        DELTA | EXPERTS | SHARED | LFL | {"mlp_only_layers": [2]},
        (FEWER, NOT_NORMED, {"rope_parameters": rope(partial_rotary_factor=0.5)}, GELU),
    ),
    "granitemoe": Dense(
        "granitemoe",
        BOUND | TIED | GRANITE | {"num_local_experts": 9, "num_experts_per_tok": 4},
        (FEWER, *({each: 1.0} for each in GRANITE), THETA, EPS, GELU),
    ),
    "gemma4": Dense(
        "gemma4_text",
        GEMMA4
        | {"attention_k_eq_v": True, "enable_moe_block": True}
        | {"num_experts": 9, "top_k_experts": 4, "moe_intermediate_size": 14},
        ({"top_k_experts": 3}, WIDER, EPS, {"hidden_activation": "silu"}),
    ),
    # Layers 1 and 3 have experts, layer 3 no rotary embedding.
    "llama4": Dense(
        "llama4_text",
        LLAMA4 | {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
        (
            *(EPS, GELU, THETA, {"attention_chunk_size": 7}, {"num_experts_per_tok": 2}),
            *({"floor_scale": 4}, {"attn_scale": 0.1}, {"attn_temperature_tuning": False}),
            *({"use_qk_norm": False}, {"no_rope_layers": [1, 1, 1, 1]}),
            *({"layer_types": [FULL] * 4}, {"layer_types": [CHUNKED] * 4}),
        ),
    ),
    # Scout's rotary embedding, whose factors of low and high frequencies are the same.
    "llama4-all": Dense(
        "llama4_text",
        LLAMA4
        | TIED
        | {"num_experts_per_tok": 3, "attention_bias": True, "use_qk_norm": False}
        | {"no_rope_layers": [1, 0, 1], "layer_types": [FULL, CHUNKED, CHUNKED]}
        | {
            "rope_parameters": rope(
                *(100.0, "llama3"),
                factor=16.0,
                low_freq_factor=1.0,
                high_freq_factor=1.0,
                original_max_position_embeddings=64,
            )
        },
        ({"num_experts_per_tok": 1}, {"use_qk_norm": True}, THETA, {"no_rope_layers": [1, 1, 0]}),
    ),
    "qwen3_5_moe": Dense(
        "qwen3_5_moe_text",
        DELTA | EXPERTS | SHARED | {"num_hidden_layers": 4},
        (FEWER, {"rope_parameters": rope(partial_rotary_factor=0.5)}, GELU),
    ),
}

# With weights of seed 0 and gelu the logits of Transformers in float32 are 9e-6 of the largest from
# its own in float64 (ours 3e-6), which leaves no room to compare them.
SEEDS = {"qwen3_next": 1}


def save(folder: str | os.PathLike, name: str, *, dtype: str = "float32") -> str | os.PathLike:
    """Saves the model called `name` as safetensors in `folder` and returns the folder."""
    return save_model(folder, MIXTURES[name], seed=SEEDS.get(name, 0), dtype=dtype)


def load(folder: str | os.PathLike, dtype):
    """Transformers' model in a folder, with the experts one after another: its own kernel refuses
    widths that are no multiple of 8."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


def reference_logits(folder: str | os.PathLike, ids, dtype):
    """Transformers' logits [B, T, vocabulary] of ids [B, T], all at once and without a cache."""
    import torch

    with torch.no_grad():
        return load(folder, dtype)(torch.as_tensor(ids), use_cache=False).logits
