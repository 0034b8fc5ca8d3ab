"""Parses config.json into ModelConfig.

Reads every form in which a config.json is published: `rope_theta` beside `rope_scaling`, or both in
`rope_parameters`; `torch_dtype` or `dtype`. If a file says one fact twice, the value that counts in
transformers counts here. A missing field gets the default of transformers. A wrong value is refused
by its field.
"""

from __future__ import annotations

import difflib
import os
import sys

from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.registry import FAMILIES, is_of_another_model
from jlayer.spec import ITEM_BYTES, ModelConfig, Rope
from jlayer.strict import read_json_object

# No published model comes near these limits. A larger value means damage or an attack, and is
# refused before any allocation.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "max_position_embeddings": (1 << 31) - 1,
}
# Marks a config.json whose folder jlayer quantized; its scheme stands beside it. There is no
# "quant_method": without one transformers refuses the folder. For an unknown one it only warns, and
# initialises the matrices at random.
OWN_QUANTIZATION = {"by": "jlayer"}
ROPE_TYPES = ("default", "linear", "llama3")
# Published names of activations, and ours.
ACTIVATIONS = {"silu": "silu", "swish": "silu"}
# Published names of dtypes that are not torch's first name for them.
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
# Keys of "layer_types" that limit what a layer attends to -> the key that says how far.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Keys that make another model of a llama in transformers -> the values at which they do not.
# (transformers reads another file than config.json where configuration_files names one.)
_NEUTRAL = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "kv_sharing_modes": (None,),
    "configuration_files": (None, []),
}
# Keys by which a quantization_config without "quant_method" is known.
_METHOD_BY_KEY = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "config_groups": "compressed-tensors",
    "activation_scheme": "fp8",
    "desc_act": "gptq",
    "zero_point": "awq",
    "group_size": "MLX",
}


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a folder, from its config.json.

    Raises CheckpointError (missing, not strict JSON, a field out of range) or
    UnsupportedModelError.
    """
    path = os.path.join(folder, "config.json")
    return model_config(read_json_object(path), where=path)


def model_config(raw: dict, *, where: str) -> ModelConfig:
    """A parsed config.json as a ModelConfig. `where` names the file in errors.

    Raises what `read_config` raises.
    """
    family = _family(raw, where)
    _refuse_quantized(raw, where)
    for field, values in _NEUTRAL.items():
        if field in raw and raw[field] not in values:
            raise UnsupportedModelError(
                f"{where}: {field} is {raw[field]!a:.80}, supported: {values[-1]!r}, or none at all"
            )
    given = {key: value for key, value in raw.items() if value is not None}
    heads = _integer(raw, "num_attention_heads", where)
    kv_heads = _integer(given, "num_key_value_heads", where, default=heads)
    hidden = _integer(raw, "hidden_size", where)
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads is {heads}, "
            f"not a multiple of num_key_value_heads {kv_heads}"
        )
    if "head_dim" not in given and hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
            "and head_dim is not given"
        )
    head_dim = _integer(given, "head_dim", where, default=hidden // heads)
    if head_dim % 2:
        raise CheckpointError(
            f"{where}: head_dim is {head_dim} (hidden_size {hidden}, heads {heads}); "
            "rotary embedding needs an even one"
        )
    attention_bias = _boolean(raw, "attention_bias", where)
    longest = _integer(raw, "max_position_embeddings", where, default=2048)
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=_integer(raw, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size", where),
        num_hidden_layers=_integer(raw, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=min(longest, window_of(raw, where=where) or longest),
        rms_norm_eps=_positive(raw, "rms_norm_eps", where, default=1e-6),
        rope=_rope(raw, where, longest),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=_boolean(raw, "mlp_bias", where),
        tie_word_embeddings=_boolean(raw, "tie_word_embeddings", where),
        hidden_act=ACTIVATIONS[_choice(raw, "hidden_act", where, ACTIVATIONS, default="silu")],
        dtype=_dtype(raw, where),
    )


def window_of(raw: dict, *, where: str) -> int | None:
    """How many tokens a config lets its layers attend to; None where it sets no window.

    A llama attends to all tokens. Where its config names a window nevertheless, transformers cuts
    its cache to it, but not its attention mask: beyond the window its own result depends on how the
    prompt was cut. Within the window all agree, so that is as far as such a model runs.
    """
    kinds = raw.get("layer_types")
    if kinds is None:
        fields = _WINDOWS.values()
    elif isinstance(kinds, list) and set(map(str, kinds)) <= {"full_attention", *_WINDOWS}:
        fields = [_WINDOWS[kind] for kind in _WINDOWS if kind in kinds]
    else:
        raise UnsupportedModelError(
            f"{where}: layer_types is {str(kinds)[:200]!a}, supported: full_attention, "
            f"{', '.join(_WINDOWS)}"
        )
    limit = LIMITS["max_position_embeddings"]
    needed = [field for field in fields if kinds is not None or raw.get(field) is not None]
    return min((_integer(raw, field, where, limit=limit) for field in needed), default=None)


def planned_dtype(cfg: ModelConfig, asked: str | None) -> str:
    """The dtype of weights that nobody has seen: the config's, or what was asked for where ours has
    none such. Raises UnsupportedModelError where neither helps."""
    if cfg.dtype is None or cfg.dtype in ITEM_BYTES:
        return cfg.dtype or "bfloat16"
    if asked is None:
        raise UnsupportedModelError(
            f"config.json: dtype {cfg.dtype!r} is not supported; supported: "
            f"{', '.join(ITEM_BYTES)}; name one of them with --dtype"
        )
    return asked


def read_generation_config(folder: str | os.PathLike) -> dict:
    """The generation options published with a model: generation_config.json, else config.json.

    Raises CheckpointError if that file is not strict JSON.
    """
    return read_json_object(generation_file(folder))


def generation_file(folder: str | os.PathLike) -> str:
    """The file that says what the model's makers set for generation."""
    path = os.path.join(folder, "generation_config.json")
    return path if os.path.exists(path) else os.path.join(folder, "config.json")


