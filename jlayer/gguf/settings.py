"""A model's config as the metadata of a GGUF file: the inverse of `config`.

What GGUF cannot say is found by reading the metadata back: a config that comes out as another one
is refused by the name of what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from jlayer.errors import UnsupportedModelError
from jlayer.families.fields import Fields
from jlayer.families.layout import GAINS, LAYOUT_KEY, PAIRS, as_laid_out
from jlayer.gguf.config import ARCHITECTURES
from jlayer.gguf.names import name_in_file
from jlayer.parts import Attention, Rope
from jlayer.spec import ModelConfig


def _nothing_more(cfg: ModelConfig) -> dict:
    return {}


def _experts(cfg):
    return {
        "expert_count": cfg.experts.router.n_experts,
        "expert_used_count": cfg.experts.router.n_chosen,
    }


def _experts_of_a_width(cfg):
    return {**_experts(cfg), "expert_feed_forward_length": cfg.experts.width}


def _glm4moe(cfg):
    router, shared = cfg.experts.router, cfg.experts.shared
    return {
        **_experts_of_a_width(cfg),
        "expert_shared_count": shared.width // cfg.experts.width if shared else 0,
        "expert_group_count": router.n_groups,
        "expert_group_used_count": router.n_chosen_groups,
        "expert_gating_func": 2,  # sigmoid
        "expert_weights_scale": float(router.scale),
        "expert_weights_norm": router.renormalizes,
        "leading_dense_block_count": cfg.experts.layers.count(False),
    }


def _window_of(cfg):
    return {"attention.sliding_window": next(filter(None, (a.window for a in cfg.attentions)), 0)}


def _gpt_oss(cfg):
    return {**_experts_of_a_width(cfg), **_window_of(cfg)}


def _gemma2(cfg):
    return {
        **_window_of(cfg),
        "attn_logit_softcapping": float(cfg.attention.cap or 0),
        "final_logit_softcapping": float(cfg.logits.cap or 0),
    }


def _gemma3(cfg):
    sliding = next((one for one in cfg.attentions if one.window), cfg.attention)
    return {**_window_of(cfg), "rope.freq_base_swa": float(sliding.rope.theta)}


@dataclass(frozen=True)
class Row:
    """How a model type is written: its architecture, the model type that is read back, and the
    settings that are its own. `slides`: some of its layers have a window."""

    architecture: str
    read_as: str
    more: Callable[[ModelConfig], dict] = _nothing_more
    slides: bool = False


# A new model type is a row here; its names are in `names`, and what is changed in its values in
# `config`.
ROWS = {
    "llama": Row("llama", "llama"),
    "mistral": Row("llama", "llama"),
    "mixtral": Row("llama", "mixtral", _experts),
    "qwen2": Row("qwen2", "qwen2"),
    "qwen3": Row("qwen3", "qwen3"),
    "qwen3_moe": Row("qwen3moe", "qwen3_moe", _experts_of_a_width),
    "glm4_moe": Row("glm4moe", "glm4_moe", _glm4moe),
    "gpt_oss": Row("gpt-oss", "gpt_oss", _gpt_oss, slides=True),
    "gemma": Row("gemma", "gemma"),
    "gemma2": Row("gemma2", "gemma2", _gemma2, slides=True),
    "gemma3_text": Row("gemma3", "gemma3_text", _gemma3, slides=True),
}


def row_of(cfg: ModelConfig, *, where: str) -> Row:
    """The row of a model. Raises UnsupportedModelError where it has none."""
    row = ROWS.get(cfg.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"{where}: a {cfg.model_type} cannot be exported to GGUF; supported: {', '.join(ROWS)}"
        )
    return row


def file_name(cfg: ModelConfig, tensor: str, *, where: str) -> str:
    """The name in a file of a published tensor. Raises UnsupportedModelError where a file has
    none."""
    found = name_in_file(ROWS[cfg.model_type].read_as, tensor)
    if found is None:
        raise UnsupportedModelError(
            f"{where}: a {cfg.model_type} of this form cannot be exported to GGUF, which has no "
            f"tensor like its {tensor}"
        )
    return found


def heads_of(cfg: ModelConfig, tensor: str) -> int:
    """The heads whose rows of a published tensor are to be reordered; 0: none are. A model that was
    converted from GGUF has them in that order already."""
    if PAIRS not in _layout(cfg) or cfg.attention.rope.interleaved:
        return 0
    module = tensor.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": cfg.attention.n_heads, "k_proj": cfg.attention.n_kv_heads}
    return heads.get(module, 0)


def adds_one(cfg: ModelConfig, tensor: str) -> bool:
    """Whether 1 is to be added to a published tensor, since a file has gains as a whole. A model
    that was converted from GGUF has them so already."""
    return GAINS in _layout(cfg) and cfg.norm.plus_one and tensor.endswith("norm.weight")


def _layout(cfg):
    return ARCHITECTURES[ROWS[cfg.model_type].architecture].layout


def settings_of(cfg: ModelConfig, *, where: str) -> dict[str, object]:
    """The metadata of a model, without those of its tokenizer. Raises UnsupportedModelError."""
    row = row_of(cfg, where=where)
    how = next((one for one in cfg.attentions if one.window is None), cfg.attention)
    if not row.slides and any(one.window is not None for one in cfg.attentions):
        raise UnsupportedModelError(
            f"{where}: a {cfg.model_type} with a window of {_window(cfg)} tokens cannot be "
            f"exported to GGUF, in which a {row.architecture} has none"
        )
    own = {
        "context_length": cfg.max_position_embeddings,
        "embedding_length": cfg.hidden_size,
        "block_count": cfg.num_hidden_layers,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": how.n_heads,
        "attention.head_count_kv": how.n_kv_heads,
        "attention.key_length": how.head_dim,
        "attention.value_length": how.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm.eps,
        "rope.freq_base": float(how.rope.theta),
        "rope.dimension_count": int(how.head_dim * how.rope.partial),
        "vocab_size": cfg.vocab_size,
        **_scaling(how.rope, where),
        **row.more(cfg),
    }
    start = {"general.architecture": row.architecture, "general.quantization_version": 2}
    return {**start, **{f"{row.architecture}.{key}": value for key, value in own.items()}}


def factors_of(cfg: ModelConfig) -> tuple[float, ...] | None:
    """The divisors of the frequencies, which are a tensor of a file; None: there are
    none."""
    how = cfg.attention
    if how.rope.type == "longrope":
        return how.rope.long_factor
    if how.rope.type != "llama3":
        return None
    return tuple(_llama3_factor(how.rope, 2 * n / how.head_dim) for n in range(how.head_dim // 2))


def refuse_differences(cfg: ModelConfig, read: ModelConfig, *, where: str) -> None:
    """Raises UnsupportedModelError where the config `read` of the written metadata, without the
    tensor of `factors_of`, says anything else than `cfg`."""
    laid_out = as_laid_out(Fields({LAYOUT_KEY: dict(_layout(cfg))}, where), cfg)
    expected = replace(
        laid_out,
        model_type=ROWS[cfg.model_type].read_as,
        dtype=read.dtype,
        quantized=None,
        n_further=0,  # layers that guess further tokens are in no converted folder
        attentions=tuple(map(_as_read, laid_out.attentions)),
    )
    differing = [
        field.name
        for field in fields(ModelConfig)
        if getattr(expected, field.name) != getattr(read, field.name)
    ]
    if differing:
        raise UnsupportedModelError(
            f"{where}: a {cfg.model_type} of this form cannot be exported to GGUF, which has no "
            f"place for its {', '.join(differing)}"
        )


def _as_read(one: Attention) -> Attention:
    rope = one.rope
    if rope.type in ("llama3", "longrope"):  # said by `factors_of` alone
        rope = Rope(rope.theta, interleaved=rope.interleaved)
    return replace(one, rope=rope)


def _window(cfg):
    return next(one.window for one in cfg.attentions if one.window is not None)


def _scaling(rope, where):
    if rope.type in ("default", "llama3") or _is_of_factors(rope):
        return {}
    if rope.type not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{where}: a rotary embedding of type {rope.type} cannot be exported to GGUF; "
            "supported: default, linear, llama3, yarn"
        )
    found = {"rope.scaling.type": rope.type, "rope.scaling.factor": float(rope.factor)}
    if rope.type == "yarn":
        found["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        found["rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        found["rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
    return found


def _is_of_factors(rope):
    """Whether a LongRoPE is what is read of such divisors: the same for short and long texts."""
    return rope.type == "longrope" and (
        rope.short_factor == rope.long_factor and rope.factor == rope.attention_factor == 1.0
    )


def _llama3_factor(rope, exponent):
    """What a frequency is divided by (Llama 3.1, as in Transformers' rope utilities): waves that
    are long beside the original context by `factor`, short ones by 1, those between by a mix."""
    wave = 2 * math.pi * rope.theta**exponent
    original = rope.original_max_position_embeddings
    if wave < original / rope.high_freq_factor:
        return 1.0
    if wave > original / rope.low_freq_factor:
        return rope.factor
    span = rope.high_freq_factor - rope.low_freq_factor
    mix = (original / wave - rope.low_freq_factor) / span
    return 1 / ((1 - mix) / rope.factor + mix)
