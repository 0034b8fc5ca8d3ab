"""Families with experts whose attention is that of a dense family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jlayer.errors import CheckpointError, UnsupportedModelError
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
from jlayer.families.experts import router_moves
from jlayer.families.fields import Fields
from jlayer.families.llama import TABLES, granite, hunyuan
from jlayer.families.rope import read_rope
from jlayer.parts import Experts, Mlp, Router, Shared, Stack
from jlayer.spec import ModelConfig

MOST_EXPERTS = 1 << 14
# The published names of Mixtral's experts: w1 is the gate, w3 the other, w2 leads back.
MIXTRAL = Mlp(gate="w1", up="w3", down="w2", module="block_sparse_moe.experts.{expert}")
QWEN = Mlp(module="mlp.experts.{expert}")
GRANITE = Mlp(module="block_sparse_moe.experts.{expert}")
# How Granite's are published, and they alone.
_OF_GRANITE = (
    Stack("block_sparse_moe.input_linear.weight", ("gate_proj", "up_proj"), is_only=True),
    Stack("block_sparse_moe.output_linear.weight", ("down_proj",), is_only=True),
)


# Published names of the number of experts, and of that of a token's. transformers takes each of a
# family's names for the other.
_COUNTS = ("num_experts", "num_local_experts")
_CHOSEN = ("num_experts_per_tok",)


def read_router(
    fields: Fields,
    *,
    n_experts: int | None,
    n_chosen: int | None,
    counts: tuple[str, ...] = _COUNTS,
    chosen: tuple[str, ...] = _CHOSEN,
    **form,
) -> Router:
    """A router with these switches. `n_experts`, `n_chosen`: where the file is silent; None: it
    may not be. `counts`, `chosen`: the names that the family has for them. Raises
    CheckpointError."""
    found, key = _count(fields, counts, n_experts)
    of_token, name = _count(fields, chosen, n_chosen)
    if of_token > found:
        raise CheckpointError(
            f"{fields.where}: {name} is {of_token}, expected at most {key} {found}"
        )
    return Router(found, of_token, **form)


def _count(fields, names, default):
    """(a number that has several names, the one that it is given by)."""
    given = [name for name in names if name in fields.raw]
    found = [fields.integer(name, limit=MOST_EXPERTS) for name in given]
    if len(set(found)) > 1:
        raise CheckpointError(
            f"{fields.where}: {given[0]} is {found[0]}, but {given[1]} {found[1]}; they mean the "
            "same, expected one number"
        )
    if not given and default is None:
        fields.integer(names[0])
    return (found[0], given[0]) if given else (default, next(iter(names), "the number"))


def sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Of each layer whether it has experts, as `decoder_sparse_step` and `mlp_only_layers` say;
    () where all have. Raises CheckpointError."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(n) is int for n in dense):
        raise CheckpointError(
            f"{fields.where}: mlp_only_layers is {dense!a:.80}, expected a list of numbers"
        )
    return layers_where(fields, lambda n: (n + 1) % step == 0 and n not in dense)


def layers_where(fields: Fields, has_experts: Callable[[int], bool]) -> tuple[bool, ...]:
    """Of each layer whether it has experts; () where all have."""
    found = tuple(has_experts(n) for n in range(fields.integer("num_hidden_layers")))
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
            router_moves=router_moves(experts.router, cfg.hidden_size),
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


def qwen_experts(
    fields: Fields,
    *,
    width: int,
    n_experts: int,
    n_chosen: int,
    counts: tuple[str, ...] = _COUNTS,
    renormalizes: bool = False,
    **more,
) -> Experts:
    """The experts of a Qwen; the numbers count where the file is silent."""
    renormalizes = fields.boolean("norm_topk_prob", default=renormalizes)
    router = read_router(
        fields,
        n_experts=n_experts,
        n_chosen=n_chosen,
        counts=counts,
        renormalizes=renormalizes,
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
    slides = [width is not None and n % 2 == 0 and n < first for n in range(n_layers)]
    types = layer_types(fields, default=[SLIDING if yes else FULL for yes in slides])
    full = attention(sizes, read_rope(fields, longest=sizes.longest))
    bias = fields.boolean("qkv_bias", default=True)
    cfg = config(fields, sizes, forms(full, width), layer_types=types, qkv_bias=bias)
    numbers = {"width": 1408, "n_experts": 60, "n_chosen": 4, "counts": ("num_experts",)}
    shared = qwen_shared(fields, width=5632)
    return with_experts(cfg, qwen_experts(fields, shared=shared, **numbers))


def qwen_shared(fields: Fields, *, width: int) -> Shared:
    """Its shared expert, with a gate. `width`: where the file is silent."""
    return Shared(
        fields.integer("shared_expert_intermediate_size", default=width),
        Mlp(module="mlp.shared_expert"),
        gate="mlp.shared_expert_gate.weight",
    )


def _qwen3_moe(fields: Fields) -> ModelConfig:
    """All layers have a window, or none."""
    fields.has("max_window_layers")  # known: it stands in all files, and says nothing here
    sizes = read_sizes(fields, kv_heads=4, longest=32768)
    width = window(fields, default=4096) if fields.boolean("use_sliding_window") else None
    if width is None and SLIDING in layer_types(fields, default=()):
        raise CheckpointError(  # of its layers transformers reads nothing here, but of its cache
            f"{fields.where}: layer_types has {SLIDING}, but use_sliding_window is false; expected "
            "layers without a window"
        )
    how = attention(
        sizes,
        read_rope(fields, longest=sizes.longest),
        window=width,
        head_norms=head_norms(rms_norm(fields)),
    )
    bias = fields.boolean("attention_bias")
    cfg = config(fields, sizes, [how], qkv_bias=bias, out_bias=bias)
    return with_experts(cfg, qwen_experts(fields, width=768, n_experts=128, n_chosen=8))


def _olmoe(fields: Fields) -> ModelConfig:
    """Norms of queries and keys over all heads."""
    sizes = read_sizes(fields, longest=4096)
    sizes.check_shared_out(fields)
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


def _hunyuan(fields: Fields) -> ModelConfig:
    """The dense one's attention. A number for each layer is taken where all are the same."""
    for name in ("moe_topk", "num_experts"):
        said = fields.raw.get(name)
        if isinstance(said, list) and said and said.count(said[0]) == len(said):
            fields = fields.changed({name: said[0]})
        elif isinstance(said, list):
            raise UnsupportedModelError(
                f"{fields.where}: {name} is {said!a:.80}, supported: one number for all layers"
            )
    cfg, width = hunyuan(fields), fields.integer("intermediate_size")
    chosen = ("moe_topk", "num_experts_per_tok")
    router = read_router(
        fields, n_experts=1, n_chosen=1, chosen=chosen, renormalizes=True, is_exact=True
    )
    shared = Shared(width, Mlp(module="mlp.shared_mlp"))
    return with_experts(cfg, Experts(router, width, QWEN, "mlp.gate.wg.weight", shared=shared))


