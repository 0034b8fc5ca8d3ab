"""The names of tensors in GGUF files, and the published ones that they stand for.

As llama.cpp's converter has named them (gguf-py's tensor_mapping). Tensors of all experts of a
layer are cut by expert: each expert's rows lie together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from jlayer.gguf.reader import GgufTensor, Head

EMBEDDING, HEAD, FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_PUBLISHED = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_EXPERT_NUMBER = re.compile(r"\.experts\.[0-9]+\.")
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
# The norm before the MLP under the name that it is published with.
_AFTER_ATTENTION = {
    **{own: name for own, name in _LLAMA.items() if own != "ffn_norm"},
    "post_attention_norm": "post_attention_layernorm",
}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_GLM4_MOE = {
    **_AFTER_ATTENTION,
    **_QWEN_EXPERTS,
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_GPT_OSS = {
    **_AFTER_ATTENTION,
    **_QWEN_EXPERTS,
    "ffn_gate_inp": "mlp.router",
    "attn_sinks.weight": "self_attn.sinks",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
# Model type -> the names within a layer.
NAMES = {
    "llama": _LLAMA,
    "mixtral": {**_LLAMA, **_MIXTRAL},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": {**_LLAMA, **_QWEN_EXPERTS},
    "glm4_moe": _GLM4_MOE,
    "gpt_oss": _GPT_OSS,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}


def has_bias(head: Head, module: str) -> bool:
    """Whether the first layer has a bias of this name."""
    return f"blk.0.{module}.bias" in head.tensors


def layer_of(name: str) -> int | None:
    """The layer of a tensor, by its name in the file; None for one outside of the layers."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def published(model_type: str, name: str, tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
    """The published tensors that one of a file stands for: itself, or one for each expert. A name
    that is not known stays as it is, and one that is read into the config is left out."""
    if name == FACTORS:
        return
    match = _BLOCK.fullmatch(name)
    if match is None:
        yield _OUTSIDE.get(name, name), tensor
        return
    names, own, expert = NAMES[model_type], match[2], None
    if one := _ONE_EXPERT.fullmatch(own):
        own, expert = f"{one[1]}_exps.weight", one[2]
    base, _, end = own.rpartition(".")
    if own not in names and base not in names:
        yield name, tensor
        return
    to = f"model.layers.{match[1]}.{names.get(own) or f'{names[base]}.{end}'}"
    if "{expert}" not in to or expert is not None:
        yield to.format(expert=expert), tensor
        return
    n_experts, *shape = tensor.shape
    size = tensor.n_bytes // n_experts
    for number in range(n_experts):
        at = tensor.offset + number * size
        yield to.format(expert=number), replace(tensor, shape=tuple(shape), offset=at, n_bytes=size)


def name_in_file(model_type: str, name: str) -> str | None:
    """The inverse of `published`: the name in a file of a published tensor, which is that of all
    experts' for one of them; None where there is none."""
    outside = {published: own for own, published in _OUTSIDE.items()}
    match = _PUBLISHED.fullmatch(name)
    if name in outside or match is None:
        return outside.get(name)
    within = {published: own for own, published in NAMES[model_type].items()}
    inside = _EXPERT_NUMBER.sub(".experts.{expert}.", match[2])
    base, _, end = inside.rpartition(".")
    own = within.get(inside) or (within[base] + f".{end}" if base in within else None)
    return None if own is None else f"blk.{match[1]}.{own}"
