"""Gemma: gains of 1 + weight, norms around both branches, and a scaled embedding as the head."""

from __future__ import annotations

import math
from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.base import Family
from jlayer.families.common import (
    FULL,
    OTHER_PARTS,
    SLIDING,
    attention,
    config,
    every,
    forms,
    head_norms,
    layer_types,
    read_sizes,
    rms_norm,
    window,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import LIMITS, Fields
from jlayer.families.mixtures import read_router, with_experts
from jlayer.families.rope import by_type, read_rope
from jlayer.parts import Beside, Experts, Logits, Mlp, Places, Scale, Shared, Stack
from jlayer.spec import ModelConfig

_FOUR_NORMS = Places(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _common(fields, *, key, **switches):
    """What all have in common. `key`: of the activation."""
    bias = fields.boolean("attention_bias")
    return {
        "tied": True,
        "activation": "gelu_pytorch_tanh",
        "activation_key": key,
        "qkv_bias": bias,
        "out_bias": bias,
        "embedding_scale": Scale(
            math.sqrt(fields.integer("hidden_size")), is_rounded=True, is_of_table=True
        ),
        **switches,
    }


def _norm(fields, **form):
    return rms_norm(fields, **{"plus_one": True, "rounds_first": False, **form})


def _gemma(fields: Fields) -> ModelConfig:
    """Its releases say "gelu" and mean the approximation by tanh, as transformers knows."""
    sizes = read_sizes(fields, kv_heads=16, head_dim=256, longest=8192)
    if fields.raw.get("hidden_act") == "gelu":
        fields = fields.changed({"hidden_act": "gelu_pytorch_tanh"})
    how = attention(sizes, read_rope(fields, longest=sizes.longest))
    common = _common(fields, key="hidden_act", norm=_norm(fields))
    return config(fields, sizes, [how], **common)


def _gemma2(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=4, head_dim=256, longest=8192)
    types = layer_types(fields, default=every(fields.integer("num_hidden_layers"), 2))
    full = attention(
        sizes,
        read_rope(fields, longest=sizes.longest),
        scale=fields.positive("query_pre_attn_scalar", default=256.0) ** -0.5,
        cap=fields.positive_or_none("attn_logit_softcapping", default=50.0),
    )
    return config(
        fields,
        sizes,
        forms(full, window(fields, default=4096)),
        layer_types=types,
        logits=Logits(cap=fields.positive_or_none("final_logit_softcapping", default=30.0)),
        places=_FOUR_NORMS,
        **_common(fields, key="hidden_activation", norm=_norm(fields)),
    )


def _gemma3(fields: Fields) -> ModelConfig:
    """Five layers with a window, whose rotary embedding has a base of its own, to a full one. Its
    first files leave out even sizes."""
    fields = fields.filled({"vocab_size": 262_208, "num_attention_heads": 8})
    sizes = read_sizes(fields, kv_heads=4, head_dim=256, longest=131072)
    period = fields.integer("sliding_window_pattern", default=6)
    types = layer_types(fields, default=every(fields.integer("num_hidden_layers"), period))
    norm = _norm(fields)
    fields = by_type(fields, full=1e6, sliding=1e4, sliding_key="rope_local_base_freq")
    full, sliding = forms(
        attention(
            sizes,
            None,
            scale=fields.positive("query_pre_attn_scalar", default=256.0) ** -0.5,
            head_norms=head_norms(norm),  # a cap of scores is set, but transformers uses none
        ),
        window(fields, default=4096),
    )
    return _of_two_types(fields, sizes, (full, sliding), layer_types=types, norm=norm)


def _of_two_types(fields, sizes, kinds, *, norm, **switches):
    """A config whose types of layers have rotary embeddings of their own."""
    turned = [
        replace(one, rope=read_rope(fields, longest=sizes.longest, layer_type=one.name))
        for one in kinds
    ]
    return config(
        fields,
        sizes,
        turned,
        logits=Logits(cap=fields.positive_or_none("final_logit_softcapping")),
        places=_FOUR_NORMS,
        **_common(fields, key="hidden_activation", norm=norm, **switches),
    )


_GEMMA4_ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
# Keys of other families, which transformers does not read of a gemma 4.
_UNREAD = ("rope_theta", "partial_rotary_factor")
# What makes another model of a gemma 4: embeddings for each layer, shared caches.
_PLAIN = {
    "hidden_size_per_layer_input": (None, 0),
    "num_kv_shared_layers": (None, 0),
    "use_double_wide_mlp": (None, False),
}


def _own_sizes(fields, sizes, types, *, shared):
    """(the fields without what is read here, the sizes of full layers): from `per_layer_config`, as
    transformers saves them, or from keys of their own, as they are published."""
    written = fields.section("per_layer_config").raw
    if not written:
        key = "num_global_key_value_heads"
        own_heads = fields.integer(key, default=sizes.kv_heads, null_is_absent=True)
        head_dim = fields.integer("global_head_dim", default=512, limit=LIMITS["head_dim"])
        heads = own_heads if shared else sizes.kv_heads
        return fields, replace(sizes, head_dim=head_dim, kv_heads=heads)
    full = [number for number, name in enumerate(types) if name == FULL]
    one = next(iter(written.values()))
    if sorted(map(str, written)) != sorted(f"{n:0{len(max(written))}}" for n in full) or any(
        other != one for other in written.values()
    ):
        return fields, sizes  # refused as layers of their own
    said = Fields(one, f"{fields.where}: per_layer_config")
    for name in set(one) - {"head_dim", "num_key_value_heads"}:
        said.refuse_unless(name, None)
    return fields.changed({}, without=["per_layer_config"]), replace(
        sizes,
        head_dim=said.integer("head_dim", default=sizes.head_dim),
        kv_heads=said.integer("num_key_value_heads", default=sizes.kv_heads),
    )


def _gemma4(fields: Fields) -> ModelConfig:
    """Full layers have larger heads, fewer of keys, and values that are the keys' own product."""
    fields = fields.filled({"vocab_size": 262_144, "num_attention_heads": 8})
    for name, values in _PLAIN.items():
        fields.refuse_unless(name, *values)
    if "hidden_size_per_layer_input" not in fields.raw:
        Fields({"hidden_size_per_layer_input": 256}, fields.where).refuse_unless(
            "hidden_size_per_layer_input", None, 0
        )
    sizes = read_sizes(fields, kv_heads=4, head_dim=256, longest=131072)
    types = layer_types(fields, default=every(fields.integer("num_hidden_layers"), 6))
    types = (*types[:-1], FULL)  # as transformers has it, whatever the file says
    norm = _norm(fields, plus_one=False)
    fields.refuse_unless("rope_scaling", None)
    ropes = fields.section("rope_parameters").raw or _GEMMA4_ROPES
    if not {FULL, SLIDING} <= set(ropes):
        raise CheckpointError(
            f"{fields.where}: rope_parameters has {', '.join(map(ascii, ropes))}, expected {FULL} "
            f"and {SLIDING}"
        )
    fields = fields.changed({"rope_parameters": ropes}, without=_UNREAD)
    shared = fields.boolean("attention_k_eq_v")
    fields, own = _own_sizes(fields, sizes, types, shared=shared)
    switches = {
        "scale": 1.0,
        "head_norms": head_norms(norm),
        "value_norm": replace(norm, has_weight=False),
    }
    width = fields.integer("sliding_window", default=512)
    sliding = attention(sizes, None, name=SLIDING, window=width, **switches)
    full = attention(own, None, name=FULL, keys_are_values=shared, **switches)
    cfg = _of_two_types(
        fields, sizes, (full, sliding), layer_types=types, norm=norm, layer_scalar=True
    )
    return _beside(fields, cfg) if fields.boolean("enable_moe_block") else cfg


def _beside(fields, cfg):
    """A dense gemma 4 with experts beside its MLPs."""
    router = read_router(
        fields,
        n_experts=None,
        n_chosen=None,
        counts=("num_experts",),
        chosen=("top_k_experts",),
        renormalizes=True,
        norm=replace(cfg.norm, has_weight=False),
        input_scale=cfg.hidden_size**-0.5,
    )
    experts = Experts(
        router,
        fields.integer("moe_intermediate_size"),
        Mlp(module="experts.{expert}"),
        "router.proj.weight",
        shared=Shared(cfg.intermediate_size, Mlp()),
        stacks=(
            Stack("experts.gate_up_proj", ("gate_proj", "up_proj"), is_only=True),
            Stack("experts.down_proj", ("down_proj",), is_only=True),
        ),
        beside=Beside(
            before="pre_feedforward_layernorm_2",
            after="post_feedforward_layernorm_2",
            after_shared="post_feedforward_layernorm_1",
            of_input="router.scale",
            of_weights="router.per_expert_scale",
        ),
    )
    return with_experts(cfg, experts)


FAMILIES = (
    Family("gemma", "GemmaForCausalLM", _gemma, decoder_kinds, has_windows=False),
    Family("gemma2", "Gemma2ForCausalLM", _gemma2, decoder_kinds),
    Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, decoder_kinds, left_out=OTHER_PARTS),
    Family("gemma4_text", "Gemma4ForCausalLM", _gemma4, decoder_kinds, left_out=OTHER_PARTS),
)
