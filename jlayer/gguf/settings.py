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
from jlayer.gguf.architectures import ARCHITECTURES, LAYER
from jlayer.gguf.mixtures import SIGMOID
from jlayer.gguf.names import FACTORS, LONG_FACTORS, SHORT_FACTORS, name_in_file
from jlayer.gguf.rope import ATTENTION_FACTOR, ORIGINAL, YARN_WEIGHT
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


def _minimax_m2(cfg):
    return {**_experts_of_a_width(cfg), "expert_gating_func": SIGMOID}


def _glm4moe(cfg):
    router = cfg.experts.router
    return {
        **_experts_of_a_width(cfg),
        **_shared_and_dense(cfg),
        "expert_group_count": router.n_groups,
        "expert_group_used_count": router.n_chosen_groups,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(router.scale),
        "expert_weights_norm": router.renormalizes,
    }


def _ernie4_5_moe(cfg):
    """Other periods are refused: llama.cpp opens no file with dense layers after the first."""
    own = _with_shared(cfg) if cfg.experts.shared else _experts_of_a_width(cfg)
    return {**own, **_shared_and_dense(cfg), "interleave_moe_layer_step": 1}


def _shared_and_dense(cfg):
    shared = cfg.experts.shared
    return {
        "expert_shared_count": shared.width // cfg.experts.width if shared else 0,
        "leading_dense_block_count": cfg.experts.layers.count(False),
    }


def _with_shared(cfg):
    return {
        **_experts_of_a_width(cfg),
        "expert_shared_feed_forward_length": cfg.experts.shared.width,
    }


def _granite(cfg):
    return {
        "attention.scale": float(cfg.attention.scale),
        "embedding_scale": float(cfg.embedding_scale.value),
        "residual_scale": float(cfg.residual_scale),
        "logit_scale": float(1 / cfg.logits.scale),
    }


def _granitemoe(cfg):
    return {**_experts(cfg), **_granite(cfg)}


def _cohere(cfg):
    return {"logit_scale": float(cfg.logits.scale)}


def _phi3(cfg):
    """The length of short texts, which all files have; of other models it is the longest."""
    return {**_window_of(cfg), ORIGINAL: _turned(cfg).switches_at or cfg.max_position_embeddings}


def _ministral3(cfg):
    """Another YaRN than one whose factor cancels out is another model when it is read back."""
    return {"attention.temperature_scale": float(cfg.attention.grows.beta), YARN_WEIGHT: 1.0}


def _stablelm(cfg):
    return {"use_parallel_residual": cfg.is_parallel}


def _olmo(cfg):
    return {"attention.clamp_kqv": float(cfg.attention.clip)} if cfg.attention.clip else {}


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


def _flags(cfg):
    """Of each layer whether it slides."""
    windows = {one.name: one.window for one in cfg.attentions}
    names = cfg.layer_types or (cfg.attention.name,) * cfg.num_hidden_layers
    return {"attention.sliding_window_pattern": tuple(bool(windows[name]) for name in names)}


def _olmo3(cfg):
    return {**_gemma3(cfg), **_flags(cfg)}


def _exaone4(cfg):
    slides = any(one.window for one in cfg.attentions)
    return {**_window_of(cfg), **_flags(cfg)} if slides else {}


def _cohere2(cfg):
    return {**_window_of(cfg), **_cohere(cfg)}


@dataclass(frozen=True)
class Row:
    """How a model type is written: its architecture, the model type that is read back, and the
    settings that are its own. `slides`: some of its layers have a window. `has_long_factors`: its
    files have the factors of LongRoPE."""

    architecture: str
    read_as: str
    more: Callable[[ModelConfig], dict] = _nothing_more
    slides: bool = False
    has_long_factors: bool = False


