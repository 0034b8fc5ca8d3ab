"""Qwen3-Next and Qwen3.5: three layers with a gated DeltaNet to one with attention, whose heads
have gates."""

from __future__ import annotations

from dataclasses import replace

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import Family, Function, LayerKind, one
from jlayer.families.common import (
    FULL,
    OTHER_PARTS,
    attention,
    config,
    every,
    head_norms,
    layer_types,
    read_sizes,
    rms_norm,
)
from jlayer.families.decoder import decoder, decoder_kinds, experts_of_layers
from jlayer.families.fields import LIMITS, Fields
from jlayer.families.mixtures import qwen_experts, qwen_shared, sparse_layers, with_experts
from jlayer.families.rope import read_rope
from jlayer.parts import Delta, Norm, Stack, delta_sizes
from jlayer.spec import Leaf, ModelConfig, Role

LINEAR = "linear_attention"
_WIDTH = 512  # of an expert, and of the shared one, where the file is silent

# How the experts of Qwen3.5 are published; transformers writes them one by one too.
_STACKS = (
    Stack("mlp.experts.gate_up_proj", ("gate_proj", "up_proj")),
    Stack("mlp.experts.down_proj", ("down_proj",)),
)
# The matrices that a gated DeltaNet's input is multiplied by, with the axis of their rows.
_QKV, _BA = {"in_proj_qkv": "channels", "in_proj_z": "values"}, {"in_proj_ba": "two_value_heads"}
_INPUTS = {
    "apart": {**_QKV, "in_proj_b": "value_heads", "in_proj_a": "value_heads"},
    "grouped": {"in_proj_qkvz": "qkvz", **_BA},
    "half": {**_QKV, **_BA},
}
# What it uses uncut: (our name, as published, axes).
_WHOLE = (
    ("conv1d", "conv1d.weight", ("channels", "one", "kernel")),
    ("dt_bias", "dt_bias", ("value_heads",)),
    ("A_log", "A_log", ("value_heads",)),
    ("norm", "norm.weight", ("value",)),
)


