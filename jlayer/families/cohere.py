"""Cohere: attention and MLP side by side, layer norms without bias, a factor of the logits."""

from __future__ import annotations

from dataclasses import replace

from jlayer.families.base import Family
from jlayer.families.common import (
    attention,
    config,
    every,
    forms,
    head_norms,
    layer_types,
    read_sizes,
    window,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.rope import read_rope
from jlayer.parts import Logits, Norm, Places
from jlayer.spec import ModelConfig


def _common(fields):
    bias = fields.boolean("attention_bias")
    return {
        "tied": True,
        "norm": _norm(fields),
        "places": Places(before_mlp=None),
        "is_parallel": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "logits": Logits(scale=fields.positive("logit_scale", default=0.0625)),
    }


def _norm(fields):
    return Norm(fields.positive("layer_norm_eps", default=1e-5), kind="layer", rounds_first=False)


def _cohere(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, longest=8192)
    rope = read_rope(fields, longest=sizes.longest, theta=5e5, interleaved=True)
    norms = head_norms(_norm(fields), over="each") if fields.boolean("use_qk_norm") else None
    return config(fields, sizes, [attention(sizes, rope, head_norms=norms)], **_common(fields))


def _cohere2(fields: Fields) -> ModelConfig:
    """Three layers with a window to a full one, which has no rotary embedding."""
    sizes = read_sizes(fields, longest=8192)
    period = fields.integer("sliding_window_pattern", default=4)
    types = layer_types(fields, default=every(fields.integer("num_hidden_layers"), period))
    rope = read_rope(fields, longest=sizes.longest, interleaved=True)
    full, sliding = forms(attention(sizes, rope), window(fields, default=4096))
    kinds = [replace(full, rope=None), sliding]
    return config(fields, sizes, kinds, layer_types=types, **_common(fields))


FAMILIES = (
    Family("cohere", "CohereForCausalLM", _cohere, decoder_kinds, has_windows=False),
    Family("cohere2", "Cohere2ForCausalLM", _cohere2, decoder_kinds),
)
