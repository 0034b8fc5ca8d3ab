"""The text of Llama 4: attention in chunks, layers without rotary embedding whose queries grow, and
experts whose weights multiply what goes into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.base import Family
from jlayer.families.common import (
    CHUNKED,
    FULL,
    OTHER_PARTS,
    attention,
    config,
    head_norms,
    layer_types,
    read_sizes,
    rms_norm,
    window,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import LIMITS, Fields, as_integer
from jlayer.families.mixtures import read_router, with_experts
from jlayer.families.rope import read_rope
from jlayer.parts import Experts, Growth, Mlp, Shared, Stack
from jlayer.spec import ModelConfig

_MODULE = "feed_forward"
# Both inner matrices of an expert are one, the gate's columns first.
_EXPERT = Mlp("fused", up="gate_up_proj", module=f"{_MODULE}.experts.{{expert}}")
_STACKS = tuple(
    Stack(f"{_MODULE}.experts.{name}", (name,), is_only=True, inputs_first=True)
    for name in ("gate_up_proj", "down_proj")
)
_SCALINGS = ("default", "linear", "llama3", "yarn")
_WITHOUT_ROPE = "{} without rope"


def _llama4(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=8, head_dim=128, longest=131072)
    norm, turned = rms_norm(fields, eps=1e-5), _turned(fields)
    chunk = window(fields, "attention_chunk_size", default=8192)
    usual = [CHUNKED if is_turned and chunk else FULL for is_turned in turned]
    types = layer_types(fields, (FULL, CHUNKED), default=usual)
    if CHUNKED in types and chunk is None:
        raise CheckpointError(
            f"{fields.where}: layer_types has {CHUNKED}, but attention_chunk_size is null; "
            "expected the number of tokens of a chunk"
        )
    form = {"longest": sizes.longest, "theta": 5e5, "types": _SCALINGS, "interleaved": True}
    unit = head_norms(replace(norm, has_weight=False), after_rope=True)
    norms = unit if fields.boolean("use_qk_norm", default=True) else None
    forms = {
        "{}": attention(sizes, read_rope(fields, **form), head_norms=norms),
        _WITHOUT_ROPE: attention(sizes, None, grows=_growth(fields)),
    }
    kinds = [
        replace(how, name=name.format(kind), window=width, in_chunks=width is not None)
        for name, how in forms.items()
        for kind, width in ((FULL, None), (CHUNKED, chunk))
    ]
    names = [
        kind if is_turned else _WITHOUT_ROPE.format(kind)
        for kind, is_turned in zip(types, turned, strict=True)
    ]
    bias = fields.boolean("attention_bias")
    # The width of layers without experts has a name of its own.
    dense = fields.integer(
        "intermediate_size_mlp", default=16384, limit=LIMITS["intermediate_size"]
    )
    cfg = config(
        fields.changed({"intermediate_size": dense}),
        sizes,
        kinds,
        layer_types=names,
        norm=norm,
        mlp=Mlp(module=_MODULE),
        qkv_bias=bias,
        out_bias=bias,
    )
    return with_experts(cfg, _experts(fields))


def _turned(fields) -> Sequence[int]:
    """Of each layer whether it has a rotary embedding: `no_rope_layers` has a 1 for it. An empty
    list is none."""
    n_layers, found = fields.integer("num_hidden_layers"), fields.raw.get("no_rope_layers")
    if not found:
        period = fields.integer("no_rope_layer_interval", default=4)
        return [int((n + 1) % period != 0) for n in range(n_layers)]
    if not isinstance(found, list) or len(found) != n_layers or not set(found) <= {0, 1}:
        raise CheckpointError(
            f"{fields.where}: no_rope_layers is {found!a:.80}, expected a 0 or 1 for each layer"
        )
    return found


def _growth(fields):
    name = "attn_temperature_tuning"
    # The first published files have a 4 there, which meant no more than true.
    fields = fields.changed({name: True}) if as_integer(fields.raw.get(name)) == 4 else fields
    if not fields.boolean(name, default=True):
        return None
    beta = fields.positive("attn_scale", default=0.1)
    return Growth(beta, fields.integer("floor_scale", default=8192), after=1)


def _experts(fields) -> Experts:
    router = read_router(
        fields,
        n_experts=16,
        n_chosen=1,
        counts=("num_local_experts",),
        scores="sigmoid",
        by_logits=True,
        weighs_inputs=True,
    )
    width = fields.integer("intermediate_size", default=8192)
    return Experts(
        router,
        width,
        _EXPERT,
        f"{_MODULE}.router.weight",
        shared=Shared(width, Mlp(module=f"{_MODULE}.shared_expert")),
        layers=_sparse_layers(fields),
        stacks=_STACKS,
    )


def _sparse_layers(fields):
    """Of each layer whether it has experts: those in `moe_layers`, else each last one of
    `interleave_moe_layer_step`; () where all have."""
    n_layers, said = fields.integer("num_hidden_layers"), fields.raw.get("moe_layers")
    step = fields.integer("interleave_moe_layer_step", default=1)
    said = range(step - 1, n_layers, step) if said is None else said
    if not isinstance(said, (list, range)) or not all(type(n) is int for n in said):
        raise CheckpointError(
            f"{fields.where}: moe_layers is {said!a:.80}, expected a list of numbers"
        )
    found = tuple(n in said for n in range(n_layers))
    return () if all(found) else found


FAMILIES = (
    Family(
        *("llama4_text", "Llama4ForCausalLM", _llama4, decoder_kinds),
        left_out=OTHER_PARTS,
    ),
)