def _kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer: with either mixer, with experts and without."""
    if cfg.delta is None:
        return decoder_kinds(cfg)
    given = tuple(zip(cfg.layer_types, experts_of_layers(cfg), strict=True))
    kinds = {}
    for name, experts in set(given):
        full = decoder(cfg, cfg.attention, experts)
        kinds[name, experts] = full if name == FULL else _with_delta(full, cfg.delta)
    return tuple(kinds[key] for key in given)


def _with_delta(full: LayerKind, delta: Delta) -> LayerKind:
    """A layer with attention -> the same with a gated DeltaNet in its place."""
    inputs, sizes = _INPUTS[delta.inputs], tuple(delta_sizes(delta).items())

    def leaf(name, published, axes, role=Role.MATRIX):
        return Leaf(name, f"linear_attn.{published}", axes, role, sizes=sizes)

    norm, *others = (each for each in full.leaves if not each.published.startswith("self_attn."))
    leaves = (
        *(leaf(name, f"{name}.weight", (rows, "width")) for name, rows in inputs.items()),
        *(leaf(*each, Role.NORM) for each in _WHOLE),
        leaf("out_proj", "out_proj.weight", ("width", "values")),
    )
    qkv, o, *mlp = full.stages
    used = tuple(name for name, *_ in _WHOLE)
    finish = Function("gated_delta", ("cache", "rows"), ("x", "cache"), used, delta)
    first = replace(qkv, name="delta", groups=tuple(map(one, inputs)), finish=finish)
    return LayerKind(
        full.name.replace(full.attention.name, delta.name),
        leaves=(norm, *leaves, *others),
        stages=(first, replace(o, name="out", groups=(one("out_proj"),)), *mlp),
        delta=delta,
        router=full.router,
    )


def _qwen3_5(fields: Fields, *, kv_heads: int = 4, inputs: str = "apart") -> ModelConfig:
    """The positions of a text are one number each: `mrope_section` changes nothing."""
    sizes = read_sizes(fields, kv_heads=kv_heads, head_dim=256, longest=32768)
    period = fields.integer("full_attention_interval", default=4)
    default = every(fields.integer("num_hidden_layers"), period, usual=LINEAR)
    types = layer_types(fields, (FULL, LINEAR), default=default)
    if FULL not in types:
        raise UnsupportedModelError(
            f"{fields.where}: no layer of layer_types is {FULL}, supported: at least one"
        )
    norm = rms_norm(fields, plus_one=True, rounds_first=False)
    bias = fields.boolean("attention_bias")
    how = attention(
        sizes,
        read_rope(fields, longest=sizes.longest, partial=0.25),
        name=FULL,
        head_norms=head_norms(norm),
        has_gate=True,
    )
    cfg = config(fields, sizes, [how], layer_types=types, norm=norm, qkv_bias=bias, out_bias=bias)
    if LINEAR not in types:
        return cfg
    delta = _delta(fields, Norm(norm.eps), cfg.mlp.activation, inputs)
    return replace(cfg, delta=delta)


def _delta(fields, norm, activation, inputs):
    heads = {"limit": LIMITS["num_attention_heads"]}
    size = {"limit": LIMITS["head_dim"]}
    n_keys = fields.integer("linear_num_key_heads", default=16, **heads)
    n_values = fields.integer("linear_num_value_heads", default=32, **heads)
    if n_values % n_keys:
        raise CheckpointError(
            f"{fields.where}: linear_num_value_heads is {n_values}, "
            f"not a multiple of linear_num_key_heads {n_keys}"
        )
    kernel = fields.integer("linear_conv_kernel_dim", default=4, limit=64)
    if kernel == 1:
        raise UnsupportedModelError(
            f"{fields.where}: linear_conv_kernel_dim is 1, supported: 2 and more"
        )
    return Delta(
        n_key_heads=n_keys,
        n_value_heads=n_values,
        key_dim=fields.integer("linear_key_head_dim", default=128, **size),
        value_dim=fields.integer("linear_value_head_dim", default=128, **size),
        kernel=kernel,
        norm=norm,
        activation=activation,
        inputs=inputs,
        name=LINEAR,
    )


def _qwen3_next(fields: Fields) -> ModelConfig:
    """Qwen3.5 with other leaves. A layer has experts unless `mlp_only_layers` has its number."""
    cfg = _qwen3_5(fields, kv_heads=2, inputs="grouped")
    layers = sparse_layers(fields)
    if fields.from_zero("num_experts", default=512) == 0 or (layers and not any(layers)):
        return cfg
    return _of_experts(fields, cfg, n_experts=512, n_chosen=10, renormalizes=True)


def _qwen3_5_moe(fields: Fields) -> ModelConfig:
    """Qwen3.5 with experts in all layers, so that it says of no dense one how wide it would be."""
    width = fields.integer("moe_intermediate_size", default=_WIDTH)
    plain = fields.changed(
        {"intermediate_size": width, "norm_topk_prob": True},
        without=("decoder_sparse_step", "mlp_only_layers"),
    )
    cfg = _qwen3_5(plain, kv_heads=2)
    return _of_experts(plain, cfg, n_experts=256, n_chosen=8, stacks=_STACKS)


def _of_experts(fields, cfg, **numbers):
    shared = qwen_shared(fields, width=_WIDTH)
    experts = qwen_experts(fields, width=_WIDTH, counts=("num_experts",), shared=shared, **numbers)
    return with_experts(cfg, experts)


FAMILIES = (
    Family("qwen3_next", "Qwen3NextForCausalLM", _qwen3_next, _kinds, left_out=OTHER_PARTS),
    Family("qwen3_5_text", "Qwen3_5ForCausalLM", _qwen3_5, _kinds, left_out=OTHER_PARTS),
    Family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _qwen3_5_moe, _kinds, left_out=OTHER_PARTS),
)
