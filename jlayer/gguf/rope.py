"""A rotary embedding in a GGUF file's metadata as the keys of a config.json."""

from __future__ import annotations

from jlayer.errors import UnsupportedModelError
from jlayer.families.rope import PARTIAL
from jlayer.gguf.metadata import Metadata, shortest
from jlayer.gguf.names import FACTORS, LONG_FACTORS, SHORT_FACTORS
from jlayer.gguf.tensors import floats

_TYPES = ("none", "linear", "yarn", "longrope")
ORIGINAL = "rope.scaling.original_context_length"
# What divides YaRN's attention factor: mscale_all_dim.
YARN_WEIGHT = "rope.scaling.yarn_log_multiplier"
# Multiplies cos and sin, beside the factors of long texts.
ATTENTION_FACTOR = "rope.scaling.attn_factor"


def rope_parameters(said: Metadata, *, turned: int | None = None, in_part: bool = False) -> dict:
    """The `rope_parameters` of a config. `turned`: how many elements of a head are turned; None:
    all. `in_part`: as many as the file says; all, where it does not.

    Raises UnsupportedModelError (a scaling, or a number of elements, that is not supported), or
    CheckpointError.
    """
    base = {"rope_theta": said.number("rope.freq_base", 10000.0), **_part(said, turned, in_part)}
    kind, factor = said.word("rope.scaling.type", "none"), said.number("rope.scaling.factor", 0.0)
    original = said.integer(ORIGINAL, 0)  # says nothing where nothing is scaled
    if kind not in _TYPES:
        raise UnsupportedModelError(
            f"{said.where}: rope.scaling.type is {kind[:80]!a}, supported: {', '.join(_TYPES)}"
        )
    named = [name for name in (FACTORS, LONG_FACTORS) if name in said.head.tensors]
    if kind == "longrope" and named != [LONG_FACTORS]:
        raise UnsupportedModelError(
            f"{said.where}: rope.scaling.type is longrope, and the factors of frequencies are "
            f"{' and '.join(named) or 'missing'}, expected {LONG_FACTORS} and {SHORT_FACTORS}"
        )
    if len(named) > 1 or (named and kind not in ("none", "longrope")):
        raise UnsupportedModelError(
            f"{said.where}: {' and '.join(named)} and rope.scaling.type {kind!r}, expected one of "
            "them"
        )
    if named:
        return base | (_factors(said) if named == [FACTORS] else _longrope(said, original))
    if kind == "none" or factor == 0.0:
        return {**base, "rope_type": "default"}
    if kind == "linear":
        return {**base, "rope_type": "linear", "factor": factor}
    return {**base, **_yarn(said, factor)}


def _part(said, turned, in_part):
    head_dim = said.integer("attention.key_length", 0) or (
        said.integer("embedding_length") // said.integer("attention.head_count")
    )
    found = said.integer("rope.dimension_count", turned or head_dim)
    if in_part and 0 < found <= head_dim:
        return {PARTIAL: found / head_dim}
    if found != (turned or head_dim):
        raise UnsupportedModelError(
            f"{said.where}: rope.dimension_count is {found}, supported: {turned or head_dim}"
        )
    return {}


def _yarn(said, factor):
    """llama.cpp's converter writes Transformers' attention factor as yarn_attn_factor."""
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": said.integer(ORIGINAL),
    }
    for key in ("beta_fast", "beta_slow"):
        if said.has(f"rope.scaling.yarn_{key}"):
            found[key] = said.number(f"rope.scaling.yarn_{key}")
    attention = said.number("rope.scaling.yarn_attn_factor", 1.0)
    return found if attention == 1.0 else {**found, "attention_factor": attention}


def _factors(said):
    """Divisors of the frequencies (Llama 3.1's), which the file has as a tensor: LongRoPE with the
    same factors for short and long texts, and no other change."""
    factors = _numbers(said, FACTORS)
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": said.integer("context_length"),
    }


def _longrope(said, original):
    """LongRoPE (arXiv 2402.13753) as files of Phi 3 have it: two tensors of factors."""
    if SHORT_FACTORS not in said.head.tensors:
        raise UnsupportedModelError(
            f"{said.where}: {LONG_FACTORS} without {SHORT_FACTORS}, expected both"
        )
    return {
        "rope_type": "longrope",
        "short_factor": _numbers(said, SHORT_FACTORS),
        "long_factor": _numbers(said, LONG_FACTORS),
        "attention_factor": said.number(ATTENTION_FACTOR, 1.0),
        "original_max_position_embeddings": original or said.integer("context_length"),
    }


def _numbers(said, tensor):
    return [shortest(number) for number in floats(said.head, tensor)]
