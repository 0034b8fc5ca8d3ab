"""Families with experts whose attention is that of a dense family."""

from __future__ import annotations

from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.base import Family
from jlayer.families.common import (
    FULL,
    SLIDING,
    attention,
    config,
    forms,
    head_norms,
    layer_types,
    read_sizes,
    rms_norm,
    window,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.rope import read_rope
from jlayer.spec import Experts, Mlp, ModelConfig, Router, Shared

MOST_EXPERTS = 1 << 14
# The published names of Mixtral's experts: w1 is the gate, w3 the other, w2 leads back.
MIXTRAL = Mlp(gate="w1", up="w3", down="w2", module="block_sparse_moe.experts.{expert}")
QWEN = Mlp(module="mlp.experts.{expert}")


# Published names of the number of experts. transformers takes each for the other.
_COUNTS = ("num_experts", "num_local_experts")


def read_router(fields: Fields, *, n_experts: int, n_chosen: int, **form) -> Router:
    """A router with these switches. `n_experts`, `n_chosen`: where the file is silent. Raises
    CheckpointError."""
    given = [name for name in _COUNTS if name in fields.raw]
    counts = {fields.integer(name, limit=MOST_EXPERTS) for name in given} or {n_experts}
    key = given[0] if given else _COUNTS[0]
    if len(counts) > 1:
        raise CheckpointError(
            f"{fields.where}: num_experts is {fields.raw[_COUNTS[0]]}, but num_local_experts "
            f"{fields.raw[_COUNTS[1]]}; expected one number of experts"
        )
    (found,) = counts
    chosen = fields.integer("num_experts_per_tok", default=n_chosen, limit=MOST_EXPERTS)
    if chosen > found:
        raise CheckpointError(
            f"{fields.where}: num_experts_per_tok is {chosen}, expected at most {key} {found}"
        )
    return Router(found, chosen, **form)


def sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Of each layer whether it has experts, as `decoder_sparse_step` and `mlp_only_layers` say;
    () where all have. Raises CheckpointError."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(n) is int for n in dense):
        raise CheckpointError(
            f"{fields.where}: mlp_only_layers is {dense!a:.80}, expected a list of numbers"
        )
    layers = range(fields.integer("num_hidden_layers"))
    found = tuple((n + 1) % step == 0 and n not in dense for n in layers)
    return () if all(found) else found


def with_experts(cfg: ModelConfig, experts: Experts) -> ModelConfig:
    """A dense model with these experts instead of its MLPs; they have its activation."""
    act, shared = cfg.mlp.activation, experts.shared
    if experts.layers and not any(experts.layers):
        return cfg
    return replace(
        cfg,
        experts=replace(
            experts,
            mlp=replace(experts.mlp, activation=act),
            shared=shared and replace(shared, mlp=replace(shared.mlp, activation=act)),
        ),
    )


def _mixtral(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=8, longest=131072)
    rope = read_rope(fields, longest=sizes.longest, theta=1e6)
    how = attention(sizes, rope, window=window(fields))
    cfg = config(fields, sizes, [how], norm=rms_norm(fields, eps=1e-5))
    router = read_router(fields, n_experts=8, n_chosen=2, renormalizes=True)
    experts = Experts(router, cfg.intermediate_size, MIXTRAL, "block_sparse_moe.gate.weight")
    return with_experts(cfg, experts)


def _qwen_experts(fields: Fields, *, width: int, n_experts: int, n_chosen: int, **more) -> Experts:
    router = read_router(
        fields,
        n_experts=n_experts,
        n_chosen=n_chosen,
        renormalizes=fields.boolean("norm_topk_prob"),
    )
    return Experts(
        router,
        fields.integer("moe_intermediate_size", default=width),
        QWEN,
        "mlp.gate.weight",
        layers=sparse_layers(fields),
        **more,
    )


def _qwen2_moe(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=16, longest=32768)
    width = window(fields, default=4096) if fields.boolean("use_sliding_window") else None
    n_layers = fields.integer("num_hidden_layers")
    first = fields.integer("max_window_layers", default=28)
    slides = [width is not None and n >= first for n in range(n_layers)]
    types = layer_types(fields, default=[SLIDING if yes else FULL for yes in slides])
    full = attention(sizes, read_rope(fields, longest=sizes.longest))
    bias = fields.boolean("qkv_bias", default=True)
    cfg = config(fields, sizes, forms(full, width), layer_types=types, qkv_bias=bias)
    shared = Shared(
        fields.integer("shared_expert_intermediate_size", default=5632),
        Mlp(module="mlp.shared_expert"),
        gate="mlp.shared_expert_gate.weight",
    )
    return with_experts(
        cfg, _qwen_experts(fields, width=1408, n_experts=60, n_chosen=4, shared=shared)
    )


def _qwen3_moe(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=4, longest=32768)
    width = window(fields, default=4096) if fields.boolean("use_sliding_window") else None
    how = attention(
        sizes,
        read_rope(fields, longest=sizes.longest),
        window=width,
        head_norms=head_norms(rms_norm(fields)),
    )
    bias = fields.boolean("attention_bias")
    cfg = config(fields, sizes, [how], qkv_bias=bias, out_bias=bias)
    return with_experts(cfg, _qwen_experts(fields, width=768, n_experts=128, n_chosen=8))


def _olmoe(fields: Fields) -> ModelConfig:
    """Norms of queries and keys over all heads."""
    sizes = read_sizes(fields, longest=4096)
    norm = rms_norm(fields, eps=1e-5)
    bias = fields.boolean("attention_bias")
    how = attention(
        sizes,
        read_rope(fields, longest=sizes.longest),
        head_norms=head_norms(norm, over="flat"),
        clip=fields.positive_or_none("clip_qkv"),
    )
    cfg = config(fields, sizes, [how], norm=norm, qkv_bias=bias, out_bias=bias)
    router = read_router(
        fields, n_experts=64, n_chosen=8, renormalizes=fields.boolean("norm_topk_prob")
    )
    return with_experts(cfg, Experts(router, cfg.intermediate_size, QWEN, "mlp.gate.weight"))


def _row(model_type, architecture, read, **more) -> Family:
    return Family(model_type, architecture, read, decoder_kinds, **more)


FAMILIES = (
    _row("mixtral", "MixtralForCausalLM", _mixtral),
    _row("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe),
    _row("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
    _row("olmoe", "OlmoeForCausalLM", _olmoe, has_windows=False),
)
