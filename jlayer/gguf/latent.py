"""Models with latent attention in GGUF: the architecture `deepseek2`.

llama.cpp's converter writes the matrix that makes keys and values of a latent as two, those of
keys turned around for each head, since 2025; older files have it whole. Both are read as they are.
"""

from __future__ import annotations

from jlayer.families.layout import KEYS
from jlayer.gguf.metadata import Metadata
from jlayer.gguf.mixtures import SIGMOID, experts_of, shared_count
from jlayer.gguf.reader import Head
from jlayer.gguf.rope import YARN_WEIGHT, rope_parameters

SOFTMAX = 1  # of expert_gating_func
# What llama.cpp's converter multiplies mscale_all_dim by, in files of this architecture alone.
_OF_WEIGHT = 0.1


def layout_of(head: Head) -> dict[str, str]:
    """The layout of the matrices that make keys and values of latents, for a model that has two;
    else nothing."""
    return {KEYS: "apart"} if "blk.0.attn_k_b.weight" in head.tensors else {}


def deepseek2(said: Metadata) -> dict:
    """DeepSeek V2, V3 and later, Kimi K2, GLM-4.7-Flash: with scores of a sigmoid a V3, else a V2,
    whose groups of experts are chosen by their best one. A file with a correction bias of experts
    that does not say how they are scored is one of a sigmoid."""
    has_bias = any(name.endswith(".exp_probs_b.bias") for name in said.head.tensors)
    gating = said.integer("expert_gating_func", SIGMOID if has_bias else SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        name = f"{said.architecture}.expert_gating_func"
        raise said.refusal(name, gating, f"{SOFTMAX} (softmax) or {SIGMOID} (sigmoid)")
    config = {**_latent(said), **_mlps(said), "rope_parameters": _rope(said)}
    if gating == SIGMOID:
        return {"model_type": "deepseek_v3", "rope_interleave": True, **config}
    is_grouped = config["n_group"] > 1
    method = "group_limited_greedy" if is_grouped else "greedy"
    return {"model_type": "deepseek_v2", "topk_method": method, **config}


def _latent(said):
    """Sizes of heads. Files with one key for all heads, which is the latent, have those of a head
    under names of their own."""
    turned = said.integer("rope.dimension_count")
    for key in ("key_length", "value_length", "head_count_kv"):
        said.integer(f"attention.{key}", 0)  # of the one key, or what is read below
    whole = said.integer("attention.key_length_mla", said.integer("attention.key_length", 0))
    heads = said.integer("attention.head_count")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": turned,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": whole - turned,
        "v_head_dim": said.integer(
            "attention.value_length_mla", said.integer("attention.value_length", 0)
        ),
        "kv_lora_rank": said.integer("attention.kv_lora_rank"),
        "q_lora_rank": said.integer("attention.q_lora_rank", None),
    }


def _mlps(said):
    """Experts after the first layers; or none, where all layers are dense."""
    dense = said.integer("leading_dense_block_count", 0)
    return {
        "moe_intermediate_size": said.integer("expert_feed_forward_length"),
        "n_shared_experts": shared_count(said),
        "first_k_dense_replace": dense,
        "routed_scaling_factor": said.number("expert_weights_scale", 1.0),
        "norm_topk_prob": said.boolean("expert_weights_norm", False),
        "n_group": said.integer("expert_group_count", 1),
        "topk_group": said.integer("expert_group_used_count", 1),
        "num_nextn_predict_layers": said.integer("nextn_predict_layers", 0),
        **experts_of(said, "n_routed_experts"),
    }


def _rope(said):
    """Cos and sin keep their length: mscale is mscale_all_dim in all published models."""
    rope = rope_parameters(said, turned=said.integer("rope.dimension_count"))
    weight = said.number(YARN_WEIGHT, 0.0)
    if rope["rope_type"] != "yarn" or not weight:
        return rope
    weight = round(weight / _OF_WEIGHT, 9)  # 0.0707 / 0.1 is not 0.707
    return {**rope, "mscale": weight, "mscale_all_dim": weight}
