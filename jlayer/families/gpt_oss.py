"""gpt-oss: attention with sinks, and experts with biases, in MXFP4 or as plain numbers."""

from __future__ import annotations

import re
from dataclasses import replace

from jlayer.encodings.tables import MXFP4
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import Family, bias_name
from jlayer.families.common import (
    FULL,
    SLIDING,
    attention,
    config,
    every,
    forms,
    layer_types,
    read_sizes,
    rms_norm,
    window,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.mixtures import read_router, with_experts
from jlayer.families.rope import read_rope, rope_section
from jlayer.parts import Clamped, Experts, Mlp, Quantized, Stack
from jlayer.spec import ModelConfig

_MODULE = "mlp.experts"
_MATRICES = ("gate_up_proj", "down_proj")
# How the experts of a layer are published: matrices, and biases.
_STACKS = tuple(
    stack
    for name in _MATRICES
    for stack in (
        Stack(f"{_MODULE}.{name}", (name,), is_only=True, inputs_first=True),
        Stack(f"{_MODULE}.{name}_bias", (bias_name(name),), is_only=True),
    )
)
# The scaling of its rotary embedding where the file says nothing of one.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# What a quantization_config may say: its method, and which modules are not quantized.
_METHOD, _LEFT = "quant_method", "modules_to_not_convert"
# Patterns of modules that are no experts: a file that names others has experts in another form.
_NO_EXPERTS = re.compile(
    r"(model\.)?(layers\.(\*|[0-9]+)\.)?"
    r"(self_attn|mlp\.router|router|embed_tokens|lm_head|norm|input_layernorm"
    r"|post_attention_layernorm)(\..*)?"
)


def _read(fields: Fields) -> ModelConfig:
    """A layer slides where the next one does not. Its router is computed in the run's dtype, and
    `hidden_act` says nothing."""
    fields.refuse_unless("hidden_act", "silu")
    for name in ("experts_per_token", "initial_context_length"):
        fields.has(name)  # known: they stand in all files, and say nothing here
    sizes = read_sizes(fields, kv_heads=8, head_dim=64, longest=131072)
    if not rope_section(fields).raw:
        fields = fields.changed({"rope_parameters": _YARN})
    full = attention(
        sizes, read_rope(fields, longest=sizes.longest, theta=150000.0), has_sinks=True
    )
    n_layers = fields.integer("num_hidden_layers")
    bias = fields.boolean("attention_bias", default=True)
    cfg = config(
        fields,
        sizes,
        forms(full, window(fields, default=128)),
        layer_types=layer_types(fields, default=every(n_layers, 2, usual=SLIDING, last=FULL)),
        norm=rms_norm(fields, eps=1e-5, rounds_first=False),
        qkv_bias=bias,
        out_bias=bias,
    )
    how = Clamped(
        fields.positive("swiglu_alpha", default=1.702), fields.positive("swiglu_limit", default=7.0)
    )
    router = read_router(fields, n_experts=128, n_chosen=4, renormalizes=True, logit_bias=True)
    mlp = Mlp("interleaved", clamped=how, up="gate_up_proj", module=f"{_MODULE}.{{expert}}")
    experts = Experts(
        router,
        cfg.intermediate_size,
        mlp,
        "mlp.router.weight",
        stacks=_STACKS,
        has_biases=True,
    )
    return replace(with_experts(cfg, experts), quantized=_quantized(fields))


def _quantized(fields):
    """What is said of the experts; None: they are plain numbers, or lie in the folder as jlayer has
    converted them."""
    said = fields.section("quantization_config")
    if said.raw.get(_METHOD) != MXFP4.name:
        return None
    _check(said)
    for name in ("hidden_size", "intermediate_size"):
        if fields.integer(name) % MXFP4.group:
            raise CheckpointError(
                f"{fields.where}: {name} is {fields.integer(name)}, expected a multiple of "
                f"{MXFP4.group}, the inputs of a block of MXFP4"
            )
    return Quantized(MXFP4.name, MXFP4.name)


def _check(said):
    """Raises UnsupportedModelError unless exactly the experts are quantized."""
    unknown = sorted(said.raw.keys() - {_METHOD, _LEFT, "dequantize"})
    if unknown:
        raise UnsupportedModelError(
            f"{said.where}: {unknown[0]!a:.80} is not known of {MXFP4.name}; supported: "
            f"{_METHOD}, {_LEFT}"
        )
    said.refuse_unless("dequantize", False)
    left = said.raw.get(_LEFT) or []
    if not isinstance(left, list) or not all(isinstance(name, str) for name in left):
        raise CheckpointError(f"{said.where}: {_LEFT} is {left!a:.80}, expected a list of names")
    other = [name for name in left if not _NO_EXPERTS.fullmatch(name)]
    if other:
        raise UnsupportedModelError(
            f"{said.where}: {_LEFT} names {other[0]!a:.80}, supported: modules that are no experts"
        )


FAMILIES = (Family("gpt_oss", "GptOssForCausalLM", _read, decoder_kinds, quantized=(MXFP4.name,)),)
