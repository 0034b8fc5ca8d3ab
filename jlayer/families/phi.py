"""Phi 3 and 4: fused matrices, heads that are turned in part, and LongRoPE."""

from __future__ import annotations

from jlayer.families.base import Family
from jlayer.families.common import attention, config, read_sizes, rms_norm, window
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.rope import read_rope
from jlayer.parts import Mlp
from jlayer.spec import ModelConfig


def _phi3(fields: Fields) -> ModelConfig:
    """What older files call "su" or "yarn" is LongRoPE."""
    sizes = read_sizes(fields, longest=4096)
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    said = dict(fields.section(name).raw)
    if said.get("rope_type", said.get("type")) in ("su", "yarn"):
        fields = fields.changed({name: {**said, "rope_type": "longrope"}})
    if "original_max_position_embeddings" not in fields.raw:
        fields = fields.changed({"original_max_position_embeddings": 4096})
    types = ("default", "longrope")
    rope = read_rope(fields, longest=sizes.longest, partial=1.0, types=types)
    return config(
        fields,
        sizes,
        [attention(sizes, rope, window=window(fields))],
        norm=rms_norm(fields, eps=1e-5),
        mlp=Mlp("fused", up="gate_up_proj"),
        qkv_is_fused=True,
    )


FAMILIES = (Family("phi3", "Phi3ForCausalLM", _phi3, decoder_kinds),)
