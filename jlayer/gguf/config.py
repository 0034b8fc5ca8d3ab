"""A GGUF file's metadata as the config.json that the same model is published with.

The result goes through the family's own reader, which checks every field. What llama.cpp's
converter changed in the values is told under LAYOUT_KEY: see `families.layout`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.layout import FROM_GGUF, GAINS, GATES, LAYOUT_KEY, PAIRS
from jlayer.gguf.metadata import Metadata, shortest
from jlayer.gguf.names import EMBEDDING, FACTORS, HEAD, has_bias
from jlayer.gguf.reader import Head
from jlayer.gguf.tensors import floats

# Marks a config whose weights transformers must not load: their rows and gains are as GGUF has
# them. transformers refuses a quantization_config without "quant_method".
_MARK = {"quantization_config": {"by": "jlayer", "scheme": FROM_GGUF}}
_ROPE_TYPES = ("none", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """How a model of `general.architecture` becomes a config. `config`: metadata -> the fields
    that are the family's own, `model_type` among them. `layout`: what is changed in the values."""

    config: Callable[[Metadata], dict]
    layout: Mapping[str, str]


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
    config = {**_common(said), **row.config(said), **_MARK}
    said.refuse_unread()
    return {**config, LAYOUT_KEY: dict(row.layout)} if row.layout else config


def encoded(config: dict) -> bytes:
    """The bytes of a config.json."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _common(said):
    """What all architectures have in common."""
    heads, width = said.integer("attention.head_count"), said.integer("embedding_length")
    head_dim = said.integer("attention.key_length", width // max(1, heads))
    if said.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{said.where}: attention.value_length is {said.integer('attention.value_length')}, "
            f"and key_length {head_dim}; supported: the same"
        )
    embedding = said.head.tensors.get(EMBEDDING)
    if embedding is None:
        raise CheckpointError(
            f"{said.where}: tensor {EMBEDDING} is missing; name the file of a whole model"
        )
    further = said.integer("nextn_predict_layers", 0)
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": said.integer("feed_forward_length", None)
        or said.integer("expert_feed_forward_length"),
        "num_hidden_layers": said.integer("block_count") - further,
        "num_attention_heads": heads,
        "num_key_value_heads": said.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": said.integer("context_length"),
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in said.head.tensors,
        "dtype": _dtype(embedding.type),
    }


def _dtype(kind):
    """What is computed in by default. Norms are float32 in all files, so they say nothing."""
    return kind if kind in ("float32", "float16", "bfloat16") else "bfloat16"


def _rope(said, *, turned=None):
    """The keys of a rotary embedding; `turned`: how many elements of a head it turns, all if
    None."""
    base = {"rope_theta": said.number("rope.freq_base", 10000.0)}
    head_dim = said.integer("attention.key_length", 0) or (
        said.integer("embedding_length") // said.integer("attention.head_count")
    )
    found = said.integer("rope.dimension_count", turned or head_dim)
    if found != (turned or head_dim):
        raise UnsupportedModelError(
            f"{said.where}: rope.dimension_count is {found}, supported: {turned or head_dim}"
        )
    kind, factor = said.word("rope.scaling.type", "none"), said.number("rope.scaling.factor", 0.0)
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"{said.where}: rope.scaling.type is {kind[:80]!a}, supported: {', '.join(_ROPE_TYPES)}"
        )
    if FACTORS in said.head.tensors:
        return {"rope_parameters": base | _factors(said, kind)}
    if kind == "none" or factor == 0.0:
        return {"rope_parameters": {**base, "rope_type": "default"}}
    if kind == "linear":
        return {"rope_parameters": {**base, "rope_type": "linear", "factor": factor}}
    return {"rope_parameters": {**base, **_yarn(said, factor)}}


def _yarn(said, factor):
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": said.integer("rope.scaling.original_context_length"),
    }
    for key in ("beta_fast", "beta_slow"):
        if said.has(f"rope.scaling.yarn_{key}"):
            found[key] = said.number(f"rope.scaling.yarn_{key}")
    return found


def _factors(said, kind):
    """Divisors of the frequencies (Llama 3.1's), which the file has as a tensor: LongRoPE with the
    same factors for short and long texts, and no other change."""
    if kind != "none":
        raise UnsupportedModelError(
            f"{said.where}: {FACTORS} and rope.scaling.type {kind!r}, expected one of them"
        )
    factors = [shortest(n) for n in floats(said.head, FACTORS)]
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": said.integer("context_length"),
    }


def _llama(said):
    """Llama, Mistral, and with experts Mixtral."""
    bias = has_bias(said.head, "attn_q")
    n_experts = said.integer("expert_count", 0)
    if not n_experts:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": bias,
            "mlp_bias": has_bias(said.head, "ffn_up"),
            **_rope(said),
        }
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": n_experts,
        "num_experts_per_tok": said.integer("expert_used_count"),
        "sliding_window": None,
        **_rope(said),
    }


def _qwen2(said):
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_rope(said)}


def _qwen3(said):
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": has_bias(said.head, "attn_q"),
        **_rope(said),
    }


def _qwen3moe(said):
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": said.integer("expert_count"),
        "num_experts_per_tok": said.integer("expert_used_count"),
        "moe_intermediate_size": said.integer("expert_feed_forward_length"),
        "norm_topk_prob": said.boolean("expert_weights_norm", True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_rope(said),
    }


def _glm4moe(said):
    """GLM 4.5 and later: half of each head is turned, and the first layers are dense."""
    head_dim = said.integer("attention.key_length")
    gating = said.integer("expert_gating_func", 2)
    if gating != 2:
        raise UnsupportedModelError(
            f"{said.where}: expert_gating_func is {gating}, supported: 2, which is sigmoid"
        )
    width, n_shared = (
        said.integer("expert_feed_forward_length"),
        said.integer("expert_shared_count"),
    )
    shared = said.integer("expert_shared_feed_forward_length", width * n_shared)
    if shared != width * n_shared:
        raise UnsupportedModelError(
            f"{said.where}: expert_shared_feed_forward_length is {shared}, supported: "
            f"{width * n_shared}, as of {n_shared} experts"
        )
    return {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": has_bias(said.head, "attn_q"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in said.head.tensors,
        "n_routed_experts": said.integer("expert_count"),
        "num_experts_per_tok": said.integer("expert_used_count"),
        "moe_intermediate_size": width,
        "n_shared_experts": n_shared,
        "n_group": said.integer("expert_group_count", 1),
        "topk_group": said.integer("expert_group_used_count", 1),
        "first_k_dense_replace": said.integer("leading_dense_block_count"),
        "routed_scaling_factor": said.number("expert_weights_scale", 1.0),
        "norm_topk_prob": said.boolean("expert_weights_norm", False),
        "num_nextn_predict_layers": said.integer("nextn_predict_layers", 0),
        "partial_rotary_factor": 0.5,
        **_rope(said, turned=head_dim // 2),
    }


def _gpt_oss(said):
    """Every second layer slides. The ramp of its YaRN is not rounded to whole frequencies, which
    the file does not say."""
    n_layers = said.integer("block_count")
    said.integer("expert_feed_forward_length", 0)  # feed_forward_length, once more
    rope = _rope(said)["rope_parameters"]
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": said.integer("expert_count"),
        "num_experts_per_tok": said.integer("expert_used_count"),
        "sliding_window": said.integer("attention.sliding_window"),
        "layer_types": _sliding(said, n_layers, 2),
        "rope_parameters": {**rope, "truncate": False},
    }


def _gemma(said):
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        **_rope(said),
    }


def _gemma2(said):
    """Every second layer slides. llama.cpp knows by the number of layers that the 27B divides its
    scores by the width of a head's share; the file does not say so."""
    n_layers, width = said.integer("block_count"), said.integer("embedding_length")
    shared = width // said.integer("attention.head_count")
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shared if n_layers == 46 else said.integer("attention.key_length"),
        "sliding_window": said.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": said.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": said.number("final_logit_softcapping", 30.0),
        **_rope(said),
    }


