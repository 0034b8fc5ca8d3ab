"""Dense models in GGUF: of each architecture the fields of a config that are its own.

What is fixed in llama.cpp and not in the file is told at each: the models that it runs are so.
"""

from __future__ import annotations

from jlayer.errors import UnsupportedModelError
from jlayer.gguf.metadata import Metadata
from jlayer.gguf.names import has_bias
from jlayer.gguf.rope import ORIGINAL, YARN_WEIGHT, rope_parameters

FULL, SLIDING = "full_attention", "sliding_attention"


def llama(said: Metadata) -> dict:
    """Llama and Mistral."""
    return {"model_type": "llama", **_biases(said), "rope_parameters": rope_parameters(said)}


def mistral3(said: Metadata) -> dict:
    """Ministral 3, whose queries grow with their position; without that Mistral Small 3, which is a
    Llama."""
    beta = said.number("attention.temperature_scale", 0.0)
    if not beta:
        return llama(said)
    weights = {"mscale": 1.0, "mscale_all_dim": said.number(YARN_WEIGHT)}
    return {
        "model_type": "ministral3",
        "rope_parameters": {**rope_parameters(said), **weights, "llama_4_scaling_beta": beta},
    }


def qwen2(said: Metadata) -> dict:
    return {"model_type": "qwen2", "rope_parameters": rope_parameters(said)}


def qwen3(said: Metadata) -> dict:
    return {
        "model_type": "qwen3",
        "attention_bias": has_bias(said.head, "attn_q"),
        "rope_parameters": rope_parameters(said),
    }


def gemma(said: Metadata) -> dict:
    return {
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": rope_parameters(said),
    }


def gemma2(said: Metadata) -> dict:
    """Every second layer slides. llama.cpp knows by the number of layers that the 27B divides its
    scores by the width of a head's share; the file does not say so."""
    n_layers, width = said.integer("block_count"), said.integer("embedding_length")
    shared = width // said.integer("attention.head_count")
    return {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shared if n_layers == 46 else said.integer("attention.key_length"),
        "sliding_window": said.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": said.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": said.number("final_logit_softcapping", 30.0),
        "rope_parameters": rope_parameters(said),
    }


def gemma3(said: Metadata) -> dict:
    """Five of six layers slide, with a rotary embedding of their own, which is never scaled. The
    27B divides its scores as Gemma 2's does."""
    n_layers, width = said.integer("block_count"), said.integer("embedding_length")
    shared = width // said.integer("attention.head_count")
    cap = said.number("final_logit_softcapping", 0.0)
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shared if n_layers == 62 else said.integer("attention.key_length"),
        "sliding_window": said.integer("attention.sliding_window"),
        "layer_types": layer_types(said, period=6),
        "final_logit_softcapping": cap or None,
        "rope_parameters": _by_type(said, sliding=10000.0),
    }


def olmo(said: Metadata) -> dict:
    """Its layer norms have no weights, and an epsilon that no config names."""
    eps = said.number("attention.layer_norm_epsilon", 1e-5)
    if eps != 1e-5:
        raise UnsupportedModelError(
            f"{said.where}: attention.layer_norm_epsilon is {eps}, supported: 1e-05"
        )
    return {
        "model_type": "olmo",
        "clip_qkv": said.number("attention.clamp_kqv", 0.0) or None,
        "rope_parameters": rope_parameters(said),
    }


def olmo2(said: Metadata) -> dict:
    """OLMo 2; with a window OLMo 3, of which every fourth layer is full, and alone has a scaled
    rotary embedding."""
    window = said.integer("attention.sliding_window", 0)
    if not window:
        return {"model_type": "olmo2", "rope_parameters": rope_parameters(said)}
    return {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": layer_types(said, period=4),
        "rope_parameters": _by_type(said, sliding=said.number("rope.freq_base", 10000.0)),
    }


def exaone4(said: Metadata) -> dict:
    """Where layers slide, full ones have no rotary embedding. llama.cpp knows by the number of
    layers that those of the 32B do; others say so."""
    n_layers = said.integer("block_count")
    window = said.integer("attention.sliding_window", 4096 if n_layers == 64 else 0)
    return {
        "model_type": "exaone4",
        "sliding_window": window or None,
        "layer_types": layer_types(said, period=4) if window else [FULL] * n_layers,
        "rope_parameters": rope_parameters(said),
    }


def smollm3(said: Metadata) -> dict:
    """Every fourth layer has no rotary embedding, whatever the published config says."""
    return {
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        **_biases(said),
        "rope_parameters": rope_parameters(said),
    }


def granite(said: Metadata) -> dict:
    return {"model_type": "granite", **granite_factors(said)}


