"""The leaves and stages of latent attention, which a layer has instead of attention.

The matrix that makes keys and values of a latent is used uncut: it is multiplied by queries from
one side and by what they mix from the other, head by head, so no range of its rows gives products
that could be joined (see `model.mla`). It is streamed all the same (32 MiB a layer of DeepSeek V3).
"""

from __future__ import annotations

from dataclasses import replace

from jlayer.families.base import Function, LayerKind, Stage, bias_name, one
from jlayer.families.decoder import decoder
from jlayer.parts import Experts, Latent, latent_sizes
from jlayer.spec import Leaf, ModelConfig, Role

# The names of its matrices and norms.
Q, Q_A, Q_B, Q_NORM = "q_proj", "q_a_proj", "q_b_proj", "q_a_layernorm"
KV_A, KV_B, KV_NORM = "kv_a_proj_with_mqa", "kv_b_proj", "kv_a_layernorm"
# In the place of KV_B where it is apart: of each head what its keys are made by, turned around, and
# what its values are made by.
K_B, V_B = "k_b_proj", "v_b_proj"
OUT = "o_proj"
_MODULE = "self_attn"
# What such a layer adds to the flow; see `families.base`.
OF_LATENT = ("latent",)


def latent_layer(cfg: ModelConfig, latent: Latent, experts: Experts | None = None) -> LayerKind:
    """The kind of the layers with this attention and these experts; None: with an MLP."""
    plain = decoder(cfg, latent.among_latents, experts)
    is_inner = [leaf.published.startswith(f"{_MODULE}.") for leaf in plain.leaves]
    first = is_inner.index(True)
    others = [leaf for leaf, inner in zip(plain.leaves, is_inner, strict=True) if not inner]
    qkv, out, *rest = plain.stages
    return LayerKind(
        plain.name,
        leaves=(*others[:first], *_leaves(latent), *others[first:], *_biases(cfg, latent)),
        stages=(*_stages(latent, qkv), out, *rest),
        router=plain.router,
        latent=latent,
    )


def _leaves(latent):
    sizes = tuple(latent_sizes(latent).items())

    def leaf(name, axes, role=Role.MATRIX, *, moves=False):
        return Leaf(name, f"{_MODULE}.{name}.weight", axes, role, sizes=sizes, moves=moves)

    if latent.q_rank is None:
        queries = (leaf(Q, ("queries", "width")),)
    else:
        queries = (
            leaf(Q_A, ("q_rank", "width")),
            leaf(Q_NORM, ("q_rank",), Role.NORM),
            leaf(Q_B, ("queries", "q_rank")),
        )
    return (
        *queries,
        leaf(KV_A, ("entry", "width")),
        leaf(KV_NORM, ("rank",), Role.NORM),
        *(leaf(name, axes, Role.NORM, moves=True) for name, axes in _expanding(latent).items()),
        leaf(OUT, ("width", "values")),
    )


def _expanding(latent):
    """What makes keys and values of a latent: name -> axes."""
    if latent.is_apart:
        return {K_B: ("ranks", "nope"), V_B: ("values", "rank")}
    return {KV_B: ("keys_and_values", "rank")}


def _biases(cfg, latent):
    """Of what the width is projected to, and of what is projected to the width."""
    sizes, inner = tuple(latent_sizes(latent).items()), []
    if cfg.qkv_bias:
        inner = [(Q_A, "q_rank")] * (latent.q_rank is not None) + [(KV_A, "entry")]
    return tuple(
        Leaf(bias_name(of), f"{_MODULE}.{of}.bias", (axis,), Role.BIAS, of=of, sizes=sizes)
        for of, axis in (*inner, *[(OUT, "width")] * cfg.out_bias)
    )


def _stages(latent, qkv: Stage):
    """From the input of attention to the input of its last matrix."""
    used = (KV_NORM, *_expanding(latent))
    attend = Function("attend_latent", ("cache", "rows"), ("x", "cache"), used, latent)
    if latent.q_rank is None:
        return (replace(qkv, name="latent", groups=(one(Q), one(KV_A)), finish=attend),)
    queries = Function("query_latent", (), ("x", *OF_LATENT), (Q_NORM,), latent)
    attend = replace(attend, reads=(*attend.reads, *OF_LATENT))
    return (
        replace(qkv, name="latent", groups=(one(Q_A), one(KV_A)), finish=queries),
        Stage("queries", (one(Q_B),), finish=attend, drops=OF_LATENT),
    )