def token_ids(value, *, field: str, where: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or null (the published forms of eos_token_id) as a tuple.

    Raises CheckpointError.
    """
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{where}: {field} is {value!r}, expected ids below the vocabulary of {vocab_size}"
            )
    return tuple(listed)


def parse_choice(value: str, known: tuple[str, ...], *, option: str) -> str:
    """`value`, if it is one of `known`. Raises UsageError with the closest known value."""
    if value not in known:
        raise UsageError(unknown_name(option, value, known))
    return value


def unknown_name(kind: str, name: str, known) -> str:
    """The message for an unknown name: the closest known one, then all known ones."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{kind} {name!r} is not known: {hint}known are {', '.join(sorted(known))}"


def _family(raw, where):
    """By model_type, as transformers chooses; by the architecture alone where there is none.

    Trainers and mergers write many names for the architecture of one model. But the name of another
    model's is a contradiction: programs that go by it would run another model.
    """
    names = raw.get("architectures") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {names!r}, expected a list of names")
    known = {row.architecture.lower(): row for row in FAMILIES.values()}
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if model_type is None and names:
        family = known.get(names[0].lower())
    named = [name for name in names if name.lower() not in known]
    supported = f"supported: {', '.join(row.architecture for row in FAMILIES.values())}"
    for name in named:
        if family is None or not name.isprintable() or is_of_another_model(name):
            beside = f", but model_type is {model_type!r}: remove the wrong one" if family else ""
            raise UnsupportedModelError(
                f"{where}: architecture {_plain(name)} is not supported{beside}; {supported}"
            )
    if family is None:
        said = "is missing" if model_type is None else f"{model_type!a} is not supported"
        raise UnsupportedModelError(f"{where}: model_type {said}; {supported}")
    return family


def own_quantization(raw: dict) -> str | None:
    """The scheme by which jlayer quantized the folder of this config; None if it did not."""
    section = raw.get("quantization_config")
    ours = isinstance(section, dict) and OWN_QUANTIZATION.items() <= section.items()
    return str(section.get("scheme")) if ours else None


def _refuse_quantized(raw, where):
    field = "quantization_config" if raw.get("quantization_config") else "compression_config"
    said = raw.get(field)
    if said and own_quantization(raw) is None:
        raise UnsupportedModelError(
            f"{where}: {field}: {quantized_by(_method(said))}; where the weights are not quantized "
            f"at all, remove {field} from config.json"
        )


def quantized_by(method: str) -> str:
    """What to tell whoever has weights that another program has quantized."""
    return (
        f"weights quantized by {_plain(method)} are not supported; take the model's unquantized "
        "checkpoint (jlayer convert --quantize int8 or int4 makes that small)"
    )


def _method(said):
    said = said if isinstance(said, dict) else {"quant_method": said}
    by_key = (method for key, method in _METHOD_BY_KEY.items() if key in said)
    return str(said.get("quant_method") or next(by_key, "a method that is not named"))


def _rope(raw, where, longest):
    """As transformers reads it: `rope_scaling` counts alone where it says anything, else
    `rope_parameters`; what stands in there goes before the same key beside it."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    said = raw.get(field) or {}
    if not isinstance(said, dict):
        raise CheckpointError(f"{where}: {field} is {said!r}, expected an object or null")
    where = f"{where}: {field}"
    if any(isinstance(value, dict) for value in said.values()):
        raise UnsupportedModelError(
            f"{where} differs by kind of layer ({', '.join(map(ascii, said))}); expected one "
            "rope_type and rope_theta for all layers"
        )
    beside = {key: raw[key] for key in ("rope_theta",) if key in raw}
    said = {"rope_theta": Rope.theta, **beside, **said}
    theta = _positive(said, "rope_theta", where)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{where}: type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":  # for which transformers turns whole heads, whatever a config says
        return Rope(theta=theta)
    _refuse_partial(raw, said, where)
    factor = _positive(said, "factor", where)
    if kind == "linear":
        return Rope(theta=theta, type=kind, factor=factor)
    low = _positive(said, "low_freq_factor", where)
    high = _positive(said, "high_freq_factor", where)
    if not high > low:
        raise CheckpointError(
            f"{where}: high_freq_factor is {high}, expected more than low_freq_factor {low}"
        )
    return Rope(
        theta=theta,
        type=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_original_length(raw, said, where, longest),
    )


def _original_length(raw, said, where, longest):
    """The context before scaling; here the key beside goes first (transformers does so for Phi 3),
    and what stands nowhere is the context itself."""
    field = "original_max_position_embeddings"
    holder = raw if field in raw else said
    return _integer(holder, field, where, default=longest, limit=LIMITS["max_position_embeddings"])


def _refuse_partial(raw, said, where):
    field = "partial_rotary_factor"
    factor = said[field] if field in said else raw.get(field)
    if (field in said or factor is not None) and (isinstance(factor, bool) or factor != 1):
        raise UnsupportedModelError(f"{where}: {field} is {factor!r}, supported: 1")


def as_integer(value):
    """A float that is a whole number as an int, since some programs write 4096.0; all else as it
    is."""
    return int(value) if type(value) is float and value.is_integer() else value


def _integer(raw, field, where, *, default=None, limit=None):
    """`default` where the key is absent. A float is taken where it is a whole number."""
    value = raw.get(field)
    if field not in raw and default is not None:
        return default
    limit = limit or LIMITS[field]
    whole = as_integer(value)
    if type(whole) is not int or not 1 <= whole <= limit:
        raise CheckpointError(
            f"{where}: {field} is {_shown(raw, field)}, expected an integer from 1 to {limit}"
        )
    return whole


def _positive(raw, field, where, *, default=None):
    value = raw.get(field)
    if field not in raw and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(
            f"{where}: {field} is {_shown(raw, field)}, expected a positive number"
        )
    return float(value)


def _shown(raw, field):
    if field not in raw:
        return "missing"
    return "null" if raw[field] is None else repr(raw[field])


def _boolean(raw, field, where):
    value = raw.get(field)
    if value is None:
        return False
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {field} is {value!r}, expected true or false")
    return value


def _choice(raw, field, where, known, *, default):
    value = raw.get(field, default)
    if value not in known:
        raise UnsupportedModelError(
            f"{where}: {field} {value!r} is not supported; supported: {', '.join(known)}"
        )
    return value


def _dtype(raw, where):
    """The dtype that the config names, which need not be one of ours: weights have their own."""
    value = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    if value is None:
        return None
    if not isinstance(value, str):
        raise UnsupportedModelError(
            f"{where}: dtype is {value!r}, expected a name; supported: {', '.join(ITEM_BYTES)}"
        )
    name = value.removeprefix("torch.")
    return DTYPE_ALIASES.get(name, name)


def _plain(word):
    """Text from outside, made printable for a message."""
    return word if word.isprintable() else ascii(word)
