"""Families with layer norms that have a bias: StarCoder 2, StableLM, Nemotron."""

from __future__ import annotations

from jlayer.families.base import Family
from jlayer.families.common import attention, config, head_norms, read_sizes, window
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.rope import read_rope
from jlayer.parts import Mlp, Norm, Places
from jlayer.spec import ModelConfig


def _norm(fields, key, **form):
    eps = fields.positive(key, default=1e-5)
    return Norm(eps, **{"kind": "layer", "rounds_first": False, "has_bias": True, **form})


def _starcoder2(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=2, longest=4096)
    rope = read_rope(fields, longest=sizes.longest)
    bias = fields.boolean("use_bias", default=True)
    return config(
        fields,
        sizes,
        [attention(sizes, rope, window=window(fields))],
        tied=True,
        activation="gelu_pytorch_tanh",
        norm=_norm(fields, "norm_epsilon"),
        mlp=Mlp("plain", up="c_fc", down="c_proj"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def _stablelm(fields: Fields) -> ModelConfig:
    """A norm for each head, in a leaf of its own; attention and MLP may be side by side."""
    sizes = read_sizes(fields, kv_heads=32, longest=4096)
    sizes.check_shared_out(fields)
    rope = read_rope(fields, longest=sizes.longest, partial=0.25)
    norm = _norm(fields, "layer_norm_eps")
    norms = None
    if fields.boolean("qk_layernorm"):
        norms = head_norms(
            Norm(norm.eps, kind="layer", rounds_first=False),
            q=tuple(f"q_layernorm.norms.{n}" for n in range(sizes.heads)),
            k=tuple(f"k_layernorm.norms.{n}" for n in range(sizes.kv_heads)),
            over="each",
        )
    parallel = fields.boolean("use_parallel_residual")
    return config(
        fields,
        sizes,
        [attention(sizes, rope, head_norms=norms)],
        norm=norm,
        places=Places(before_mlp=None) if parallel else Places(),
        is_parallel=parallel,
        qkv_bias=fields.boolean("use_qkv_bias"),
    )


def _nemotron(fields: Fields) -> ModelConfig:
    """Gains of 1 + weight; an MLP without a gate: relu squared."""
    fields.integer("num_key_value_heads")  # transformers has no default that runs
    sizes = read_sizes(fields, longest=4096)
    rope = read_rope(fields, longest=sizes.longest, partial=0.5)
    bias = fields.boolean("attention_bias")
    return config(
        fields,
        sizes,
        [attention(sizes, rope)],
        activation="relu2",
        norm=_norm(fields, "norm_eps", plus_one=True),
        mlp=Mlp("plain"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


FAMILIES = (
    Family("starcoder2", "Starcoder2ForCausalLM", _starcoder2, decoder_kinds),
    Family("stablelm", "StableLmForCausalLM", _stablelm, decoder_kinds, has_windows=False),
    Family("nemotron", "NemotronForCausalLM", _nemotron, decoder_kinds, has_windows=False),
)
