"""Families with latent attention: DeepSeek V2, V3 and V3.2, Kimi K2, GLM-4.7-Flash and GLM-5,
Mistral 4. Their layers have experts but for the first ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import Family, LayerKind
from jlayer.families.common import OTHER_PARTS, Sizes, config, layer_types, rms_norm
from jlayer.families.decoder import experts_of_layers
from jlayer.families.fields import LIMITS, Fields
from jlayer.families.latent import latent_layer
from jlayer.families.mixtures import MOST_EXPERTS, QWEN, with_experts
from jlayer.families.rope import read_rope, rope_section
from jlayer.parts import Experts, Growth, Latent, Mlp, Norm, Router, Shared, Stack
from jlayer.spec import ModelConfig

# The scalings that their rotary embeddings may have.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The norms of latents have this one, whatever the config says of the others.
_INNER_NORM = Norm(eps=1e-6)
# What a layer's type in `mlp_layer_types` says: whether it has experts.
_HAS_EXPERTS = {"dense": False, "sparse": True}
_INDEXED = "indexed_attention"
# Weights that choose which tokens a layer attends to, in texts longer than all that it may choose.
_INDEXER = (r"model\.layers\.[0-9]+\.self_attn\.indexer\..+",)

# What counts where the file is silent.
_V3 = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}
_V2 = {
    **{name: _V3[name] for name in list(_V3)[:5]},
    "max_position_embeddings": 2048,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}
_V32 = {**_V3, "max_position_embeddings": 163840, "index_topk": 2048}
_GLM_LITE = {
    **_V3,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "max_position_embeddings": 202752,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "moe_intermediate_size": 1536,
    "first_k_dense_replace": 1,
}
_GLM_DSA = {
    **_V32,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "max_position_embeddings": 202752,
    "n_group": 1,
    "topk_group": 1,
}
_MISTRAL4 = {
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 1048576,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}
_MISTRAL4_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_STACKS = (
    Stack("mlp.experts.gate_up_proj", ("gate_proj", "up_proj"), is_only=True),
    Stack("mlp.experts.down_proj", ("down_proj",), is_only=True),
)


def _kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    given = experts_of_layers(cfg)
    kinds = {experts: latent_layer(cfg, cfg.attention, experts) for experts in set(given)}
    return tuple(kinds[experts] for experts in given)


def _filled(fields: Fields, defaults: Mapping, **synonyms: str) -> Fields:
    """The config with what its family has where it is silent. `synonyms`: other names in
    transformers. Raises CheckpointError where two names of a fact say different things."""
    for other, name in {"num_mtp_layers": "num_nextn_predict_layers", **synonyms}.items():
        if other in fields.raw:
            value = fields.raw[other]
            if fields.raw.get(name, value) != value:
                raise CheckpointError(
                    f"{fields.where}: {name} is {fields.raw[name]!a:.80}, but {other} "
                    f"{value!a:.80}; expected one number"
                )
            fields = fields.changed({name: value})
    return fields.filled(defaults)


def _latent(fields: Fields, *, interleaved: bool, types: Sequence[str] = _ROPE_TYPES) -> Latent:
    heads, size = fields.integer("num_attention_heads"), {"limit": LIMITS["head_dim"]}
    others = fields.integer("num_key_value_heads", default=heads, null_is_absent=True)
    if others != heads:
        raise CheckpointError(
            f"{fields.where}: num_key_value_heads is {others}, expected num_attention_heads "
            f"{heads}: of one latent each head has its own key and value"
        )
    turned = fields.integer("qk_rope_head_dim", **size)
    if turned % 2:
        raise CheckpointError(
            f"{fields.where}: qk_rope_head_dim is {turned}; rotary embedding needs an even one"
        )
    nope, rank = fields.integer("qk_nope_head_dim", **size), {"limit": LIMITS["hidden_size"]}
    longest = fields.integer("max_position_embeddings")
    rope = read_rope(fields, longest=longest, types=types, interleaved=interleaved)
    return Latent(
        heads,
        rank=fields.integer("kv_lora_rank", **rank),
        nope_dim=nope,
        rope_dim=turned,
        value_dim=fields.integer("v_head_dim", **size),
        rope=rope,
        q_rank=fields.integer("q_lora_rank", **rank) if fields.has("q_lora_rank") else None,
        scale=(nope + turned) ** -0.5 * _grown(fields, rope),
        norm=_INNER_NORM,
    )


def _grown(fields, rope):
    """What scores are multiplied by where the rotary embedding is scaled: the square of YaRN's
    factor (arXiv 2309.00071, section 3.4) with a weight of its own."""
    said = rope_section(fields)
    if rope.type == "default" or not said.raw.get("mscale_all_dim"):
        return 1.0
    weight, factor = said.positive("mscale_all_dim"), said.positive("factor")
    return 1.0 if factor <= 1 else (0.1 * weight * math.log(factor) + 1.0) ** 2


def _groups(fields, n_experts, n_chosen, *, least):
    """(groups, groups that are chosen). `least`: the experts that a group has at least."""
    n_groups = fields.integer("n_group", limit=MOST_EXPERTS)
    chosen = fields.integer("topk_group", limit=MOST_EXPERTS)
    if n_experts % n_groups or n_experts // n_groups < least:
        raise CheckpointError(
            f"{fields.where}: n_routed_experts is {n_experts}, expected a multiple of n_group "
            f"{n_groups}, and at least {least} for each group"
        )
    if chosen > n_groups or n_chosen > chosen * (n_experts // n_groups):
        raise CheckpointError(
            f"{fields.where}: topk_group is {chosen}, expected at most n_group {n_groups}, with "
            f"num_experts_per_tok {n_chosen} experts of {n_experts} in them"
        )
    return n_groups, chosen


def _router(fields: Fields, *, least: int | None, **form) -> Router:
    """`least`: the experts that a group has at least; None: there are no groups."""
    n_experts = fields.integer("n_routed_experts", limit=MOST_EXPERTS)
    chosen = fields.integer("num_experts_per_tok", limit=MOST_EXPERTS)
    if chosen > n_experts:
        raise CheckpointError(
            f"{fields.where}: num_experts_per_tok is {chosen}, expected at most n_routed_experts "
            f"{n_experts}"
        )
    n_groups, n_of_groups = (
        (1, 1) if least is None else _groups(fields, n_experts, chosen, least=least)
    )
    return Router(
        n_experts,
        chosen,
        n_groups=n_groups,
        n_chosen_groups=n_of_groups,
        scale=fields.positive("routed_scaling_factor"),
        **{"is_exact": True, **form},
    )


def _sigmoid_router(fields: Fields) -> Router:
    fields.refuse_unless("scoring_func", "sigmoid")
    fields.refuse_unless("topk_method", "noaux_tc")
    return _router(
        fields,
        least=2,
        scores="sigmoid",
        has_bias=True,
        group_score="best_two",
        renormalizes=fields.boolean("norm_topk_prob"),
        above_sum=1e-20,
    )


def _softmax_router(fields: Fields) -> Router:
    fields.refuse_unless("scoring_func", "softmax")
    fields.refuse_unless("norm_topk_prob", False)  # transformers would not do it
    ways = {"greedy": None, "group_limited_greedy": 1}
    method = fields.choice("topk_method", {name: name for name in ways}, default="greedy")
    return _router(fields, least=ways[method])


def _first_dense(fields: Fields) -> tuple[bool, ...]:
    """Of each layer whether it has experts: all but the first `first_k_dense_replace`."""
    fields.refuse_unless("moe_layer_freq", 1)
    first = fields.from_zero("first_k_dense_replace")
    return tuple(n >= first for n in range(fields.integer("num_hidden_layers")))


def _typed(fields: Fields) -> tuple[bool, ...]:
    """As `_first_dense`, but `mlp_layer_types` goes before it."""
    found, first = fields.raw.get("mlp_layer_types"), _first_dense(fields)
    if found is None:
        return first
    if not isinstance(found, list) or not all(str(one) in _HAS_EXPERTS for one in found):
        raise UnsupportedModelError(
            f"{fields.where}: mlp_layer_types is {str(found)[:200]!a}, supported: "
            f"{', '.join(_HAS_EXPERTS)}"
        )
    if len(found) != len(first):
        raise CheckpointError(
            f"{fields.where}: mlp_layer_types has {len(found)} entries, expected "
            f"num_hidden_layers {len(first)}"
        )
    return tuple(_HAS_EXPERTS[one] for one in found)


def _model(
    fields: Fields,
    latent: Latent,
    read_router: Callable[[Fields], Router],
    layers: tuple[bool, ...],
    *,
    eps: float = 1e-6,
    longest: int | None = None,
    stacks: tuple[Stack, ...] = (),
) -> ModelConfig:
    """`layers`: of each whether it has experts, with a router that `read_router` reads; `longest`:
    the most tokens of a text, if they are fewer than the config has positions."""
    fields.refuse_unless("mlp_bias", False)
    positions = fields.integer("max_position_embeddings")
    bias = fields.boolean("attention_bias")
    cfg = config(
        fields,
        Sizes(latent.n_heads, latent.n_heads, latent.head_dim, positions),
        [latent],
        norm=rms_norm(fields, eps=eps),
        qkv_bias=bias,
        out_bias=bias,
        longest=min(positions, longest or positions),
        n_further=fields.from_zero("num_nextn_predict_layers"),
    )
    if not any(layers):
        return cfg
    router = read_router(fields)
    width = fields.integer("moe_intermediate_size", limit=LIMITS["intermediate_size"])
    n_shared = fields.integer("n_shared_experts", limit=MOST_EXPERTS)
    experts = Experts(
        router,
        width,
        QWEN,
        "mlp.gate.weight",
        bias="mlp.gate.e_score_correction_bias" if router.has_bias else None,
        shared=Shared(n_shared * width, Mlp(module="mlp.shared_experts")),
        layers=() if all(layers) else layers,
        stacks=stacks,
    )
    return with_experts(cfg, experts)


def _v3(fields: Fields) -> ModelConfig:
    fields = _filled(fields, _V3, num_local_experts="n_routed_experts")
    # A head_dim would go before it where transformers makes the rotary embedding.
    fields.refuse_unless("head_dim", fields.raw["qk_rope_head_dim"])
    latent = _latent(fields, interleaved=fields.boolean("rope_interleave", default=True))
    return _model(fields, latent, _sigmoid_router, _first_dense(fields))


def _v2(fields: Fields) -> ModelConfig:
    fields = _filled(fields, _V2, num_experts="n_routed_experts")
    latent = _latent(fields, interleaved=True)
    return _model(fields, latent, _softmax_router, _first_dense(fields))


def _glm_lite(fields: Fields) -> ModelConfig:
    fields = _filled(
        fields, _GLM_LITE, num_local_experts="n_routed_experts", head_dim="qk_rope_head_dim"
    )
    if fields.raw.get("mlp_layer_types") is None:
        fields.refuse_unless("first_k_dense_replace", 1)  # transformers does not look at it
    _refuse_partial(fields)
    latent = _latent(fields, interleaved=fields.boolean("rope_interleave", default=True))
    return _model(fields, latent, _sigmoid_router, _typed(fields), eps=1e-5)


def _refuse_partial(fields):
    """Of a key that is turned, all is turned."""
    for said in (fields, rope_section(fields)):
        said.refuse_unless("partial_rotary_factor", None, 1)


def _v32(fields: Fields, defaults: Mapping = _V32, **more) -> ModelConfig:
    """A layer attends to the `index_topk` tokens that its indexer chooses: to all, in texts that
    have no more."""
    fields = _filled(fields, defaults, num_local_experts="n_routed_experts")
    if not fields.has("q_lora_rank"):
        raise UnsupportedModelError(f"{fields.where}: q_lora_rank is null, supported: a number")
    fields.refuse_unless("rope_interleave", True)
    layer_types(fields, (_INDEXED,), default=())
    latent = _latent(fields, interleaved=True)
    longest = fields.integer("index_topk")
    return _model(fields, latent, _sigmoid_router, _typed(fields), longest=longest, **more)


def _glm_dsa(fields: Fields) -> ModelConfig:
    return _v32(fields, _GLM_DSA, eps=1e-5)


def _mistral4(fields: Fields) -> ModelConfig:
    """Queries grow with their position, as in Llama 4. The part of a head that is turned is given
    twice."""
    fields = _filled(fields, _MISTRAL4, num_local_experts="n_routed_experts")
    section = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    if not fields.has(section):
        fields = fields.changed({section: _MISTRAL4_ROPE})
    said = fields.section(section)
    turned, nope = (fields.integer(f"qk_{name}_head_dim") for name in ("rope", "nope"))
    said.refuse_unless("partial_rotary_factor", turned / (turned + nope))
    beta = said.positive("llama_4_scaling_beta")
    grows = Growth(beta, said.integer("original_max_position_embeddings"))
    without = {name: said.raw[name] for name in said.raw if name != "partial_rotary_factor"}
    fields = fields.changed({section: without}, without=("partial_rotary_factor",))
    # Of other types transformers turns another number of pairs than a head has.
    interleaved = fields.boolean("rope_interleave", default=True)
    latent = _latent(fields, interleaved=interleaved, types=("yarn",))
    return _model(
        fields, replace(latent, grows=grows), _grouped_router, _first_dense(fields), stacks=_STACKS
    )


def _grouped_router(fields: Fields) -> Router:
    return _router(
        fields,
        least=2,
        group_score="best_two",
        renormalizes=fields.boolean("norm_topk_prob"),
        above_sum=1e-20,
        is_exact=False,
    )


def _row(model_type, architecture, read, **more):
    given = {"left_out": OTHER_PARTS, "has_windows": False, **more}
    return Family(model_type, architecture, read, _kinds, **given)


# A window counts for none of their layers: these have a type of their own.
_OF_INDEXED = {
    "left_out": (*OTHER_PARTS, *_INDEXER),
    "has_windows": True,
    "longest_key": "index_topk",
}


FAMILIES = (
    _row("deepseek_v2", "DeepseekV2ForCausalLM", _v2),
    _row("deepseek_v3", "DeepseekV3ForCausalLM", _v3),
    _row("kimi_k2", "DeepseekV3ForCausalLM", _v3),
    _row("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _glm_lite),
    _row("deepseek_v32", "DeepseekV32ForCausalLM", _v32, **_OF_INDEXED),
    _row("mistral4", "Mistral4ForCausalLM", _mistral4),
    _row("glm_moe_dsa", "GlmMoeDsaForCausalLM", _glm_dsa, **_OF_INDEXED),
)
