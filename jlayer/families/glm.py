"""GLM: half of each head is turned, pairs are neighbours, and the MLP's matrices are fused."""

from __future__ import annotations

from jlayer.families.base import Family
from jlayer.families.common import attention, config, read_sizes, rms_norm
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.rope import read_rope
from jlayer.parts import Mlp, Places
from jlayer.spec import ModelConfig


def _glm(fields: Fields, **switches) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=2, head_dim=128, longest=131072)
    rope = read_rope(fields, longest=sizes.longest, partial=0.5, interleaved=True)
    return config(
        fields,
        sizes,
        [attention(sizes, rope)],
        norm=rms_norm(fields, eps=1.5625e-7),
        mlp=Mlp("fused", up="gate_up_proj"),
        qkv_bias=fields.boolean("attention_bias", default=True),
        **switches,
    )


def _glm4(fields: Fields) -> ModelConfig:
    """Norms after the branches too."""
    places = Places(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    )
    return _glm(fields, places=places)


FAMILIES = (
    Family("glm", "GlmForCausalLM", _glm, decoder_kinds, has_windows=False),
    Family("glm4", "Glm4ForCausalLM", _glm4, decoder_kinds, has_windows=False),
)
