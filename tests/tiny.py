"""Tiny random checkpoints, saved by Transformers itself: what everything is held against."""

from __future__ import annotations

import os

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from jlayer.checkpoint.safetensors import read_header
from jlayer.checkpoint.store import Store

# No two axes are equal (width 24, mlp 40, heads 6 x 10 = 60, kv_heads 2 x 10 = 20, vocab 133), so
# that a transposed or swapped weight cannot pass; head_dim is not width / heads.
TINY = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def tiny_llama(
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    seed: int = 0,
    tied: bool = False,
    sharded: bool = False,
    **config_overrides,
) -> str | os.PathLike:
    """Saves a random LlamaForCausalLM as safetensors in `folder` and returns the folder.

    Norms and biases are random too: a model that ignores them gives other logits.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY | {"tie_word_embeddings": tied} | config_overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="15KB" if sharded else "5GB")
    return folder


def stored_arrays(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a folder as it is stored, by name, read whole and by the header alone."""
    found = {}
    for path in Store(folder).files:
        raw = np.fromfile(path, np.uint8)
        for name, entry in read_header(path).tensors.items():
            own = raw[entry.offset : entry.offset + entry.n_bytes]
            found[name] = own.copy().view(entry.dtype).reshape(entry.shape)
    return found
