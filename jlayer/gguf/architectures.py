"""The architectures of GGUF files that are known, by `general.architecture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jlayer.families.layout import GAINS, GATES, HEADS, PAIRS, RATES
from jlayer.gguf import delta, dense, latent, mixtures
from jlayer.gguf.metadata import Metadata
from jlayer.gguf.reader import Head

RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


@dataclass(frozen=True)
class Architecture:
    """How a model of `general.architecture` becomes a config. `config`: metadata -> the fields
    that are the family's own, `model_type` among them. `layout`: what is changed in the values.
    `eps`: the key of its norms' epsilon, and the family's name for it; None: no config has one.
    `by_file`: what else is changed, by what a file holds. `is_latent`: attention is over latents,
    and `config` tells of its heads."""

    config: Callable[[Metadata], dict]
    layout: Mapping[str, str] = field(default_factory=dict)
    eps: tuple[str, str] | None = (RMS, "rms_norm_eps")
    by_file: Callable[[Head], Mapping[str, str]] = lambda head: {}
    is_latent: bool = False


_INTERLEAVED = {PAIRS: "interleaved"}
_WITH_ONE = {GAINS: "whole"}
_APART = {GATES: "apart"}
_DELTA = {**_WITH_ONE, RATES: "whole"}
_TILED = {**_DELTA, HEADS: "tiled"}
# A new architecture is a row here, and its names in `names`.
ARCHITECTURES = {
    "llama": Architecture(mixtures.llama_or_mixtral, _INTERLEAVED),
    "mistral3": Architecture(dense.mistral3, _INTERLEAVED),
    "qwen2": Architecture(dense.qwen2),
    "qwen2moe": Architecture(mixtures.qwen2moe),
    "qwen3": Architecture(dense.qwen3),
    "qwen3moe": Architecture(mixtures.qwen3moe),
    "olmo": Architecture(dense.olmo, _INTERLEAVED, eps=None),
    "olmo2": Architecture(dense.olmo2),
    "olmoe": Architecture(mixtures.olmoe),
    "exaone4": Architecture(dense.exaone4),
    "smollm3": Architecture(dense.smollm3, _INTERLEAVED),
    "arcee": Architecture(dense.arcee, _INTERLEAVED),
    "seed_oss": Architecture(dense.seed_oss),
    "granite": Architecture(dense.granite, _INTERLEAVED),
    "granitemoe": Architecture(mixtures.granitemoe, _INTERLEAVED),
    "glm4": Architecture(dense.glm4),
    "glm4moe": Architecture(mixtures.glm4moe),
    "phi3": Architecture(dense.phi3),
    "ernie4_5": Architecture(dense.ernie4_5),
    "ernie4_5-moe": Architecture(mixtures.ernie4_5_moe),
    "hunyuan-dense": Architecture(dense.hunyuan_dense),
    "hunyuan-moe": Architecture(mixtures.hunyuan_moe),
    "command-r": Architecture(dense.command_r, eps=(LAYER, "layer_norm_eps")),
    "cohere2": Architecture(dense.cohere2, eps=(LAYER, "layer_norm_eps")),
    "minimax-m2": Architecture(mixtures.minimax_m2),
    "starcoder2": Architecture(dense.starcoder2, eps=(LAYER, "norm_epsilon")),
    "stablelm": Architecture(dense.stablelm, eps=(LAYER, "layer_norm_eps")),
    "nemotron": Architecture(dense.nemotron, _WITH_ONE, eps=(LAYER, "norm_eps")),
    "deepseek2": Architecture(latent.deepseek2, by_file=latent.layout_of, is_latent=True),
    "qwen3next": Architecture(delta.qwen3next, _DELTA, by_file=delta.layout_of),
    "qwen35": Architecture(delta.qwen35, _TILED),
    "qwen35moe": Architecture(delta.qwen35moe, _TILED),
    "gpt-oss": Architecture(mixtures.gpt_oss, _APART),
    "gemma": Architecture(dense.gemma, _WITH_ONE),
    "gemma2": Architecture(dense.gemma2, _WITH_ONE),
    "gemma3": Architecture(dense.gemma3, _WITH_ONE),
}
