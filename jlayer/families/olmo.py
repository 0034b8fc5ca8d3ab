"""OLMo, and EXAONE 4: norms without weights, or after the branches instead of before them."""

from __future__ import annotations

from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.base import Family
from jlayer.families.common import (
    FULL,
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
from jlayer.families.fields import Fields
from jlayer.families.rope import by_type, read_rope
from jlayer.parts import Norm, Places
from jlayer.spec import ModelConfig

_AFTER = Places(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _bias(fields):
    bias = fields.boolean("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _olmo(fields: Fields) -> ModelConfig:
    """Layer norms without weight or bias; what is projected may be cut."""
    sizes = read_sizes(fields)
    rope = read_rope(fields, longest=sizes.longest)
    how = attention(sizes, rope, clip=fields.positive_or_none("clip_qkv"))
    norm = Norm(eps=1e-5, kind="layer", has_weight=False)
    return config(fields, sizes, [how], norm=norm, **_bias(fields))


def _olmo2(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields)
    norm = rms_norm(fields, eps=1e-5, rounds_first=False)
    rope = read_rope(fields, longest=sizes.longest)
    how = attention(sizes, rope, head_norms=head_norms(norm, over="flat"))
    return config(fields, sizes, [how], norm=norm, places=_AFTER, **_bias(fields))


def _olmo3(fields: Fields) -> ModelConfig:
    """Three layers with a window to a full one, which alone has a scaled rotary embedding."""
    sizes = read_sizes(fields)
    types = layer_types(fields, default=every(fields.integer("num_hidden_layers"), 4))
    norm = rms_norm(fields, eps=1e-5, rounds_first=False)
    plain = attention(sizes, None, head_norms=head_norms(norm, over="flat"))
    fields = by_type(fields, full=5e5, sliding=5e5)
    kinds = [
        replace(one, rope=read_rope(fields, longest=sizes.longest, layer_type=one.name))
        for one in forms(plain, window(fields, default=4096))
    ]
    return config(
        fields, sizes, kinds, layer_types=types, norm=norm, places=_AFTER, **_bias(fields)
    )


def _exaone4(fields: Fields) -> ModelConfig:
    """Full layers have no rotary embedding, if there are others."""
    sizes = read_sizes(fields, kv_heads=32)
    width = window(fields, default=4096)
    n_layers = fields.integer("num_hidden_layers")
    if width is None and not fields.has("layer_types"):
        raise CheckpointError(
            f"{fields.where}: sliding_window is null and layer_types is missing; transformers "
            "cannot tell the types of the layers then (full_attention for each, if all attend to "
            "all tokens)"
        )
    default = [FULL] * n_layers
    if not fields.has("layer_types"):
        default = every(n_layers, fields.integer("sliding_window_pattern", default=4))
    types = layer_types(fields, default=default)
    norm = rms_norm(fields, eps=1e-5)
    rope = read_rope(fields, longest=sizes.longest)
    full, sliding = forms(attention(sizes, rope, head_norms=head_norms(norm)), width)
    full = replace(full, rope=rope if width is None else None)
    return config(fields, sizes, [full, sliding], layer_types=types, norm=norm, places=_AFTER)


FAMILIES = (
    Family("olmo", "OlmoForCausalLM", _olmo, decoder_kinds, has_windows=False),
    Family("olmo2", "Olmo2ForCausalLM", _olmo2, decoder_kinds, has_windows=False),
    Family("olmo3", "Olmo3ForCausalLM", _olmo3, decoder_kinds),
    Family("exaone4", "Exaone4ForCausalLM", _exaone4, decoder_kinds),
)
