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
_GEMMA = {"tie_word_embeddings": True, "sliding_window": 5}
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
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
}


# What is exported to a file, or is not to be: a file itself has no such form.
TO_EXPORT = {
    "llama, gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "glm4_moe, groups": ("Glm4MoeConfig", {**FORMS["glm4_moe"][1], "n_group": 3, "topk_group": 2}),
    "olmo2": ("Olmo2Config", {}),
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
