"""Families whose routers choose by their scores and a correction bias: GLM 4.5, MiniMax M2, ERNIE
4.5. Training moves the bias so that all experts get their share; it weighs no output."""

from __future__ import annotations

from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.base import Family
from jlayer.families.common import (
    OTHER_PARTS,
    attention,
    config,
    head_norms,
    read_sizes,
    rms_norm,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.mixtures import MIXTRAL, QWEN, layers_where, read_router, with_experts
from jlayer.families.rope import read_rope
from jlayer.parts import Experts, Mlp, Router, Shared
from jlayer.spec import ModelConfig

_SHARED = Mlp(module="mlp.shared_experts")


def in_groups(fields: Fields, router: Router) -> Router:
    """A router as it is. Raises CheckpointError where its groups cannot be chosen from."""
    size, rest = divmod(router.n_experts, router.n_groups)
    chosen = router.n_chosen_groups
    if rest or size < 2:
        raise CheckpointError(
            f"{fields.where}: n_group is {router.n_groups}, expected groups of two and more of the "
            f"{router.n_experts} experts"
        )
    if chosen > router.n_groups or chosen * size < router.n_chosen:
        raise CheckpointError(
            f"{fields.where}: topk_group is {chosen}, of {router.n_groups} groups of {size} "
            f"experts; expected as many as have num_experts_per_tok {router.n_chosen} in them"
        )
    return router


def _glm4_moe(fields: Fields) -> ModelConfig:
    """Half of each head is turned. The first layers are dense."""
    sizes = read_sizes(fields, kv_heads=8, longest=131072)
    norm = rms_norm(fields, eps=1e-5)
    rope = read_rope(fields, longest=sizes.longest, partial=0.5)
    norms = head_norms(norm) if fields.boolean("use_qk_norm") else None
    bias = fields.boolean("attention_bias")
    how = attention(sizes, rope, head_norms=norms)
    cfg = config(fields, sizes, [how], norm=norm, qkv_bias=bias)
    router = read_router(
        fields,
        n_experts=128,
        n_chosen=8,
        counts=("n_routed_experts", "num_local_experts"),
        scores="sigmoid",
        has_bias=True,
        n_groups=fields.integer("n_group", default=1),
        n_chosen_groups=fields.integer("topk_group", default=1),
        group_score="best_two",
        renormalizes=fields.boolean("norm_topk_prob", default=True),
        above_sum=1e-20,
        scale=fields.positive("routed_scaling_factor", default=1.0),
        is_exact=True,
    )
    width = fields.integer("moe_intermediate_size", default=1408)
    first = fields.from_zero("first_k_dense_replace", default=1)
    experts = Experts(
        in_groups(fields, router),
        width,
        QWEN,
        "mlp.gate.weight",
        bias="mlp.gate.e_score_correction_bias",
        shared=Shared(width * fields.integer("n_shared_experts", default=1), _SHARED),
        layers=layers_where(fields, lambda n: n >= first),
    )
    n_further = fields.from_zero("num_nextn_predict_layers", default=1)
    return replace(with_experts(cfg, experts), n_further=n_further)


def _minimax_m2(fields: Fields) -> ModelConfig:
    """Norms of queries and keys over all heads, of which released ones turn a half: `rotary_dim`
    says so."""
    sizes = read_sizes(fields, kv_heads=8, head_dim=128, longest=196608)
    norm, turned = rms_norm(fields), sizes.head_dim
    if fields.has("rotary_dim"):
        turned = fields.integer("rotary_dim", limit=sizes.head_dim)
    partial = turned / sizes.head_dim
    rope = read_rope(fields, longest=sizes.longest, theta=5e6, partial=partial)
    how = attention(sizes, rope, head_norms=head_norms(norm, over="flat"))
    cfg = config(fields, sizes, [how], norm=norm)
    router = read_router(
        fields, n_experts=256, n_chosen=8, scores="sigmoid", has_bias=True, renormalizes=True
    )
    experts = Experts(
        router,
        cfg.intermediate_size,
        MIXTRAL,
        "block_sparse_moe.gate.weight",
        bias="block_sparse_moe.e_score_correction_bias",
    )
    return with_experts(cfg, experts)


def _ernie4_5_moe(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=4, longest=131072)
    fields.refuse_unless("use_bias", None, False)  # the head would have one too
    rope = read_rope(fields, longest=sizes.longest, theta=5e5, interleaved=True)
    norm = rms_norm(fields, eps=1e-5)
    cfg = config(fields, sizes, [attention(sizes, rope)], tied=True, norm=norm)
    router = read_router(
        fields,
        n_experts=64,
        n_chosen=6,
        counts=("moe_num_experts", "num_experts"),
        chosen=("moe_k", "num_experts_per_tok"),
        has_bias=True,
        renormalizes=True,
        least_sum=fields.positive("moe_norm_min", default=1e-12),
        is_exact=True,
    )
    width = fields.integer("moe_intermediate_size", default=1536)
    n_shared = fields.from_zero("moe_num_shared_experts", default=2)
    experts = Experts(
        router,
        width,
        QWEN,
        "mlp.gate.weight",
        bias="mlp.moe_statics.e_score_correction_bias",
        bias_axes=("one", "experts"),
        shared=Shared(width * n_shared, _SHARED) if n_shared else None,
        layers=_of_ernie(fields),
    )
    return with_experts(cfg, experts)


def _of_ernie(fields):
    """Which layers have experts: each so many-th from a first one to a last; -1: to the end."""
    period = fields.integer("moe_layer_interval", default=1)
    first = fields.from_zero("moe_layer_start_index", default=1)
    last = fields.raw.get("moe_layer_end_index", -1)
    if last == -1:
        last = fields.integer("num_hidden_layers") - 1
    elif "moe_layer_end_index" in fields.raw:
        last = fields.from_zero("moe_layer_end_index")
    return layers_where(fields, lambda n: (n + 1) % period == 0 and first <= n <= last)


def _row(model_type, architecture, read, **more) -> Family:
    return Family(model_type, architecture, read, decoder_kinds, has_windows=False, **more)


FAMILIES = (
    _row("glm4_moe", "Glm4MoeForCausalLM", _glm4_moe),
    _row("minimax_m2", "MiniMaxM2ForCausalLM", _minimax_m2),
    _row("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _ernie4_5_moe, left_out=OTHER_PARTS),
)