# A new model type is a row here; its names are in `names`, and what is changed in its values in
# `config`.
ROWS = {
    "llama": Row("llama", "llama"),
    "mistral": Row("llama", "llama"),
    "mixtral": Row("llama", "mixtral", _experts),
    "ministral3": Row("mistral3", "ministral3", _ministral3),
    "qwen2": Row("qwen2", "qwen2"),
    "qwen2_moe": Row("qwen2moe", "qwen2_moe", _with_shared),
    "qwen3": Row("qwen3", "qwen3"),
    "qwen3_moe": Row("qwen3moe", "qwen3_moe", _experts_of_a_width),
    "olmo": Row("olmo", "olmo", _olmo),
    "olmo2": Row("olmo2", "olmo2"),
    "olmo3": Row("olmo2", "olmo3", _olmo3, slides=True),
    "olmoe": Row("olmoe", "olmoe", _experts),
    "exaone4": Row("exaone4", "exaone4", _exaone4, slides=True),
    "smollm3": Row("smollm3", "smollm3"),
    "arcee": Row("arcee", "arcee"),
    "seed_oss": Row("seed_oss", "seed_oss"),
    "granite": Row("granite", "granite", _granite),
    "granitemoe": Row("granitemoe", "granitemoe", _granitemoe),
    "glm4": Row("glm4", "glm4"),
    "glm4_moe": Row("glm4moe", "glm4_moe", _glm4moe),
    "phi3": Row("phi3", "phi3", _phi3, slides=True, has_long_factors=True),
    "ernie4_5": Row("ernie4_5", "ernie4_5"),
    "ernie4_5_moe": Row("ernie4_5-moe", "ernie4_5_moe", _ernie4_5_moe),
    "hunyuan_v1_dense": Row("hunyuan-dense", "hunyuan_v1_dense"),
    "hunyuan_v1_moe": Row("hunyuan-moe", "hunyuan_v1_moe", _with_shared),
    "cohere": Row("command-r", "cohere", _cohere),
    "cohere2": Row("cohere2", "cohere2", _cohere2, slides=True),
    "minimax_m2": Row("minimax-m2", "minimax_m2", _minimax_m2),
    "starcoder2": Row("starcoder2", "starcoder2"),
    "stablelm": Row("stablelm", "stablelm", _stablelm),
    "nemotron": Row("nemotron", "nemotron"),
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
    if PAIRS not in _layout(cfg) or _turned(cfg).interleaved:
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
    rope, how = _turned(cfg), cfg.attention
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
        (ARCHITECTURES[row.architecture].eps or (LAYER,))[0]: cfg.norm.eps,
        "rope.freq_base": float(rope.theta),
        "rope.dimension_count": int(how.head_dim * rope.partial),
        "vocab_size": cfg.vocab_size,
        **_scaling(rope, row, where),
        **row.more(cfg),
    }
    start = {"general.architecture": row.architecture, "general.quantization_version": 2}
    return {**start, **{f"{row.architecture}.{key}": value for key, value in own.items()}}


def factors_of(cfg: ModelConfig) -> dict[str, tuple[float, ...]]:
    """The divisors of the frequencies, which are tensors of a file, by their names there."""
    rope, head_dim = _turned(cfg), cfg.attention.head_dim
    if rope.type == "llama3":
        numbers = tuple(_llama3_factor(rope, 2 * n / head_dim) for n in range(head_dim // 2))
        return {FACTORS: numbers}
    if rope.type != "longrope":
        return {}
    if _is_of_factors(rope):
        return {FACTORS: rope.long_factor}
    return {LONG_FACTORS: rope.long_factor, SHORT_FACTORS: rope.short_factor}


def settings_of_factors(cfg: ModelConfig) -> dict[str, object]:
    """The metadata beside the tensors of `factors_of`."""
    rope = _turned(cfg)
    if rope.type != "longrope" or _is_of_factors(rope):
        return {}
    start = ROWS[cfg.model_type].architecture
    return {f"{start}.{ATTENTION_FACTOR}": float(rope.attention_factor)}


def refuse_differences(cfg: ModelConfig, read: ModelConfig, *, where: str) -> None:
    """Raises UnsupportedModelError where the config `read` of the written metadata, without the
    tensors of `factors_of`, says anything else than `cfg`."""
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
    if rope is not None and rope.type in ("llama3", "longrope"):  # said by `factors_of` alone
        rope = Rope(rope.theta, partial=rope.partial, interleaved=rope.interleaved)
    return replace(one, rope=rope)


def _turned(cfg):
    """The rotary embedding, of layers without a window where they have one: it may be scaled."""
    found = [one for one in cfg.attentions if one.rope is not None]
    return min(found, key=lambda one: one.window is not None).rope


def _window(cfg):
    return next(one.window for one in cfg.attentions if one.window is not None)


def _scaling(rope, row, where):
    if rope.type in ("default", "llama3") or _is_of_factors(rope):
        return {}
    if rope.type == "longrope" and row.has_long_factors:
        return {}
    if rope.type not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{where}: a rotary embedding of type {rope.type} cannot be exported to GGUF; "
            "supported: default, linear, llama3, yarn"
        )
    found = {"rope.scaling.type": rope.type, "rope.scaling.factor": float(rope.factor)}
    if rope.type == "yarn":
        found[ORIGINAL] = rope.original_max_position_embeddings
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
