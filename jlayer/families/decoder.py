"""The decoder layer that most families share: a kind of layer made from a model's switches."""

from __future__ import annotations

from dataclasses import replace

from jlayer.families.base import (
    FINAL_NORM,
    Function,
    Group,
    Join,
    JoinBoth,
    LayerKind,
    NormAt,
    Stage,
    bias_name,
    one,
)
from jlayer.families.experts import before_experts, expert_leaves, expert_stages, stages_beside
from jlayer.parts import Attention, Experts, Mlp, Norm, head_sizes
from jlayer.spec import Leaf, ModelConfig, Role

LAYER_SCALAR = "layer_scalar"
SINKS = "sinks"  # published under this name, without ".weight"


def decoder_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer: one for each form of attention, with experts and without."""
    forms = {attention.name: attention for attention in cfg.attentions}
    names = cfg.layer_types or (cfg.attention.name,) * cfg.num_hidden_layers
    given = tuple(zip(names, experts_of_layers(cfg), strict=True))
    kinds = {key: decoder(cfg, forms[key[0]], key[1]) for key in set(given)}
    return tuple(kinds[key] for key in given)


def experts_of_layers(cfg: ModelConfig) -> tuple[Experts | None, ...]:
    """Of each layer its experts, or None."""
    if cfg.experts is None or not cfg.experts.layers:
        return (cfg.experts,) * cfg.num_hidden_layers
    return tuple(cfg.experts if has_some else None for has_some in cfg.experts.layers)


def decoder(cfg: ModelConfig, attention: Attention, experts: Experts | None = None) -> LayerKind:
    """The kind of the layers with this attention and these experts; None: with an MLP."""
    if experts is None:
        return LayerKind(
            attention.name,
            leaves=(
                *_attention_leaves(cfg, attention),
                *_mlp_leaves(cfg),
                *_biases(cfg, attention),
            ),
            stages=(*_attention_stages(cfg, attention), *_mlp_stages(cfg)),
            attention=attention,
        )
    return LayerKind(
        f"{attention.name}, experts",
        leaves=(
            *_attention_leaves(cfg, attention),
            *_place_leaves(cfg, cfg.places.before_mlp),
            *(_norms_beside(cfg, experts.beside) if experts.beside else ()),
            *expert_leaves(experts),
            *_last_leaves(cfg),
            *_biases(replace(cfg, mlp_bias=False), attention),
        ),
        stages=_expert_stages(cfg, attention, experts),
        attention=attention,
        router=experts.router,
    )


def _expert_stages(cfg, attention, experts):
    last, beside = _last_join(cfg), experts.beside
    if beside is None:
        before = before_experts(_attention_stages(cfg, attention))
        return (*before, *expert_stages(experts, last))
    places = replace(cfg.places, before_mlp=beside.before)
    before = before_experts(_attention_stages(replace(cfg, places=places), attention))
    norms = (norm_at(cfg.norm, name) for name in (beside.after_shared, beside.after))
    return (
        *before,
        *stages_beside(experts, norm_at(cfg.norm, cfg.places.before_mlp), JoinBoth(*norms, last)),
    )


def _norms_beside(cfg, beside):
    names = (beside.before, beside.after, beside.after_shared)
    return [leaf for name in names for leaf in norm_leaves(cfg.norm, name)]


def final_norm(cfg: ModelConfig) -> NormAt:
    """The norm before the head."""
    return norm_at(cfg.norm, FINAL_NORM.name)


def norm_at(norm: Norm, name: str | None) -> NormAt | None:
    """A norm at a place, with the leaves that it has there."""
    if name is None:
        return None
    weight = name if norm.has_weight else None
    return NormAt(norm, weight, bias_name(name) if norm.has_bias else None)


def norm_leaves(norm: Norm, name: str, module: str = "") -> tuple[Leaf, ...]:
    """The leaves of a norm over the width. `name`: as published, after `module`."""
    stored = [(name, "weight")] * norm.has_weight + [(bias_name(name), "bias")] * norm.has_bias
    return tuple(
        Leaf(leaf, f"{module}{name}.{published}", ("width",), Role.NORM)
        for leaf, published in stored
    )


def _matrix(name, module, axes, sizes=()):
    return Leaf(name, f"{module}.{name}.weight", axes, sizes=tuple(sizes))


def _attention_leaves(cfg, attention):
    sizes = tuple(head_sizes(attention).items())

    def matrix(name, axes):
        return _matrix(name, "self_attn", axes, sizes)

    if cfg.qkv_is_fused:
        inputs = (matrix("qkv_proj", ("qkv", "width")),)
    else:
        inputs = (matrix("q_proj", ("queries", "width")), matrix("k_proj", ("kv_heads", "width")))
        if not attention.keys_are_values:
            inputs += (matrix("v_proj", ("kv_heads", "width")),)
    places = cfg.places
    return (
        *_place_leaves(cfg, places.before_attention),
        *inputs,
        *_head_norm_leaves(attention, sizes),
        *_sinks_leaves(attention, sizes),
        matrix("o_proj", ("width", "heads")),
        *_place_leaves(cfg, places.after_attention),
    )


def _head_norm_leaves(attention, sizes):
    norms = attention.head_norms
    if norms is None or not norms.norm.has_weight:
        return ()
    leaves = []
    for names, n_heads, joined in ((norms.q, "n", "heads"), (norms.k, "k", "kv_heads")):
        axes = {"head": ("head",), "flat": (joined,), "each": (n_heads, "head")}[norms.over]
        axes = axes if len(names) == 1 else ("head",)
        leaves += [
            Leaf(name, f"self_attn.{name}.weight", axes, Role.NORM, sizes=sizes) for name in names
        ]
    return tuple(leaves)


def _sinks_leaves(attention, sizes):
    if not attention.has_sinks:
        return ()
    return (Leaf(SINKS, f"self_attn.{SINKS}", ("n",), Role.NORM, sizes=sizes),)


def _place_leaves(cfg, name):
    return () if name is None else norm_leaves(cfg.norm, name)


def _mlp_leaves(cfg):
    mlp, places = cfg.mlp, cfg.places
    before = () if cfg.is_parallel else _place_leaves(cfg, places.before_mlp)
    up = _matrix(mlp.up, mlp.module, ("mlp", "width"))
    if mlp.form == "fused":
        inner = (
            _matrix(mlp.up, mlp.module, ("both", "width"), [("both", 2 * cfg.intermediate_size)]),
        )
    else:
        gate = (_matrix(mlp.gate, mlp.module, ("mlp", "width")),) if mlp.form == "gated" else ()
        inner = (*gate, up)
    return (
        *before,
        *inner,
        _matrix(mlp.down, mlp.module, ("width", "mlp")),
        *_last_leaves(cfg),
    )


def _last_leaves(cfg):
    """What the output of a layer's last branch goes through."""
    scalar = Leaf(LAYER_SCALAR, LAYER_SCALAR, ("one",), Role.NORM, sizes=(("one", 1),))
    return (*_place_leaves(cfg, cfg.places.after_mlp), *((scalar,) if cfg.layer_scalar else ()))


