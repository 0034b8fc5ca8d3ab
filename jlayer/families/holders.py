"""Multimodal models, of which the text's part runs: their config.json as that of a text model."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import BODY
from jlayer.families.fields import Fields
from jlayer.families.registry import FAMILIES

SECTION = "text_config"
# What stands beside the sections and counts for the text, where its section is silent.
_OUTER = (
    *("dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("quantization_config", "compression_config", "quantization"),
)


@dataclass(frozen=True)
class Holder:
    """A model with a text model in it. `texts`: the types that this may have, the first where its
    section is silent. `tied`: whether the head is the embedding where nothing is said. `lead`: what
    stands before the modules of the text model in the one that transformers makes for texts; where
    it makes none, in the whole model."""

    model_type: str
    architecture: str
    texts: tuple[str, ...]
    tied: bool = True
    lead: str = "model.language_model."


HOLDERS = {
    holder.model_type: holder
    for holder in (
        Holder("gemma3", "Gemma3ForConditionalGeneration", ("gemma3_text",)),
        Holder("gemma4", "Gemma4ForConditionalGeneration", ("gemma4_text",)),
        Holder(
            *("mistral3", "Mistral3ForConditionalGeneration"),
            ("mistral", "ministral", "ministral3", "mistral4"),
        ),
        Holder(
            *("llama4", "Llama4ForConditionalGeneration"),
            *(("llama4_text",), False, BODY),
        ),
        Holder(
            *("qwen3_5", "Qwen3_5ForConditionalGeneration"),
            *(("qwen3_5_text",), False, BODY),
        ),
        Holder(
            *("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
            *(("qwen3_5_moe_text",), False, BODY),
        ),
    )
}


def text_only(raw: dict, *, where: str) -> dict:
    """The config of the text model in a multimodal one; any other config as it is.

    Whether the head is the embedding is said outside: transformers does not look at what the
    section says of that. `where` names the file in errors. Raises CheckpointError or
    UnsupportedModelError.
    """
    holder = _holder(raw)
    if holder is None:
        return raw
    section = Fields(raw, where).section(SECTION)
    if not section.raw:
        raise CheckpointError(
            f"{where}: {SECTION} is missing, expected the config of the text's part of a "
            f"{holder.model_type}"
        )
    model_type = section.raw.get("model_type") or holder.texts[0]
    if model_type not in holder.texts:
        raise UnsupportedModelError(
            f"{section.where}: model_type {model_type!a:.80} is not supported in a "
            f"{holder.model_type}, supported: {', '.join(holder.texts)}"
        )
    _refuse_another(raw, holder, where)
    tied = Fields(raw, where).boolean("tie_word_embeddings", default=holder.tied)
    outer = {key: raw[key] for key in _OUTER if raw.get(key) is not None}
    own = {
        key: value for key, value in section.raw.items() if value is not None or key not in outer
    }
    return {
        **outer,
        **own,
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "tie_word_embeddings": tied,
    }


def module_lead(raw: dict) -> str:
    """What stands before the names of the text model's modules, in the model that transformers
    makes of a config.json."""
    holder = _holder(raw)
    return BODY if holder is None else holder.lead


def _refuse_another(raw, holder, where):
    """Raises UnsupportedModelError where an architecture is that of a text that it cannot have."""
    names = raw.get("architectures")
    rows = {row.architecture.lower(): row.model_type for row in FAMILIES.values()}
    for name in names if isinstance(names, list) else [names]:
        if rows.get(str(name).lower(), holder.texts[0]) not in holder.texts:
            raise UnsupportedModelError(
                f"{where}: architecture {name!a:.80} is not supported, but model_type is "
                f"{holder.model_type!r}, of {holder.architecture}: remove the wrong one"
            )


def _holder(raw):
    """By model_type, as transformers chooses; by the architecture alone where there is none."""
    model_type, names = raw.get("model_type"), raw.get("architectures")
    if isinstance(model_type, str):
        return HOLDERS.get(model_type)
    first = names[0] if isinstance(names, list) and names else names
    named = (holder for holder in HOLDERS.values() if holder.architecture == first)
    return next(named, None) if model_type is None else None
