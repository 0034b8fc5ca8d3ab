"""A GGUF file's metadata as the config.json that the same model is published with.

The result goes through the family's own reader, which checks every field. What llama.cpp's
converter changed in the values is told under LAYOUT_KEY: see `families.layout`.
"""

from __future__ import annotations

import json

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.layout import FROM_GGUF, LAYOUT_KEY
from jlayer.families.registry import FAMILIES
from jlayer.gguf.architectures import ARCHITECTURES
from jlayer.gguf.metadata import Metadata
from jlayer.gguf.names import EMBEDDING, HEAD
from jlayer.gguf.reader import Head

# Marks a config whose weights transformers must not load: their rows and gains are as GGUF has
# them. transformers refuses a quantization_config without "quant_method".
_MARK = {"quantization_config": {"by": "jlayer", "scheme": FROM_GGUF}}


def config_of(head: Head) -> dict:
    """The config.json of a file's model.

    Raises CheckpointError (a key is missing or of another type) or UnsupportedModelError (an
    architecture, or a key of it, that is not known).
    """
    said = Metadata(head)
    row = ARCHITECTURES.get(said.architecture)
    if row is None:
        raise UnsupportedModelError(
            f"{head.path}: a model of the architecture {said.architecture[:80]!a}, which is not "
            f"supported as GGUF; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    heads = {} if row.is_latent else _heads(said)
    config = {**_common(said), **heads, **_eps(said, row.eps), **row.config(said), **_MARK}
    config["architectures"] = [FAMILIES[config["model_type"]].architecture]
    said.refuse_unread()
    layout = {**row.layout, **row.by_file(head)}
    return {**config, LAYOUT_KEY: layout} if layout else config


def encoded(config: dict) -> bytes:
    """The bytes of a config.json."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _common(said):
    """What all architectures have in common."""
    embedding = said.head.tensors.get(EMBEDDING)
    if embedding is None:
        raise CheckpointError(
            f"{said.where}: tensor {EMBEDDING} is missing; name the file of a whole model"
        )
    further, n_layers = said.integer("nextn_predict_layers", 0), said.integer("block_count")
    if n_layers > len(said.head.tensors):
        raise said.refusal(
            f"{said.architecture}.block_count",
            n_layers,
            f"no more than the {len(said.head.tensors)} tensors",
        )
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": said.integer("embedding_length"),
        "intermediate_size": said.integer("feed_forward_length", None)
        or said.integer("expert_feed_forward_length"),
        "num_hidden_layers": n_layers - further,
        "max_position_embeddings": said.integer("context_length"),
        "tie_word_embeddings": HEAD not in said.head.tensors,
        "dtype": _dtype(embedding.type),
    }


def _heads(said):
    heads, width = said.integer("attention.head_count"), said.integer("embedding_length")
    if heads < 1:
        raise said.refusal(f"{said.architecture}.attention.head_count", heads, "a number from 1")
    head_dim = said.integer("attention.key_length", width // heads)
    if head_dim < 1:
        raise said.refusal(f"{said.architecture}.attention.key_length", head_dim, "a number from 1")
    if said.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{said.where}: attention.value_length is {said.integer('attention.value_length')}, "
            f"and key_length {head_dim}; supported: the same"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": said.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _eps(said, names):
    return {names[1]: said.number(names[0])} if names else {}


def _dtype(kind):
    """What is computed in by default. Norms are float32 in all files, so they say nothing."""
    return kind if kind in ("float32", "float16", "bfloat16") else "bfloat16"
