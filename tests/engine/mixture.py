"""A tiny model with experts, of random weights: layers without some among them, and a shared
expert."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jlayer.config import model_config
from jlayer.families.registry import published_tensors
from tests.convert.checkpoints import tensor_of, write_tensors

CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 18,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 9,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
N_SPARSE = 3  # layers with experts


def save(folder: Path, *, change=lambda name, values: values, **changes) -> Path:
    """A folder with such a model, as published. `changes`: of its config; `change`: of a tensor, by
    its published name."""
    config = CONFIG | changes
    cfg, rng = model_config(config, where="here"), np.random.default_rng(0)
    folder.mkdir()
    tensors = {
        name: tensor_of(change(name, values.astype(np.float32)))
        for name, shape in published_tensors(cfg).items()
        for values in [rng.normal(float("norm" in name), 0.3, shape)]
    }
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
