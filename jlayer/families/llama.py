"""Llama and the families that differ from it by a few switches, all with the same leaf names."""

from __future__ import annotations

from dataclasses import replace

from jlayer.errors import CheckpointError
from jlayer.families.base import Family
from jlayer.families.common import (
    FULL,
    OTHER_PARTS,
    SLIDING,
    attention,
    config,
    forms,
    head_norms,
    layer_types,
    read_sizes,
    rms_norm,
    window,
)
from jlayer.families.decoder import decoder_kinds
from jlayer.families.fields import Fields
from jlayer.families.rope import read_rope
from jlayer.parts import Growth, Logits, Mlp, Rope, Scale
from jlayer.spec import ModelConfig

# Computed tables that old checkpoints hold.
TABLES = (
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)(_cached)?)",
)


def _llama(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields)
    bias = fields.boolean("attention_bias")
    return config(
        fields,
        sizes,
        [attention(sizes, read_rope(fields, longest=sizes.longest))],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


def _mistral(fields: Fields) -> ModelConfig:
    """A window in all layers: where the key is absent, of the length that its first model had.
    With `layer_types` it is what transformers calls ministral."""
    if "layer_types" in fields.raw:
        return _ministral(fields)
    sizes = read_sizes(fields, kv_heads=8, longest=131072)
    how = attention(sizes, read_rope(fields, longest=sizes.longest))
    return config(fields, sizes, [replace(how, window=window(fields, default=4096))])


def _ministral(fields: Fields) -> ModelConfig:
    fields.integer("head_dim")  # transformers has no default that runs
    sizes = read_sizes(fields, kv_heads=8, longest=131072)
    width = window(fields, default=4096)
    n_layers = fields.integer("num_hidden_layers")
    types = layer_types(fields, default=[FULL if width is None else SLIDING] * n_layers)
    full = attention(sizes, read_rope(fields, longest=sizes.longest))
    return config(fields, sizes, forms(full, width), layer_types=types)


_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _ministral3(fields: Fields) -> ModelConfig:
    """Queries grow with their position, as in Llama 4."""
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields = fields.changed({"rope_parameters": _MINISTRAL3_ROPE})
    sizes = read_sizes(fields, kv_heads=8, head_dim=128, longest=262144)
    rope = read_rope(fields, longest=sizes.longest)
    said = fields.section("rope_scaling" if fields.has("rope_scaling") else "rope_parameters")
    beta = said.raw.get("llama_4_scaling_beta") and said.positive("llama_4_scaling_beta")
    grows = beta and Growth(beta, said.integer("original_max_position_embeddings"))
    how = attention(sizes, rope, window=window(fields), grows=grows)
    return config(fields, sizes, [how], norm=rms_norm(fields, eps=1e-5))


def _qwen(fields: Fields, *, head_dim: int | None = None, **of_heads) -> ModelConfig:
    """The layers from `max_window_layers` on have a window, if it is used at all."""
    sizes = read_sizes(fields, kv_heads=32, head_dim=head_dim, longest=32768)
    width = window(fields, default=4096)
    width = width if fields.boolean("use_sliding_window") else None
    n_layers = fields.integer("num_hidden_layers")
    first = fields.raw.get("max_window_layers", 28)
    slides = [width is not None and type(first) is int and n >= first for n in range(n_layers)]
    types = layer_types(fields, default=[SLIDING if yes else FULL for yes in slides])
    rope = read_rope(fields, longest=sizes.longest)
    full = attention(sizes, rope, **of_heads)
    switches = {"qkv_bias": True}
    if of_heads:
        bias = fields.boolean("attention_bias")
        switches = {"qkv_bias": bias, "out_bias": bias}
    return config(fields, sizes, forms(full, width), layer_types=types, **switches)


def _qwen3(fields: Fields) -> ModelConfig:
    return _qwen(fields, head_dim=128, head_norms=head_norms(rms_norm(fields)))


def _seed_oss(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=8, head_dim=128, longest=524288)
    return config(
        fields,
        sizes,
        [attention(sizes, read_rope(fields, longest=sizes.longest))],
        qkv_bias=fields.boolean("attention_bias", default=True),
        out_bias=fields.boolean("attention_out_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
    )


def _smollm3(fields: Fields) -> ModelConfig:
    """Layers without rotary embedding, where `no_rope_layers` has a 0."""
    sizes = read_sizes(fields, kv_heads=4, longest=32768)
    n_layers = fields.integer("num_hidden_layers")
    period = fields.integer("no_rope_layer_interval", default=4)
    turned = fields.raw.get("no_rope_layers")
    turned = [int((n + 1) % period != 0) for n in range(n_layers)] if turned is None else turned
    if not isinstance(turned, list) or len(turned) != n_layers or not set(turned) <= {0, 1}:
        raise CheckpointError(
            f"{fields.where}: no_rope_layers is {turned!a:.80}, expected a 0 or 1 for each layer"
        )
    width, is_used = window(fields), fields.boolean("use_sliding_window")
    slides = [SLIDING if is_used and width and not has_rope else FULL for has_rope in turned]
    types = layer_types(fields, default=slides)
    rope = read_rope(fields, longest=sizes.longest, theta=2e6)
    kinds = [
        replace(one, name=name, rope=rope if has_rope else None)
        for one in forms(attention(sizes, rope), width)
        for has_rope, name in ((1, one.name), (0, f"{one.name} without rope"))
    ]
    names = [
        name if has_rope else f"{name} without rope"
        for name, has_rope in zip(types, turned, strict=True)
    ]
    bias = fields.boolean("attention_bias")
    return config(
        fields,
        sizes,
        kinds,
        layer_types=names,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


def _arcee(fields: Fields) -> ModelConfig:
    """An MLP without a gate: relu squared."""
    sizes = read_sizes(fields, longest=4096)
    bias = fields.boolean("attention_bias")
    return config(
        fields,
        sizes,
        [attention(sizes, read_rope(fields, longest=sizes.longest))],
        activation="relu2",
        norm=rms_norm(fields, eps=1e-5),
        mlp=Mlp("plain"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


def granite(fields: Fields) -> ModelConfig:
    """Factors of the embedding, the scores, both branches, and the logits."""
    sizes = read_sizes(fields)
    rope = read_rope(fields, longest=sizes.longest)
    scale = fields.positive("attention_multiplier", default=1.0)
    bias = fields.boolean("attention_bias")
    return config(
        fields,
        sizes,
        [attention(sizes, rope, scale=scale)],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
        embedding_scale=Scale(fields.positive("embedding_multiplier", default=1.0)),
        residual_scale=fields.positive("residual_multiplier", default=1.0),
        logits=Logits(scale=1 / fields.positive("logits_scaling", default=1.0)),
    )


def _ernie(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, kv_heads=2, head_dim=128, longest=131072)
    rope = read_rope(fields, longest=sizes.longest, theta=5e5, interleaved=True)
    bias = fields.boolean("use_bias")
    return config(
        fields,
        sizes,
        [attention(sizes, rope)],
        tied=True,
        norm=rms_norm(fields, eps=1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def _helium(fields: Fields) -> ModelConfig:
    """The output's matrix is square, whatever the size of a head."""
    sizes = read_sizes(fields, kv_heads=20, head_dim=128, longest=4096)
    sizes.check_shared_out(fields)
    rope = read_rope(fields, longest=sizes.longest, theta=1e5, interleaved=True)
    return config(
        fields,
        sizes,
        [attention(sizes, rope)],
        norm=rms_norm(fields, eps=1e-8, rounds_first=False),
        qkv_bias=fields.boolean("attention_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
    )


def hunyuan(fields: Fields) -> ModelConfig:
    """Norms of queries and keys after the rotary embedding; `alpha` stretches its base (NTK)."""
    fields.integer("head_dim")  # transformers has no default that runs
    sizes = read_sizes(fields)
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    said = fields.section(name)
    alpha = said.positive_or_none("alpha") if said.raw else None
    if alpha and said.raw.get("rope_type", said.raw.get("type")) in ("dynamic", "ntk_alpha"):
        theta = said.raw.get("rope_theta", fields.raw.get("rope_theta", Rope.theta))
        stretched = theta * alpha ** (sizes.head_dim / (sizes.head_dim - 2))
        plain = {"rope_type": "default", "rope_theta": stretched}
        fields = fields.changed({name: plain})
    rope = read_rope(fields, longest=sizes.longest)
    norm = rms_norm(fields, eps=1e-5)
    names = {"q": ("query_layernorm",), "k": ("key_layernorm",), "after_rope": True}
    bias = fields.boolean("attention_bias")
    return config(
        fields,
        sizes,
        [attention(sizes, rope, head_norms=head_norms(norm, **names))],
        norm=norm,
        qkv_bias=bias,
        out_bias=bias,
    )


def _row(model_type, architecture, read, **more) -> Family:
    return Family(model_type, architecture, read, decoder_kinds, dropped=TABLES, **more)


LLAMA = _row("llama", "LlamaForCausalLM", _llama, has_windows=False)
FAMILIES = (
    LLAMA,
    _row("mistral", "MistralForCausalLM", _mistral, left_out=OTHER_PARTS),
    _row("ministral", "MinistralForCausalLM", _ministral, left_out=OTHER_PARTS),
    _row("ministral3", "Ministral3ForCausalLM", _ministral3, left_out=OTHER_PARTS),
    _row("qwen2", "Qwen2ForCausalLM", _qwen),
    _row("qwen3", "Qwen3ForCausalLM", _qwen3),
    _row("seed_oss", "SeedOssForCausalLM", _seed_oss, has_windows=False),
    _row("smollm3", "SmolLM3ForCausalLM", _smollm3),
    _row("arcee", "ArceeForCausalLM", _arcee, has_windows=False),
    _row("granite", "GraniteForCausalLM", granite, has_windows=False),
    _row("ernie4_5", "Ernie4_5ForCausalLM", _ernie, has_windows=False),
    _row("helium", "HeliumForCausalLM", _helium, has_windows=False),
    _row("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", hunyuan, has_windows=False),
)