def _biases(cfg, attention):
    """The biases of a layer's matrices, in their order."""
    sizes = tuple(head_sizes(attention).items())
    mlp = cfg.mlp
    inputs = [("qkv_proj", "qkv")] if cfg.qkv_is_fused else [("q_proj", "queries")]
    if not cfg.qkv_is_fused:
        names = ("k_proj",) if attention.keys_are_values else ("k_proj", "v_proj")
        inputs += [(name, "kv_heads") for name in names]
    inner = [(mlp.gate, "mlp")] * (mlp.form == "gated")
    table = (
        *((cfg.qkv_bias, "self_attn", *each) for each in inputs),
        (cfg.out_bias, "self_attn", "o_proj", "width"),
        *((cfg.mlp_bias, mlp.module, *each) for each in (*inner, (mlp.up, "mlp"))),
        (cfg.mlp_bias, mlp.module, mlp.down, "width"),
    )
    return tuple(
        Leaf(bias_name(of), f"{module}.{of}.bias", (axis,), Role.BIAS, of=of, sizes=sizes)
        for is_there, module, of, axis in table
        if is_there
    )


def _attention_stages(cfg, attention):
    before = norm_at(cfg.norm, cfg.places.before_attention)
    if cfg.qkv_is_fused:
        names = ("qkv_proj",)
    else:
        names = ("q_proj", "k_proj", *(() if attention.keys_are_values else ("v_proj",)))
    norms = attention.head_norms
    used = (*norms.q, *norms.k) if norms and norms.norm.has_weight else ()
    used += (SINKS,) if attention.has_sinks else ()
    following = cfg.places.before_attention if cfg.is_parallel else cfg.places.before_mlp
    join = Join(
        after=norm_at(cfg.norm, cfg.places.after_attention),
        scale=cfg.residual_scale,
        following=norm_at(cfg.norm, following),
        is_parallel=cfg.is_parallel,
    )
    return (
        Stage(
            "qkv",
            groups=tuple(map(one, names)),
            input=Function("normed", ("hidden",), ("x",), before.leaves if before else (), before),
            finish=Function("attend", ("cache", "rows"), ("x", "cache"), used, attention),
        ),
        Stage(
            "o",
            groups=(one("o_proj"),),
            finish=Function("join_and_norm", ("hidden",), ("hidden", "x"), join.leaves, join),
        ),
    )


def _mlp_stages(cfg):
    mlp: Mlp = cfg.mlp
    if mlp.form == "gated":
        group = Group("inner", (mlp.gate, mlp.up), combine="gated", how=mlp.activation)
        finish = Function("pass_on", (), ("x",))
    else:
        group = one(mlp.up)
        finish = Function("activate", (), ("x",), how=mlp)
    join = _last_join(cfg)
    return (
        Stage("gate_up", groups=(group,), finish=finish),
        Stage(
            "down",
            groups=(one(mlp.down),),
            finish=Function("join", ("hidden",), ("hidden",), join.leaves, join),
        ),
    )


def _last_join(cfg):
    """How the output of a layer's last branch is added."""
    return Join(
        after=norm_at(cfg.norm, cfg.places.after_mlp),
        scale=cfg.residual_scale,
        scalar=LAYER_SCALAR if cfg.layer_scalar else None,
    )
