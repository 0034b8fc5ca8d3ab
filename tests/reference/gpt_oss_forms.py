"""A tiny random gpt-oss with experts in MXFP4, written here as its makers publish it, and the same
model in Transformers, with the numbers that Transformers decodes."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path

import numpy as np

FULL, SLIDING = "full_attention", "sliding_attention"
# No two axes are equal: queries are 60, keys and values 20, gates and ups of an expert 192.
N_EXPERTS, WIDTH, INNER = 7, 64, 96
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 133,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": N_EXPERTS,
    "num_experts_per_tok": 3,
    "sliding_window": 6,
    "layer_types": [SLIDING, FULL, SLIDING],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    # The ramp lies within the five frequencies, so that an end that is rounded shows.
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 2.0,
        "beta_slow": 0.3,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "swiglu_limit": 1.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def drawn(seed: int = 0, **changes) -> tuple[dict, dict[str, np.ndarray]]:
    """(the config, the published tensors) of a model of random numbers; half bytes and scales of
    experts are random too."""
    config, rng = {**CONFIG, **changes, "quantization_config": MXFP4}, np.random.default_rng(seed)
    heads, kv, size = (config[name] for name in _HEADS)

    def normal(*shape, mean=0.0, spread=0.1):
        return (mean + spread * rng.standard_normal(shape)).astype(np.float32)

    vocab = config["vocab_size"]
    tensors = {
        "model.embed_tokens.weight": normal(vocab, WIDTH),
        "model.norm.weight": normal(WIDTH, mean=1.0),
        "lm_head.weight": normal(vocab, WIDTH),
    }
    for layer in range(config["num_hidden_layers"]):
        lead = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{lead}{name}.weight"] = normal(WIDTH, mean=1.0)
        for name, rows, width in (
            ("q_proj", heads * size, WIDTH),
            ("k_proj", kv * size, WIDTH),
            ("v_proj", kv * size, WIDTH),
            ("o_proj", WIDTH, heads * size),
        ):
            tensors[f"{lead}self_attn.{name}.weight"] = normal(rows, width)
            tensors[f"{lead}self_attn.{name}.bias"] = normal(rows)
        tensors[f"{lead}self_attn.sinks"] = normal(heads, spread=1.0)
        tensors[f"{lead}mlp.router.weight"] = normal(N_EXPERTS, WIDTH)
        tensors[f"{lead}mlp.router.bias"] = normal(N_EXPERTS)
        for name, rows, width in (("gate_up_proj", 2 * INNER, WIDTH), ("down_proj", WIDTH, INNER)):
            key, shape = f"{lead}mlp.experts.{name}", (N_EXPERTS, rows, width // 32)
            tensors[f"{key}_blocks"] = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
            tensors[f"{key}_scales"] = rng.integers(122, 126, shape, dtype=np.uint8)
            tensors[f"{key}_bias"] = normal(N_EXPERTS, rows)
    return config, tensors


def write(folder: str | os.PathLike, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Writes a published folder and returns it."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_transformers(config: dict, tensors: dict[str, np.ndarray], dtype):
    """Transformers' model with these tensors; its own function decodes the experts."""
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain = {  # copied, since config classes write into what they are given
        key: deepcopy(value) for key, value in config.items() if key != "quantization_config"
    }
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(
            GptOssConfig(**plain), attn_implementation="eager", experts_implementation="eager"
        )
    state = {}
    for name, array in tensors.items():
        if name.endswith("_blocks"):
            scales = torch.tensor(tensors[name.removesuffix("blocks") + "scales"])
            name = name.removesuffix("_blocks")
            state[name] = convert_moe_packed_tensors(
                torch.tensor(array), scales, dtype=torch.float32
            )
        elif not name.endswith("_scales"):
            state[name] = torch.tensor(array)
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval()


def reference_logits(config: dict, tensors: dict[str, np.ndarray], ids, dtype):
    """Transformers' logits [B, T, vocabulary] of ids [B, T], all at once and without a cache."""
    import torch

    with torch.no_grad():
        model = in_transformers(config, tensors, dtype)
        return model(torch.as_tensor(ids), use_cache=False).logits
