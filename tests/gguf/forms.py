"""Tiny models of each architecture, saved by Transformers: what GGUF files of them are held
against."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

_SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# Heads that share out the width, without which llama.cpp takes no model of some architectures.
_SHARED_OUT = {"head_dim": 16}
_LAYER_NORMS = {**_SHARED_OUT, "rms_norm_eps": None}
_FACTORS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.3, 1.4, 1.6],
    "long_factor": [1.0, 1.2, 2.0, 3.0, 4.0, 8.0],
    "partial_rotary_factor": 0.75,
}
_WINDOWS = {"sliding_window": 5, "num_hidden_layers": 5}
_FIVE = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]
_GEMMA = {"tie_word_embeddings": True, "sliding_window": 5}
# No two axes are equal.
_LATENT = {
    **_EXPERTS,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_YARN_OF_LATENTS = {
    **_YARN,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_DELTA = {
    "num_hidden_layers": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,  # llama.cpp takes no other
    "rms_norm_eps": 1e-2,  # else heads whose outputs nearly cancel are all rounding
}
_OF_DELTA = {**_DELTA, **_EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 48}
# Name -> (the class of its config in Transformers, what differs from _SIZES).
FORMS = {
    "llama": ("LlamaConfig", {}),
    "llama, tied, biases": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, llama3 rope": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama, linear rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "wide": ("LlamaConfig", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}),
    "vocabulary of 1500": ("LlamaConfig", {"vocab_size": 1500, "num_hidden_layers": 1}),
    "vocabulary of 4100": ("LlamaConfig", {"vocab_size": 4100, "num_hidden_layers": 1}),
    "vocabulary of 32000": ("LlamaConfig", {"vocab_size": 32000, "num_hidden_layers": 1}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "ministral3": (
        "Ministral3Config",
        {
            "sliding_window": None,
            "rope_parameters": {
                **_YARN,
                "original_max_position_embeddings": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "qwen2": ("Qwen2Config", {"head_dim": 16}),  # llama.cpp takes no other
    "qwen3": ("Qwen3Config", {}),
    "qwen3, yarn": ("Qwen3Config", {"rope_parameters": _YARN}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 6, **_EXPERTS}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
            **_EXPERTS,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_SHARED_OUT,
            **_EXPERTS,
            "num_experts": 6,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "olmo": ("OlmoConfig", {**_LAYER_NORMS, "clip_qkv": 0.7}),
    "olmo2": ("Olmo2Config", _SHARED_OUT),
    "olmo3": (
        "Olmo3Config",
        {
            **_SHARED_OUT,
            **_WINDOWS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": _YARN,
            },
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {**_SHARED_OUT, "num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 2},
    ),
    "exaone4": (
        "Exaone4Config",
        {**_SHARED_OUT, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "exaone4, window": ("Exaone4Config", {**_SHARED_OUT, **_WINDOWS, "layer_types": _FIVE}),
    "smollm3": (
        "SmolLM3Config",
        {**_SHARED_OUT, "num_hidden_layers": 5},
    ),
    "arcee": ("ArceeConfig", {}),
    "seed_oss": ("SeedOssConfig", {"attention_out_bias": False}),
    "granite": ("GraniteConfig", {**_SHARED_OUT, **_FACTORS, "tie_word_embeddings": True}),
    "granitemoe": (
        "GraniteMoeConfig",
        {**_SHARED_OUT, **_FACTORS, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "glm4": ("Glm4Config", {"attention_bias": True}),
    "phi3": (
        "Phi3Config",
        {**_SHARED_OUT, "sliding_window": None, "original_max_position_embeddings": 512},
    ),
    "phi3, long texts": (
        "Phi3Config",
        {
            **_SHARED_OUT,
            "sliding_window": None,
            "original_max_position_embeddings": 8,
            "rope_parameters": _LONGROPE,
        },
    ),
    "phi3, short texts": (
        "Phi3Config",
        {
            **_SHARED_OUT,
            "sliding_window": None,
            "original_max_position_embeddings": 256,
            "rope_parameters": _LONGROPE,
        },
    ),
    "ernie4_5": ("Ernie4_5Config", {"use_bias": False, "tie_word_embeddings": True}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "intermediate_size": 128,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
            "tie_word_embeddings": True,
        },
    ),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "hunyuan_moe": ("HunYuanMoEV1Config", {"num_experts": 6, "moe_topk": 2}),
    "cohere": ("CohereConfig", {**_LAYER_NORMS, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere, norms": (
        "CohereConfig",
        {**_LAYER_NORMS, "logit_scale": 0.25, "tie_word_embeddings": True, "use_qk_norm": True},
    ),
    "cohere2": (
        "Cohere2Config",
        {**_LAYER_NORMS, **_WINDOWS, "logit_scale": 0.25, "tie_word_embeddings": True},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "starcoder2": (
        "Starcoder2Config",
        {**_LAYER_NORMS, "sliding_window": None, "tie_word_embeddings": True},
    ),
    "stablelm": ("StableLmConfig", {**_LAYER_NORMS, "use_qkv_bias": True}),
    "stablelm, parallel": (
        "StableLmConfig",
        {**_LAYER_NORMS, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "nemotron": ("NemotronConfig", _LAYER_NORMS),
    "deepseek_v3": ("DeepseekV3Config", {**_LATENT, "n_group": 3, "topk_group": 2}),
    "deepseek_v3, yarn, not normed": (
        "DeepseekV3Config",
        {**_LATENT, "norm_topk_prob": False, "rope_parameters": _YARN_OF_LATENTS},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_LATENT, "norm_topk_prob": False, "rope_parameters": _YARN_OF_LATENTS},
    ),
    "deepseek_v2, groups": (
        "DeepseekV2Config",
        {
            **_LATENT,
            "norm_topk_prob": False,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
        },
    ),
    # Rows of which blocks can be made.
    "deepseek_v3, wide": (
        "DeepseekV3Config",
        {**_LATENT, "kv_lora_rank": 160, "qk_nope_head_dim": 32, "v_head_dim": 128},
    ),
    # llama.cpp knows models that project queries at once by their number of layers.
    "deepseek_v2, lite": (
        "DeepseekV2Config",
        {**_LATENT, "norm_topk_prob": False, "q_lora_rank": None, "num_hidden_layers": 27},
    ),
    "qwen3_next": ("Qwen3NextConfig", _OF_DELTA),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5, of unequal heads": (
        "Qwen3_5TextConfig",
        {**_DELTA, "linear_key_head_dim": 10, "linear_value_head_dim": 14},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_OF_DELTA, "intermediate_size": None}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
}


# What is exported to a file, or is not to be: a file itself has no such form.
TO_EXPORT = {
    "llama, gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "glm4_moe, groups": ("Glm4MoeConfig", {**FORMS["glm4_moe"][1], "n_group": 3, "topk_group": 2}),
    "glm": ("GlmConfig", {}),
    "ernie4_5_moe, every second": (
        "Ernie4_5_MoeConfig",
        {
            **FORMS["ernie4_5_moe"][1],
            "moe_layer_interval": 2,
            "num_hidden_layers": 4,
        },
    ),
    "starcoder2, window": (
        "Starcoder2Config",
        {**FORMS["starcoder2"][1], "sliding_window": 8},
    ),
    "smollm3, every third": (
        "SmolLM3Config",
        {**FORMS["smollm3"][1], "no_rope_layers": [1, 1, 0, 1, 1]},
    ),
    "qwen3_moe, not normed": (
        "Qwen3MoeConfig",
        {"num_experts": 6, **_EXPERTS, "norm_topk_prob": False},
    ),
    "gemma3, period of 3": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "query_pre_attn_scalar": 32,
            "layer_types": [*["sliding_attention"] * 2, "full_attention"],
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", {"sliding_window": 8}),
}
# Those that differ by more than the size of the vocabulary.
MODELS = [name for name in FORMS if "vocabulary" not in name]
# Those that no file is exported of.
NOT_EXPORTED = [name for name in MODELS if name.startswith(("deepseek", "qwen3_5", "qwen3_next"))]
# Those that run in every session: of each way to lay out a model one.
FIRST = (
    *("llama, tied, biases", "qwen3, yarn", "olmo2", "granitemoe", "phi3, long texts", "cohere2"),
    *("minimax_m2", "starcoder2", "gemma2", "deepseek_v3", "deepseek_v2"),
    *("qwen3_next", "qwen3_5"),
)


def save(name: str, folder: Path) -> Path:
    """Saves a random model, its norms and biases random too."""
    import torch
    import transformers

    kind, changes = (FORMS | TO_EXPORT)[name]
    config = getattr(transformers, kind)(**{**_SIZES, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in own else 0.0, std=0.1)
    model.save_pretrained(folder)
    return folder


def logits_with(folder: Path, tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Transformers' logits [T, V] of the model in `folder` with other tensors, in float32."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    other = folder.with_name(f"{folder.name}-other")
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, other / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        other, dtype=torch.float32, attn_implementation="eager"
    )
    shutil.rmtree(other)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
