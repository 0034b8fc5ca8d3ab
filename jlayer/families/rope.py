"""Rotary embeddings as config.json describes them, read as transformers reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.fields import Fields
from jlayer.parts import Rope

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
PARTIAL = "partial_rotary_factor"
FULL, SLIDING = "full_attention", "sliding_attention"
_BY_TYPE = ("rope_scaling", "rope_theta")
# Types whose scaling begins at the length that a model was trained for.
_WITH_ORIGINAL = ("llama3", "yarn", "longrope")


def read_rope(
    fields: Fields,
    *,
    longest: int,
    theta: float | None = Rope.theta,
    partial: float | None = None,
    layer_type: str | None = None,
    types: Sequence[str] = ROPE_TYPES,
    **fixed,
) -> Rope:
    """The rotary embedding of a model, or of its layers of one type.

    `rope_scaling` counts alone where it says anything, else `rope_parameters`; what stands in there
    goes before the same key beside it. `theta`, `partial`: of the family, where the file is silent;
    `partial` None: the family turns whole heads. `types`: those that the family has. `fixed`:
    fields of `Rope` that the family fixes. Raises CheckpointError or UnsupportedModelError.
    """
    said = rope_section(fields)
    nested = {key: value for key, value in said.raw.items() if isinstance(value, Mapping)}
    if nested:
        if layer_type not in nested:
            raise UnsupportedModelError(
                f"{said.where} differs by kind of layer ({', '.join(map(ascii, said.raw))}); "
                "expected one rope_type and rope_theta for all layers"
            )
        # Here transformers looks for it outside of what is said for the layers.
        outer = {"truncate": said.raw.get("truncate", True)}
        said = said.section(layer_type)
        said = Fields({**said.raw, **outer}, said.where)
    beside = {key: fields.raw[key] for key in ("rope_theta",) if key in fields.raw}
    if fields.has(PARTIAL) or (partial is not None and PARTIAL in fields.raw):
        beside[PARTIAL] = fields.raw[PARTIAL]
    defaults = {"rope_theta": theta, PARTIAL: partial or 1.0}
    said = Fields({**defaults, **beside, **said.raw}, said.where)
    kind = said.raw.get("rope_type", said.raw.get("type", "default"))
    if kind not in types:
        raise UnsupportedModelError(
            f"{said.where}: type {kind!r} is not supported; supported: {', '.join(types)}"
        )
    return _of_type(kind, said, fields, longest=longest, fixed=fixed, turns_whole=partial is None)


def rope_section(fields: Fields) -> Fields:
    """The object that says how a rotary embedding is scaled; empty where none does."""
    return fields.section("rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters")


def by_type(
    fields: Fields, *, full: float, sliding: float, sliding_key: str | None = None
) -> Fields:
    """The config of a family with a rotary embedding for each type of layers, with
    `rope_parameters` for both, as transformers fills it in.

    `rope_scaling` and `rope_theta` are of the full layers; `full`, `sliding`: theta, where the file
    is silent; `sliding_key`: says it for the others. Without `rope_parameters` a `type` counts only
    under its new name, `rope_type`. Raises CheckpointError.
    """
    said = fields.section("rope_parameters")
    start = {} if fields.has("rope_parameters") else {"rope_type": "default"}
    thetas = {
        FULL: fields.raw.get("rope_theta", full),
        SLIDING: fields.raw.get(sliding_key, sliding),
    }
    found = {
        name: {"rope_theta": theta, **start, **said.section(name).raw}
        for name, theta in thetas.items()
    }
    found[FULL] |= fields.section("rope_scaling").raw
    return fields.changed({"rope_parameters": found}, without=_BY_TYPE)


def _of_type(kind, said, fields, *, longest, fixed, turns_whole):
    common = {
        "theta": said.positive("rope_theta"),
        "type": kind,
        "partial": _partial(said, kind, turns_whole),
        **fixed,
    }
    if kind in _WITH_ORIGINAL:
        common["original_max_position_embeddings"] = _original_length(fields, said, longest)
    return _READERS[kind](said, common, longest)


def _partial(said, kind, turns_whole):
    """Of a family that turns whole heads another part is refused, but for the default type, for
    which transformers ignores it."""
    if turns_whole and kind == "default":
        return 1.0
    value, turns_whole = said.raw[PARTIAL], turns_whole and kind != "proportional"
    if type(value) not in (int, float) or not 0 < value <= 1 or (turns_whole and value != 1):
        expected = "1" if turns_whole else "above 0, and up to 1"
        raise UnsupportedModelError(f"{said.where}: {PARTIAL} is {value!r}, supported: {expected}")
    return float(value)


def _original_length(fields, said, longest):
    """The context before scaling; here the key beside goes first (transformers does so for Phi 3),
    and what stands nowhere is the context itself."""
    name = "original_max_position_embeddings"
    holder = fields if name in fields.raw else said
    return holder.integer(name, default=longest)


def _default(said, common, longest):
    return Rope(**common)


def _linear(said, common, longest):
    return Rope(**common, factor=said.positive("factor"))


def _llama3(said, common, longest):
    factor = said.positive("factor")
    low, high = said.positive("low_freq_factor"), said.positive("high_freq_factor")
    if not high >= low:
        raise CheckpointError(
            f"{said.where}: high_freq_factor is {high}, expected no less than low_freq_factor {low}"
        )
    return Rope(**common, factor=factor, low_freq_factor=low, high_freq_factor=high)


def _yarn(said, common, longest):
    """YaRN (arXiv 2309.00071), with the attention factor of its section 3.4. A factor that is null
    is that of the lengths; one that is absent is refused, as in transformers."""
    original = common["original_max_position_embeddings"]
    is_null = "factor" in said.raw and said.raw["factor"] is None
    factor = longest / original if is_null else said.positive("factor")

    def grown(by):
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    attention = said.positive_or_none("attention_factor")
    if attention is None:
        both = [said.raw.get(name) for name in ("mscale", "mscale_all_dim")]
        attention = grown(1.0)
        if all(both):
            attention = grown(said.positive("mscale")) / grown(said.positive("mscale_all_dim"))
    return Rope(
        **common,
        factor=factor,
        attention_factor=attention,
        beta_fast=said.positive("beta_fast", default=32.0, null_is_absent=True),
        beta_slow=said.positive("beta_slow", default=1.0, null_is_absent=True),
        truncate=said.boolean("truncate", default=True),
    )


def _longrope(said, common, longest):
    """LongRoPE (arXiv 2402.13753): factors for each frequency, of short and of long texts."""
    original = common["original_max_position_embeddings"]
    factor = said.positive("factor", default=longest / original, null_is_absent=True)
    attention = said.positive_or_none("attention_factor")
    if attention is None:
        grown = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention = math.sqrt(1 + grown)
    return Rope(
        **common,
        factor=factor,
        attention_factor=attention,
        short_factor=said.numbers("short_factor"),
        long_factor=said.numbers("long_factor"),
    )


def _proportional(said, common, longest):
    return Rope(**common, factor=said.positive("factor", default=1.0))


_READERS = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