def granite_factors(said: Metadata) -> dict:
    """What Granite has with and without experts. Raises UnsupportedModelError where positions are
    not turned: by a key that says nothing in files of other models."""
    if not said.boolean("rope.scaling.finetuned", True):
        raise UnsupportedModelError(
            f"{said.where}: rope.scaling.finetuned is false, by which {said.architecture} has no "
            "rotary embedding; supported: true"
        )
    head_dim = said.integer("embedding_length") // said.integer("attention.head_count")
    scale = said.number("attention.scale", 0.0)
    return {
        "attention_multiplier": scale or said.integer("attention.key_length", head_dim) ** -0.5,
        "embedding_multiplier": said.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": said.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": said.number("logit_scale"),
        **_biases(said),
        "rope_parameters": rope_parameters(said),
    }


def glm4(said: Metadata) -> dict:
    return {
        "model_type": "glm4",
        "attention_bias": has_bias(said.head, "attn_q"),
        "rope_parameters": rope_parameters(said, in_part=True),
    }


def phi3(said: Metadata) -> dict:
    """Phi 3 and 4. A window of 0 is none; llama.cpp takes every window for none."""
    return {
        "model_type": "phi3",
        "sliding_window": said.integer("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": said.integer(ORIGINAL, said.integer("context_length")),
        "rope_parameters": rope_parameters(said, in_part=True),
    }


def ernie4_5(said: Metadata) -> dict:
    return {
        "model_type": "ernie4_5",
        "use_bias": has_bias(said.head, "attn_q"),
        "rope_parameters": rope_parameters(said),
    }


def command_r(said: Metadata) -> dict:
    return {
        "model_type": "cohere",
        "use_qk_norm": "blk.0.attn_q_norm.weight" in said.head.tensors,
        **_cohere(said),
    }


def cohere2(said: Metadata) -> dict:
    """Every fourth layer is full."""
    return {
        "model_type": "cohere2",
        "sliding_window": said.integer("attention.sliding_window"),
        "layer_types": layer_types(said, period=4),
        **_cohere(said),
    }


def starcoder2(said: Metadata) -> dict:
    """llama.cpp's converter leaves its window out, which the released ones have: a file attends to
    all tokens."""
    return {
        "model_type": "starcoder2",
        "use_bias": has_bias(said.head, "attn_q"),
        "rope_parameters": rope_parameters(said),
    }


def stablelm(said: Metadata) -> dict:
    return {
        "model_type": "stablelm",
        "use_parallel_residual": said.boolean("use_parallel_residual", True),
        "use_qkv_bias": has_bias(said.head, "attn_q"),
        "qk_layernorm": "blk.0.attn_q_norm.weight" in said.head.tensors,
        "rope_parameters": rope_parameters(said, in_part=True),
    }


def nemotron(said: Metadata) -> dict:
    said.number("attention.layer_norm_rms_epsilon", 0.0)  # layer_norm_epsilon, once more
    return {
        "model_type": "nemotron",
        **_biases(said),
        "rope_parameters": rope_parameters(said, in_part=True),
    }


def arcee(said: Metadata) -> dict:
    return {"model_type": "arcee", **_biases(said), "rope_parameters": rope_parameters(said)}


def seed_oss(said: Metadata) -> dict:
    return {
        "model_type": "seed_oss",
        "attention_out_bias": has_bias(said.head, "attn_output"),
        **_biases(said),
        "rope_parameters": rope_parameters(said),
    }


def hunyuan_dense(said: Metadata) -> dict:
    return {
        "model_type": "hunyuan_v1_dense",
        "attention_bias": has_bias(said.head, "attn_q"),
        "rope_parameters": rope_parameters(said),
    }


def layer_types(said: Metadata, *, period: int) -> list[str]:
    """The type of each layer: by a list of flags in the file, else every `period`-th is full, or
    every so many-th as the file says."""
    key, n_layers = "attention.sliding_window_pattern", said.integer("block_count")
    flags = said.each(key, n_layers)
    if flags is None:
        period = said.integer(key, period)
        flags = [(n + 1) % max(1, period) != 0 for n in range(n_layers)]
    return [SLIDING if flag else FULL for flag in flags]


def _by_type(said, *, sliding):
    """A rotary embedding for each type of layers; that of layers that slide is never scaled.
    `sliding`: its base where the file is silent."""
    local = {"rope_theta": said.number("rope.freq_base_swa", sliding), "rope_type": "default"}
    return {FULL: rope_parameters(said), SLIDING: local}


def _biases(said):
    """Of models whose matrices of attention, or of MLPs, have a bias all or none."""
    return {
        "attention_bias": has_bias(said.head, "attn_q"),
        "mlp_bias": has_bias(said.head, "ffn_up"),
    }


def _cohere(said):
    return {
        "attention_bias": has_bias(said.head, "attn_q"),
        "logit_scale": said.number("logit_scale"),
        "rope_parameters": rope_parameters(said),
    }