def _phimoe(fields: Fields) -> ModelConfig:
    """Two experts for each token, whatever the file says: its router knows no other number.

    Of LongRoPE transformers takes the factors of short texts alone, its makers those of long ones
    too: it runs as far as both agree.
    """
    fields.refuse_unless("num_experts_per_tok", 2)
    sizes, attention_factor = read_sizes(fields, kv_heads=8, longest=131072), {}
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    said = fields.section(name)
    if said.raw.get("rope_type", said.raw.get("type", "default")) != "default":
        original = said.integer("original_max_position_embeddings")
        sizes = replace(sizes, longest=min(sizes.longest, original))
        attention_factor = {"attention_factor": said.positive("short_mscale")}
        said.positive("long_mscale")
        fields = fields.changed({name: {**said.raw, **attention_factor}})
    rope = read_rope(fields, longest=sizes.longest, theta=1e6, types=("default", "longrope"))
    bias = fields.boolean("attention_bias")
    cfg = config(
        fields,
        sizes,
        [attention(sizes, rope, window=window(fields))],
        norm=rms_norm(fields, eps=1e-5, kind="layer", rounds_first=False, has_bias=True),
        qkv_bias=bias,
        out_bias=bias,
        head_bias=fields.boolean("lm_head_bias"),
    )
    jitter = fields.raw.get("router_jitter_noise", 0.01)
    if type(jitter) not in (int, float) or not 0 <= jitter < 1e30:
        raise CheckpointError(
            f"{fields.where}: router_jitter_noise is {jitter!a:.80}, expected a number from 0"
        )
    router = read_router(
        fields,
        n_experts=16,
        n_chosen=2,
        counts=("num_local_experts",),
        chosen=(),
        scores="sparsemixer",
        jitter=float(jitter),
    )
    experts = Experts(router, cfg.intermediate_size, MIXTRAL, "block_sparse_moe.gate.weight")
    return with_experts(cfg, experts)


def _granitemoe(fields: Fields) -> ModelConfig:
    """The dense one with experts: its factors are the same."""
    cfg = granite(fields)
    counts = ("num_local_experts",)
    router = read_router(fields, n_experts=8, n_chosen=2, counts=counts, renormalizes=True)
    experts = Experts(
        router,
        cfg.intermediate_size,
        GRANITE,
        "block_sparse_moe.router.layer.weight",
        stacks=_OF_GRANITE,
    )
    return with_experts(cfg, experts)


def _row(model_type, architecture, read, **more) -> Family:
    return Family(model_type, architecture, read, decoder_kinds, **more)


FAMILIES = (
    _row("mixtral", "MixtralForCausalLM", _mixtral),
    _row("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe),
    _row("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
    _row("olmoe", "OlmoeForCausalLM", _olmoe, has_windows=False),
    _row("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _hunyuan, has_windows=False, dropped=TABLES),
    _row("granitemoe", "GraniteMoeForCausalLM", _granitemoe, has_windows=False, dropped=TABLES),
    _row("phimoe", "PhimoeForCausalLM", _phimoe),
)
