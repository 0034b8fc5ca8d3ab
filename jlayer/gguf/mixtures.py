"""Models with experts in GGUF: of each architecture the fields of a config that are its own.

What is fixed in llama.cpp and not in the file is told at each: the models that it runs are so.
"""

from __future__ import annotations

from jlayer.errors import UnsupportedModelError
from jlayer.gguf.dense import granite_factors, layer_types, llama
from jlayer.gguf.metadata import Metadata
from jlayer.gguf.names import has_bias
from jlayer.gguf.rope import rope_parameters

SIGMOID = 2  # of expert_gating_func


def llama_or_mixtral(said: Metadata) -> dict:
    """Llama, Mistral, and with experts Mixtral."""
    if not said.integer("expert_count", 0):
        return llama(said)
    return {
        "model_type": "mixtral",
        "sliding_window": None,
        **experts_of(said, "num_local_experts"),
        "rope_parameters": rope_parameters(said),
    }


def qwen2moe(said: Metadata) -> dict:
    """Weights of experts are not normed."""
    _refuse_unless(said, "expert_weights_norm", said.boolean("expert_weights_norm", False), False)
    width, n_chosen = said.integer("feed_forward_length"), said.integer("expert_used_count")
    return {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": said.integer(
            "expert_feed_forward_length", width // max(1, n_chosen)
        ),
        "shared_expert_intermediate_size": said.integer("expert_shared_feed_forward_length", width),
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": has_bias(said.head, "attn_q"),
        **experts_of(said, "num_experts"),
        "rope_parameters": rope_parameters(said),
    }


def qwen3moe(said: Metadata) -> dict:
    return {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": said.integer("expert_feed_forward_length"),
        "norm_topk_prob": said.boolean("expert_weights_norm", True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **experts_of(said, "num_experts"),
        "rope_parameters": rope_parameters(said),
    }


def olmoe(said: Metadata) -> dict:
    """Weights of experts are not normed."""
    return {
        "model_type": "olmoe",
        "norm_topk_prob": False,
        **experts_of(said, "num_experts"),
        "rope_parameters": rope_parameters(said),
    }


def granitemoe(said: Metadata) -> dict:
    return {
        "model_type": "granitemoe",
        **experts_of(said, "num_local_experts"),
        **granite_factors(said),
    }


def minimax_m2(said: Metadata) -> dict:
    width = said.integer("feed_forward_length")
    own = said.integer("expert_feed_forward_length", width)
    _refuse_unless(said, "expert_feed_forward_length", own, width)
    _refuse_unless(said, "expert_gating_func", said.integer("expert_gating_func"), SIGMOID)
    return {
        "model_type": "minimax_m2",
        **experts_of(said, "num_local_experts"),
        "rope_parameters": rope_parameters(said, in_part=True),
    }


def ernie4_5_moe(said: Metadata) -> dict:
    """The first layers are dense, and after them those that are no multiple of a period."""
    width, n_shared = said.integer("expert_feed_forward_length"), shared_count(said)
    return {
        "model_type": "ernie4_5_moe",
        "use_bias": has_bias(said.head, "attn_q"),
        "moe_intermediate_size": width,
        "moe_num_shared_experts": n_shared,
        "moe_layer_start_index": said.integer("leading_dense_block_count"),
        "moe_layer_interval": said.integer("interleave_moe_layer_step"),
        **experts_of(said, "moe_num_experts", "moe_k"),
        "rope_parameters": rope_parameters(said),
    }


def hunyuan_moe(said: Metadata) -> dict:
    """One shared expert, and all are as wide as an MLP would be."""
    width = said.integer("feed_forward_length")
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        _refuse_unless(said, key, said.integer(key, width), width)
    _refuse_unless(said, "expert_shared_count", said.integer("expert_shared_count", 1), 1)
    return {
        "model_type": "hunyuan_v1_moe",
        "attention_bias": has_bias(said.head, "attn_q"),
        **experts_of(said, "num_experts", "moe_topk"),
        "rope_parameters": rope_parameters(said),
    }


def glm4moe(said: Metadata) -> dict:
    """GLM 4.5 and later: half of each head is turned, and the first layers are dense."""
    head_dim = said.integer("attention.key_length")
    _refuse_unless(said, "expert_gating_func", said.integer("expert_gating_func", SIGMOID), SIGMOID)
    return {
        "model_type": "glm4_moe",
        "attention_bias": has_bias(said.head, "attn_q"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in said.head.tensors,
        "moe_intermediate_size": said.integer("expert_feed_forward_length"),
        "n_shared_experts": shared_count(said),
        "n_group": said.integer("expert_group_count", 1),
        "topk_group": said.integer("expert_group_used_count", 1),
        "first_k_dense_replace": said.integer("leading_dense_block_count"),
        "routed_scaling_factor": said.number("expert_weights_scale", 1.0),
        "norm_topk_prob": said.boolean("expert_weights_norm", False),
        "num_nextn_predict_layers": said.integer("nextn_predict_layers", 0),
        "partial_rotary_factor": 0.5,
        **experts_of(said, "n_routed_experts"),
        "rope_parameters": rope_parameters(said, turned=head_dim // 2),
    }


def gpt_oss(said: Metadata) -> dict:
    """Every second layer slides. The ramp of its YaRN is not rounded to whole frequencies, which
    the file does not say."""
    said.integer("expert_feed_forward_length", 0)  # feed_forward_length, once more
    return {
        "model_type": "gpt_oss",
        "sliding_window": said.integer("attention.sliding_window"),
        "layer_types": layer_types(said, period=2),
        **experts_of(said, "num_local_experts"),
        "rope_parameters": {**rope_parameters(said), "truncate": False},
    }


def experts_of(said: Metadata, count: str, chosen: str = "num_experts_per_tok") -> dict:
    """How many there are, and how many each token has, under a family's names."""
    return {count: said.integer("expert_count"), chosen: said.integer("expert_used_count")}


def shared_count(said: Metadata) -> int:
    """The number of shared experts, which are one MLP as wide as all of them."""
    width, n_shared = (
        said.integer("expert_feed_forward_length"),
        said.integer("expert_shared_count", 0),
    )
    shared = said.integer("expert_shared_feed_forward_length", width * n_shared)
    if shared != width * n_shared:
        raise UnsupportedModelError(
            f"{said.where}: expert_shared_feed_forward_length is {shared}, supported: "
            f"{width * n_shared}, as of {n_shared} experts"
        )
    return n_shared


def _refuse_unless(said, key, found, expected):
    if found != expected:
        raise UnsupportedModelError(f"{said.where}: {key} is {found}, supported: {expected}")
