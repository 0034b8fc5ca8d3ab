"""The names of tensors in GGUF files, and the published ones that they stand for.

As llama.cpp's converter has named them (gguf-py's tensor_mapping). Tensors of all experts of a
layer are cut by expert, whose rows lie together, and norms of all heads by head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from jlayer.gguf.reader import GgufTensor, Head

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Divisors of the frequencies of a rotary embedding, which are read into the config.
FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_OF_CONFIG = (FACTORS, LONG_FACTORS, SHORT_FACTORS)
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    HEAD: "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_PUBLISHED = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_NUMBER = re.compile(r"\.(experts|norms)\.[0-9]+\.")
_ONE_EXPERT = re.compile(r"(ffn_(?:gate|up|down))\.(0|[1-9][0-9]{0,5})\.weight")
# Within a layer, without the ending (.weight, .bias) where it stays.
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA2 = {
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _without(names, *left_out):
    return {own: name for own, name in names.items() if own not in left_out}


# The norm before the MLP under the name that it is published with.
_AFTER_ATTENTION = {
    **_without(_LLAMA, "ffn_norm"),
    "post_attention_norm": "post_attention_layernorm",
}
# Norms after the branches alone.
_OLMO2 = {
    **_without(_AFTER_ATTENTION, "attn_norm"),
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NO_GATE = _without(_LLAMA, "ffn_gate")
_FUSED = {**_NO_GATE, "ffn_up": "mlp.gate_up_proj"}
_GLM4 = {
    **_FUSED,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_PHI3 = {**_without(_FUSED, "attn_q", "attn_k", "attn_v"), "attn_qkv": "self_attn.qkv_proj"}
_STARCODER2 = {**_NO_GATE, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
# A norm for each head, all in one tensor.
_STABLELM = {
    **_LLAMA,
    "attn_q_norm": "self_attn.q_layernorm.norms.{number}",
    "attn_k_norm": "self_attn.k_layernorm.norms.{number}",
}
_HUNYUAN = {
    **_LLAMA,
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}


def _shared(module):
    """The names of a shared expert, in a module of an MLP."""
    return {f"ffn_{part}_shexp": f"mlp.{module}.{part}_proj" for part in ("gate", "up", "down")}


_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{number}.gate_proj",
    "ffn_up_exps": "mlp.experts.{number}.up_proj",
    "ffn_down_exps": "mlp.experts.{number}.down_proj",
}
_QWEN_MOE = {**_LLAMA, **_QWEN_EXPERTS}
_QWEN35 = {
    **_AFTER_ATTENTION,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN_SHARED = {
    **_QWEN_EXPERTS,
    **_shared("shared_expert"),
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_QWEN3_NEXT = {
    **_without(_QWEN35, "ssm_beta", "ssm_alpha"),
    **_QWEN_SHARED,
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}
_GLM4_MOE = {
    **_AFTER_ATTENTION,
    **_QWEN_EXPERTS,
    **_shared("shared_experts"),
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_ERNIE_MOE = {
    **_QWEN_MOE,
    **_shared("shared_experts"),
    "exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias",
}
_DEEPSEEK = {
    **_LLAMA,
    **_QWEN_EXPERTS,
    **_shared("shared_experts"),
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_HUNYUAN_MOE = {
    **_HUNYUAN,
    **_QWEN_EXPERTS,
    **_shared("shared_mlp"),
    "ffn_gate_inp": "mlp.gate.wg",
}
_GPT_OSS = {
    **_AFTER_ATTENTION,
    **_QWEN_EXPERTS,
    "ffn_gate_inp": "mlp.router",
    "attn_sinks.weight": "self_attn.sinks",
}
_MIXTRAL = {
    **_LLAMA,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{number}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{number}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{number}.w2",
}
_GRANITE_MOE = {
    **_LLAMA,
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.{number}.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.{number}.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.{number}.down_proj",
}
# One matrix for each head, which are one with the rows of all.
_OF_HEADS = ("attn_k_b", "attn_v_b")
# Model type -> the names within a layer.
NAMES = {
    **dict.fromkeys(
        ("llama", "ministral3", "qwen2", "qwen3", "olmo", "smollm3", "granite"), _LLAMA
    ),
    **dict.fromkeys(("ernie4_5", "cohere", "cohere2", "gemma"), _LLAMA),
    **dict.fromkeys(("nemotron", "arcee"), _NO_GATE),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _OLMO2),
    **dict.fromkeys(("qwen3_moe", "olmoe"), _QWEN_MOE),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "seed_oss": _AFTER_ATTENTION,
    "mixtral": _MIXTRAL,
    "minimax_m2": {
        **_MIXTRAL,
        "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
    },
    "granitemoe": _GRANITE_MOE,
    "qwen2_moe": {**_LLAMA, **_QWEN_SHARED},
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": {**_QWEN35, **_QWEN_SHARED},
    "qwen3_next": _QWEN3_NEXT,
    "glm4": _GLM4,
    "glm4_moe": _GLM4_MOE,
    "phi3": _PHI3,
    "ernie4_5_moe": _ERNIE_MOE,
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN_MOE,
    "starcoder2": _STARCODER2,
    "stablelm": _STABLELM,
    "gpt_oss": _GPT_OSS,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
}


def has_bias(head: Head, module: str) -> bool:
    """Whether the first layer has a bias of this name."""
    return f"blk.0.{module}.bias" in head.tensors


def layer_of(name: str) -> int | None:
    """The layer of a tensor, by its name in the file; None for one outside of the layers."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def published(model_type: str, name: str, tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
    """The published tensors that one of a file stands for: itself, or one for each expert, or for
    the norm of each head. A name that is not known stays as it is, and one that is read into the
    config is left out."""
    if name in _OF_CONFIG:
        return
    match = _BLOCK.fullmatch(name)
    if match is None:
        yield _OUTSIDE.get(name, name), tensor
        return
    names, own, number = NAMES[model_type], match[2], None
    if one := _ONE_EXPERT.fullmatch(own):
        own, number = f"{one[1]}_exps.weight", one[2]
    base, _, end = own.rpartition(".")
    if own not in names and base not in names:
        yield name, tensor
        return
    if base in _OF_HEADS and len(tensor.shape) == 3:
        heads, rows, width = tensor.shape
        tensor = replace(tensor, shape=(heads * rows, width))
    to = f"model.layers.{match[1]}.{names.get(own) or f'{names[base]}.{end}'}"
    if "{number}" not in to or number is not None:
        yield to.format(number=number), tensor
        return
    count, *shape = tensor.shape
    size = tensor.n_bytes // count
    for each in range(count):
        at = tensor.offset + each * size
        yield to.format(number=each), replace(tensor, shape=tuple(shape), offset=at, n_bytes=size)


def name_in_file(model_type: str, name: str) -> str | None:
    """The inverse of `published`: the name in a file of a published tensor, which is that of all
    experts', or all heads', for one of them; None where there is none."""
    outside = {published: own for own, published in _OUTSIDE.items()}
    match = _PUBLISHED.fullmatch(name)
    if name in outside or match is None:
        return outside.get(name)
    within = {published: own for own, published in NAMES[model_type].items()}
    inside = _NUMBER.sub(r".\1.{number}.", match[2])
    base, _, end = inside.rpartition(".")
    own = within.get(inside) or (within[base] + f".{end}" if base in within else None)
    return None if own is None else f"blk.{match[1]}.{own}"