def _gemma3(said):
    """Five of six layers slide, with a rotary embedding of their own, which is never scaled. The
    27B divides its scores as Gemma 2's does."""
    n_layers, width = said.integer("block_count"), said.integer("embedding_length")
    shared = width // said.integer("attention.head_count")
    full = _rope(said)["rope_parameters"]
    local = {"rope_theta": said.number("rope.freq_base_swa", 10000.0), "rope_type": "default"}
    cap = said.number("final_logit_softcapping", 0.0)
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shared if n_layers == 62 else said.integer("attention.key_length"),
        "sliding_window": said.integer("attention.sliding_window"),
        "layer_types": _sliding(said, n_layers, 6),
        "final_logit_softcapping": cap or None,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _sliding(said, n_layers, period):
    """The type of each layer: by a list of flags in the file, else every `period`-th is full."""
    key = "attention.sliding_window_pattern"
    flags = said.each(key, n_layers)
    if flags is None:
        period = said.integer(key, period)
        flags = [(n + 1) % max(1, period) != 0 for n in range(n_layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in flags]


_INTERLEAVED = {PAIRS: "interleaved"}
_WITH_ONE = {GAINS: "whole"}
_APART = {GATES: "apart"}
# A new architecture is a row here, and its names in `names`.
ARCHITECTURES = {
    "llama": Architecture(_llama, _INTERLEAVED),
    "qwen2": Architecture(_qwen2, {}),
    "qwen3": Architecture(_qwen3, {}),
    "qwen3moe": Architecture(_qwen3moe, {}),
    "glm4moe": Architecture(_glm4moe, {}),
    "gpt-oss": Architecture(_gpt_oss, _APART),
    "gemma": Architecture(_gemma, _WITH_ONE),
    "gemma2": Architecture(_gemma2, _WITH_ONE),
    "gemma3": Architecture(_gemma3, _WITH_ONE),
}
