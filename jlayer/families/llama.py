"""Llama: one kind of layer, with grouped-query attention and a gated MLP.

Names and layout are the published (Hugging Face) ones. So this table is the map from disk to tree,
the list of a complete checkpoint's tensors, and the source of every shape.
"""

from __future__ import annotations

from jlayer.families.base import Family, Function, Group, LayerKind, Stage, bias_name, one
from jlayer.spec import Leaf, ModelConfig, Role


def _matrix(name, module, axes):
    return Leaf(name, f"{module}.{name}.weight", axes)


def _bias(of, module, axis, switch):
    return Leaf(bias_name(of), f"{module}.{of}.bias", (axis,), Role.BIAS, of=of, switch=switch)


def _norm(name):
    return Leaf(name, f"{name}.weight", ("width",), Role.NORM)


DECODER = LayerKind(
    "decoder",
    leaves=(
        _norm("input_layernorm"),
        _matrix("q_proj", "self_attn", ("heads", "width")),
        _matrix("k_proj", "self_attn", ("kv_heads", "width")),
        _matrix("v_proj", "self_attn", ("kv_heads", "width")),
        _matrix("o_proj", "self_attn", ("width", "heads")),
        _norm("post_attention_layernorm"),
        _matrix("gate_proj", "mlp", ("mlp", "width")),
        _matrix("up_proj", "mlp", ("mlp", "width")),
        _matrix("down_proj", "mlp", ("width", "mlp")),
        _bias("q_proj", "self_attn", "heads", "attention_bias"),
        _bias("k_proj", "self_attn", "kv_heads", "attention_bias"),
        _bias("v_proj", "self_attn", "kv_heads", "attention_bias"),
        _bias("o_proj", "self_attn", "width", "attention_out_bias"),
        _bias("gate_proj", "mlp", "mlp", "mlp_bias"),
        _bias("up_proj", "mlp", "mlp", "mlp_bias"),
        _bias("down_proj", "mlp", "width", "mlp_bias"),
    ),
    stages=(
        Stage(
            "qkv",
            groups=(one("q_proj"), one("k_proj"), one("v_proj")),
            input=Function("normed", ("hidden",), ("x",), whole=("input_layernorm",)),
            finish=Function("attend", ("cache", "rows"), ("x", "cache")),
        ),
        Stage(
            "o",
            groups=(one("o_proj"),),
            finish=Function(
                "add_and_norm", ("hidden",), ("hidden", "x"), whole=("post_attention_layernorm",)
            ),
        ),
        Stage(
            "gate_up",
            groups=(Group("inner", ("gate_proj", "up_proj"), combine="gated"),),
            finish=Function("pass_on", (), ("x",)),
        ),
        Stage("down", groups=(one("down_proj"),), finish=Function("add", ("hidden",), ("hidden",))),
    ),
)


def _kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    return (DECODER.for_config(cfg),) * cfg.num_hidden_layers


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    kinds=_kinds,
    head_input=Function("normed", ("hidden",), ("x",), whole=("norm",)),
    dropped=(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\."
        r"((original_)?inv_freq|(cos|sin)(_cached)?)",
    ),
)
