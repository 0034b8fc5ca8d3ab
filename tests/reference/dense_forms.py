"""Tiny random models of every dense family that runs here, saved by Transformers itself."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
CHUNKED = "chunked_attention"


@dataclass(frozen=True)
class Dense:
    """One tiny model.

    `wrong` holds changes of whole keys of config.json. Each describes another model with the same
    tensors, and moves the logits of 40 tokens by more than a thousandth of the largest.
    """

    model_type: str
    config: dict  # keyword arguments of the family's config class
    wrong: tuple[dict, ...] = ()


def rope(theta: float = 10_000.0, kind: str = "default", **more) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **more}


def ropes(sliding: dict, full: dict) -> dict:
    return {"rope_parameters": {SLIDING: sliding, FULL: full}}


COMMON = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# No two axes are equal: queries 60, keys and values 20.
FREE = {**COMMON, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
# Where heads share out the width (6 each), or half of a head is rotated (8 each: 4).
BOUND = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {**BOUND, "hidden_size": 32}
HALF = {**FREE, "head_dim": 8}

# A quarter of 8: one pair turns. Two key heads of 5 and six value heads of 7.
DELTA = {
    **HALF,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "rms_norm_eps": 1e-2,  # else heads whose outputs nearly cancel are all rounding
}

WINDOW = {"sliding_window": 6}
WIDER = {"sliding_window": 7}
NO_WINDOW = {"sliding_window": None}
SFS = {"layer_types": [SLIDING, FULL, SLIDING]}
SSF = {"layer_types": [SLIDING, SLIDING, FULL]}
FSF = {"layer_types": [FULL, SLIDING, FULL]}
FFF = {"layer_types": [FULL, FULL, FULL]}
SSS = {"layer_types": [SLIDING, SLIDING, SLIDING]}

THETA = {"rope_parameters": rope(100.0)}
EPS = {"rms_norm_eps": 0.1}
GELU = {"hidden_act": "gelu"}
SILU = {"hidden_act": "silu"}
TIED = {"tie_word_embeddings": True}

# Position scaling begins at 16 and yarn's ramp takes the middle three of five frequencies.
MINISTRAL3 = {
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
# The ramp is 0, 1/2, 1 over three frequencies.
OLMO3 = {
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "attention_factor": 1.6,
}
SHORT, LONG = [1.0, 1.1, 1.3, 1.6], [1.0, 2.0, 4.0, 8.0]
GEMMA2 = {
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
# A full layer has 3 heads of keys with 16 numbers each, and turns 2 of its 8 pairs.
GEMMA4 = {
    **FREE,
    **WINDOW,
    **SSF,
    "global_head_dim": 16,
    "num_global_key_value_heads": 3,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "final_logit_softcapping": 2.0,
    **ropes(rope(100.0), rope(10_000.0, "proportional", partial_rotary_factor=0.25)),
}
GEMMA4_WRONG = (
    WIDER,
    EPS,
    {"hidden_activation": "silu"},
    {"final_logit_softcapping": None},
    ropes(rope(10_000.0), rope(10_000.0, "proportional", partial_rotary_factor=0.25)),
    ropes(rope(100.0), rope(100.0, "proportional", partial_rotary_factor=0.25)),
    ropes(rope(100.0), rope(10_000.0, "proportional", partial_rotary_factor=0.5)),
    ropes(rope(100.0), rope(10_000.0)),
)
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}

DENSE = {
    "llama": Dense("llama", FREE, (THETA, EPS, GELU)),
    "mistral": Dense("mistral", FREE | WINDOW, (NO_WINDOW, WIDER, THETA, EPS)),
    "mistral-full": Dense("mistral", FREE | NO_WINDOW, (WINDOW, THETA, GELU)),
    "ministral": Dense("ministral", FREE | WINDOW | SFS, (FSF, FFF, WIDER, THETA, EPS)),
    "ministral3": Dense(
        "ministral3",
        FREE | TIED | {"rope_parameters": rope(100.0, "yarn", **MINISTRAL3)},
        (
            EPS,
            *(
                {"rope_parameters": rope(100.0, "yarn", **(MINISTRAL3 | change))}
                for change in (
                    {"llama_4_scaling_beta": 0.0},
                    {"original_max_position_embeddings": 24},
                    {"factor": 4.0},
                    {"mscale_all_dim": 0.0},
                    {"beta_slow": 0.5},
                    {"truncate": False},
                )
            ),
        ),
    ),
    "qwen2": Dense("qwen2", BOUND, (WINDOW | SSS | {"use_sliding_window": True}, THETA, EPS)),
    "qwen2-sliding": Dense(
        "qwen2",
        BOUND | TIED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
        (SFS, FFF | {"use_sliding_window": False}, WIDER, THETA),
    ),
    "qwen3": Dense("qwen3", FREE, (THETA, EPS, GELU)),
    "qwen3-sliding": Dense(
        "qwen3",
        FREE | TIED | WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
        (SSS, FFF, WIDER, THETA, EPS),
    ),
    "gemma": Dense("gemma", FREE, (THETA, EPS, SILU)),
    "gemma2": Dense(
        "gemma2",
        FREE | WINDOW | GEMMA2,
        (
            *(FSF, FFF, WIDER, THETA, EPS, {"hidden_activation": "silu"}),
            {"query_pre_attn_scalar": 10},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
        ),
    ),
    "gemma3": Dense(
        "gemma3_text",
        FREE | WINDOW | SSF | {"query_pre_attn_scalar": 7} | ropes(rope(100.0), rope()),
        (
            *(SFS, FFF, WIDER, EPS, {"hidden_activation": "silu"}),
            {"query_pre_attn_scalar": 10},
            {"final_logit_softcapping": 2.0},
            ropes(rope(), rope()),
            ropes(rope(100.0), rope(100.0)),
        ),
    ),
    "gemma3-linear": Dense(
        "gemma3_text",
        FREE | WINDOW | SFS | ropes(rope(100.0), rope(10_000.0, "linear", factor=8.0)),
        (
            ropes(rope(100.0), rope()),
            ropes(rope(100.0), rope(10_000.0, "linear", factor=4.0)),
            ropes(rope(100.0, "linear", factor=8.0), rope(10_000.0, "linear", factor=8.0)),
            SSF,
        ),
    ),
    "gemma4": Dense("gemma4_text", GEMMA4 | {"attention_k_eq_v": True}, GEMMA4_WRONG),
    "gemma4-values": Dense("gemma4_text", GEMMA4 | {"attention_k_eq_v": False}, GEMMA4_WRONG),
    "phi3": Dense("phi3", WIDE, (THETA, EPS, GELU, WINDOW)),
    "phi3-partial": Dense(
        "phi3",
        WIDE | {"rope_parameters": rope(partial_rotary_factor=0.75)},
        (
            {"rope_parameters": rope(partial_rotary_factor=1.0)},
            {"rope_parameters": rope(partial_rotary_factor=0.5)},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.75)},
        ),
    ),
    "phi3-longrope": Dense(
        "phi3",
        WIDE
        | {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
        | {"rope_parameters": rope(kind="longrope", short_factor=SHORT, long_factor=LONG)},
        (
            {"rope_parameters": rope(kind="longrope", short_factor=LONG, long_factor=LONG)},
            {"rope_parameters": rope()},
            {"max_position_embeddings": 512},
            {"original_max_position_embeddings": 32},
        ),
    ),
    # 40 tokens are past the original length, so the long factors hold for all of them; a cached run
    # of the reference that crosses it keeps keys turned by the short ones, and does not agree.
    "phi4-mini": Dense(
        "phi3",
        WIDE
        | TIED
        | {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
        | {
            "rope_parameters": rope(
                *(10_000.0, "longrope"),
                partial_rotary_factor=0.75,
                short_factor=SHORT[:3],
                long_factor=LONG[:3],
            )
        },
        (
            {
                "rope_parameters": rope(
                    *(10_000.0, "longrope"),
                    partial_rotary_factor=0.75,
                    short_factor=SHORT[:3],
                    long_factor=SHORT[:3],
                )
            },
            {
                "rope_parameters": rope(
                    *(10_000.0, "longrope"),
                    partial_rotary_factor=1.0,
                    short_factor=SHORT,
                    long_factor=LONG,
                )
            },
            {"original_max_position_embeddings": 64},
        ),
    ),
    "phi3-window": Dense("phi3", WIDE | WINDOW, (NO_WINDOW, WIDER, THETA)),
    "olmo": Dense(
        "olmo", BOUND | {"clip_qkv": 0.7}, ({"clip_qkv": None}, {"clip_qkv": 1.4}, THETA, GELU)
    ),
    "olmo2": Dense("olmo2", BOUND, (THETA, EPS, GELU)),
    "olmo3": Dense(
        "olmo3",
        BOUND | WINDOW | SFS | ropes(rope(100.0), rope(100.0, "yarn", **OLMO3)),
        (
            *(FSF, FFF, WIDER, EPS),
            ropes(rope(100.0), rope(100.0)),
            ropes(rope(100.0, "yarn", **OLMO3), rope(100.0, "yarn", **OLMO3)),
            ropes(rope(100.0), rope(100.0, "yarn", **(OLMO3 | {"attention_factor": None}))),
            ropes(rope(100.0), rope(100.0, "yarn", **(OLMO3 | {"beta_slow": 0.25}))),
        ),
    ),
    "granite": Dense(
        "granite", BOUND | TIED | GRANITE, (*({each: 1.0} for each in GRANITE), THETA, EPS)
    ),
    "smollm3": Dense(
        "smollm3",
        BOUND | {"no_rope_layers": [1, 0, 1]},
        ({"no_rope_layers": [1, 1, 1]}, {"no_rope_layers": [0, 1, 0]}, THETA, EPS),
    ),
    "cohere": Dense(
        "cohere",
        BOUND | {"logit_scale": 0.25},
        ({"logit_scale": 0.0625}, {"layer_norm_eps": 0.1}, THETA, GELU),
    ),
    "cohere-qk": Dense(
        "cohere",
        BOUND | {"logit_scale": 0.25, "use_qk_norm": True},
        ({"logit_scale": 0.0625}, {"layer_norm_eps": 0.1}, THETA),
    ),
    "cohere2": Dense(
        "cohere2",
        BOUND | WINDOW | SFS | {"logit_scale": 0.25},
        (SSS, FFF, WIDER, THETA, {"logit_scale": 0.0625}, {"layer_norm_eps": 0.1}),
    ),
    "glm": Dense(
        "glm",
        HALF,
        (
            {"rope_parameters": rope(partial_rotary_factor=1.0)},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
            *(EPS, GELU),
        ),
    ),
    "glm4": Dense(
        "glm4",
        HALF,
        (
            {"rope_parameters": rope(partial_rotary_factor=1.0)},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
            *(EPS, GELU),
        ),
    ),
    "seed_oss": Dense("seed_oss", FREE, (THETA, EPS, GELU)),
    "ernie4_5": Dense("ernie4_5", FREE, (THETA, EPS, GELU)),
    "ernie4_5-bias": Dense("ernie4_5", FREE | {"use_bias": True}, (THETA, EPS)),
    "helium": Dense("helium", BOUND | {"head_dim": 6}, (THETA, EPS, GELU)),
    "arcee": Dense("arcee", FREE, (THETA, EPS, SILU, {"hidden_act": "relu"})),
    "exaone4": Dense("exaone4", FREE | WINDOW | SFS, (FSF, FFF, SSS, WIDER, THETA, EPS)),
    # WINDOW alone makes every layer, all of them full, one that does not rotate.
    "exaone4-full": Dense(
        "exaone4", FREE | TIED | NO_WINDOW | FFF, (WINDOW, WINDOW | SSS, THETA, GELU)
    ),
    "hunyuan": Dense("hunyuan_v1_dense", FREE, (THETA, EPS, GELU)),
    "hunyuan-alpha": Dense(
        "hunyuan_v1_dense",
        FREE | TIED | {"rope_parameters": rope(100.0, "dynamic", alpha=50.0, factor=1.0)},
        (
            {"rope_parameters": rope(100.0)},
            {"rope_parameters": rope(5_000.0)},
            {"rope_parameters": rope(100.0, "dynamic", alpha=5.0, factor=1.0)},
        ),
    ),
    "starcoder2": Dense(
        "starcoder2",
        BOUND | WINDOW,
        (NO_WINDOW, WIDER, THETA, {"norm_epsilon": 0.1}, {"hidden_act": "relu"}),
    ),
    # A quarter of 8: one pair turns, at a speed that theta does not change.
    "stablelm": Dense(
        "stablelm",
        WIDE,
        (
            {"rope_parameters": rope(partial_rotary_factor=0.5)},
            {"layer_norm_eps": 0.1},
            GELU,
        ),
    ),
    "stablelm-qk": Dense(
        "stablelm",
        WIDE | {"qk_layernorm": True, "use_qkv_bias": True},
        ({"rope_parameters": rope(partial_rotary_factor=0.5)}, {"layer_norm_eps": 0.1}),
    ),
    "stablelm-parallel": Dense(
        "stablelm",
        WIDE | {"use_parallel_residual": True},
        ({"rope_parameters": rope(partial_rotary_factor=0.5)}, {"layer_norm_eps": 0.1}),
    ),
    "stablelm-half": Dense(
        "stablelm",
        WIDE | {"use_qkv_bias": True, "rope_parameters": rope(partial_rotary_factor=0.5)},
        (
            {"rope_parameters": rope(partial_rotary_factor=0.25)},
            {"rope_parameters": rope(partial_rotary_factor=1.0)},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
        ),
    ),
    "qwen3_5": Dense(
        "qwen3_5_text",
        DELTA | {"num_hidden_layers": 4},
        (
            {"rope_parameters": rope(partial_rotary_factor=0.5)},
            *(EPS, GELU),
        ),
    ),
    "qwen3_next": Dense(
        "qwen3_next",
        DELTA | {"layer_types": [LINEAR, FULL, LINEAR], "mlp_only_layers": [0, 1, 2]},
        ({"rope_parameters": rope(partial_rotary_factor=0.5)}, EPS, GELU),
    ),
    "nemotron": Dense(
        "nemotron",
        HALF,
        (
            {"rope_parameters": rope(partial_rotary_factor=1.0)},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
            *({"norm_eps": 0.1}, SILU),
        ),
    ),
}

# Their norms multiply by 1 + weight.
PLUS_ONE = (
    *("gemma", "gemma2", "gemma3_text", "nemotron"),
    *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
)
# All but this one.
GATED_NORM = "linear_attn.norm.weight"
SPREAD = 0.2


def save(
    folder: str | os.PathLike, name: str, *, seed: int = 0, dtype: str = "float32"
) -> str | os.PathLike:
    """Saves the model called `name` as safetensors in `folder` and returns the folder."""
    return save_model(folder, DENSE[name], seed=seed, dtype=dtype)


def save_model(
    folder: str | os.PathLike, dense: Dense, *, seed: int = 0, dtype: str = "float32"
) -> str | os.PathLike:
    """As `save`. Gains, biases and Gemma 4's factor of a layer are random too."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    # Config classes write into the dictionaries that they are given.
    config = CONFIG_MAPPING[dense.model_type](**deepcopy(dense.config))
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    gain = 0.0 if dense.model_type in PLUS_ONE else 1.0
    with torch.no_grad():
        for leaf, tensor in model.state_dict().items():
            is_gain = "norm" in leaf and leaf.endswith(".weight")
            is_one = leaf.endswith((".layer_scalar", GATED_NORM))
            mean = 1.0 if is_one else gain if is_gain else 0.0
            # Small outputs of the convolution, which are divided by their length, lose digits.
            spread = 1.0 if leaf.endswith("conv1d.weight") else SPREAD
            tensor.normal_(mean, spread, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def load(folder: str | os.PathLike, dtype):
    """Transformers' model in a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def reference_logits(folder: str | os.PathLike, ids, dtype):
    """Transformers' logits [B, T, vocabulary] of ids [B, T], all at once and without a cache."""
    import torch

    with torch.no_grad():
        return load(folder, dtype)(torch.as_tensor(ids), use_cache=False).logits
