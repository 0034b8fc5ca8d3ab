"""ModelConfig (what the checkpoint is) and RunConfig (how this run goes): read once, checked once,
hashable.

Reads both forms in which a config.json is published: `rope_theta` beside `rope_scaling`, or both in
`rope_parameters`; `torch_dtype` or `dtype`. What is absent gets the value that the reference gives
it; what is wrong is refused by field.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass, fields

from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.registry import FAMILIES
from jlayer.spec import ITEM_BYTES, ModelConfig, Rope
from jlayer.strict import read_json_object

# No published model comes near these; what exceeds them is damage or an attack, and is refused
# before any allocation.
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
# What the config of a folder that we quantised holds beside its scheme. No "quant_method": without
# one transformers refuses the folder; one that it does not know it only warns of, and makes up
# random matrices.
OWN_QUANTIZATION = {"by": "jlayer"}
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu",)


@dataclass(frozen=True)
class RunConfig:
    """How this run goes. Bytes are integers; None stands for the default that the machine gives."""

    device_memory: int | None = None
    host_memory: int | None = None
    dtype: str | None = None
    device: str | None = None
    context: int | None = None
    keeps_layers: bool = True  # False: everything comes from disk, every sweep

    @classmethod
    def from_options(cls, **options) -> RunConfig:
        """From words and numbers as a user writes them ("4GiB", "bfloat16"). Raises UsageError with
        the closest name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(unknown_name("option", name, known))
        for name in ("device_memory", "host_memory"):
            if options.get(name) is not None:
                options[name] = parse_bytes(options[name], option=name)
        if options.get("dtype") is not None:
            options["dtype"] = parse_choice(
                str(options["dtype"]), tuple(ITEM_BYTES), option="dtype"
            )
        if options.get("device") is not None:
            options["device"] = parse_choice(options["device"], ("cpu", "gpu"), option="device")
        if type(options.get("keeps_layers", True)) is not bool:
            raise UsageError(f"keeps_layers: found {options['keeps_layers']!r}, expected a bool")
        context = options.get("context")
        if context is not None and (type(context) is not int or context < 1):
            raise UsageError(f"context: found {context!r}, expected a positive number of tokens")
        return cls(**options)


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """The model that `folder` says it holds, from its config.json.

    Raises CheckpointError (missing, not strict JSON, a field out of range) or
    UnsupportedModelError.
    """
    path = os.path.join(folder, "config.json")
    return model_config(read_json_object(path), where=path)


def model_config(raw: dict, *, where: str) -> ModelConfig:
    """A published config as a ModelConfig; `where` names it in errors, which are those of
    `read_config`."""
    family = _family(raw, where)
    _refuse_quantized(raw, where)
    heads = _integer(raw, "num_attention_heads", where)
    kv_heads = _integer(raw, "num_key_value_heads", where, default=heads)
    hidden = _integer(raw, "hidden_size", where)
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads is {heads}, "
            f"not a multiple of num_key_value_heads {kv_heads}"
        )
    if raw.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
            "and head_dim is not given"
        )
    head_dim = _integer(raw, "head_dim", where, default=hidden // heads)
    if head_dim % 2:
        raise CheckpointError(
            f"{where}: head_dim is {head_dim} (hidden_size {hidden}, heads {heads}); "
            "rotary embedding needs an even one"
        )
    attention_bias = _boolean(raw, "attention_bias", where)
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=_integer(raw, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size", where),
        num_hidden_layers=_integer(raw, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_integer(raw, "max_position_embeddings", where, default=2048),
        rms_norm_eps=_positive(raw, "rms_norm_eps", where, default=1e-6),
        rope=_rope(raw, where),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=_boolean(raw, "mlp_bias", where),
        tie_word_embeddings=_boolean(raw, "tie_word_embeddings", where),
        hidden_act=_choice(raw, "hidden_act", where, ACTIVATIONS, default="silu"),
        dtype=_dtype(raw, where),
    )


def read_generation_config(folder: str | os.PathLike) -> dict:
    """What the model's makers set for generation: generation_config.json whole where present, else
    config.json.

    Raises CheckpointError where the file that counts is not strict JSON.
    """
    return read_json_object(generation_file(folder))


def generation_file(folder: str | os.PathLike) -> str:
    """The file that says what the model's makers set for generation."""
    path = os.path.join(folder, "generation_config.json")
    return path if os.path.exists(path) else os.path.join(folder, "config.json")


def token_ids(value, *, field: str, where: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or null (as eos_token_id is published) as a tuple. Raises
    CheckpointError."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{where}: {field} is {value!r}, expected ids below the vocabulary of {vocab_size}"
            )
    return tuple(listed)


def parse_bytes(value: int | str, *, option: str) -> int:
    """A number of bytes: an int, or words such as "4GiB", "3.5 GB", "512MiB". Raises UsageError."""
    if type(value) is int and value > 0:
        return value
    match = re.fullmatch(
        r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", str(value), re.IGNORECASE
    )
    scale = 1
    if match and match.group(2):
        scale = (1024 if match.group(3) else 1000) ** ("kmgt".index(match.group(2).lower()) + 1)
    number = int(float(match.group(1)) * scale) if match else 0
    if number <= 0 or isinstance(value, bool):
        raise UsageError(
            f"{option}: found {value!r}, expected a size such as 4GiB, 3500MB or a number of bytes"
        )
    return number


def human(n_bytes: int) -> str:
    """Bytes in words, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"


def parse_choice(value: str, known: tuple[str, ...], *, option: str) -> str:
    """`value` if it is one of `known`; raises UsageError that offers the closest one otherwise."""
    if value not in known:
        raise UsageError(unknown_name(option, value, known))
    return value


def unknown_name(kind: str, name: str, known) -> str:
    """One line for an unknown word: the closest known one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{kind} {name!r} is not known: {hint}known are {', '.join(sorted(known))}"


def _family(raw, where):
    supported = f"supported: {', '.join(row.architecture for row in FAMILIES.values())}"
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) for name in architectures
    ):
        raise CheckpointError(
            f"{where}: architectures is {architectures!r}, expected a list of names"
        )
    for name in architectures:
        if name not in {row.architecture for row in FAMILIES.values()}:
            raise UnsupportedModelError(
                f"{where}: architecture {_plain(name)} is not supported; {supported}"
            )
    model_type = raw.get("model_type")
    if model_type is None and architectures:
        return next(row for row in FAMILIES.values() if row.architecture == architectures[0])
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{where}: model_type {model_type!a} is not supported; {supported}"
        )
    return FAMILIES[model_type]


def own_quantization(raw: dict) -> str | None:
    """The scheme that a config says we quantised its folder to, as it says it; None where it does
    not."""
    said = raw.get("quantization_config")
    ours = isinstance(said, dict) and OWN_QUANTIZATION.items() <= said.items()
    return str(said.get("scheme")) if ours else None


def _refuse_quantized(raw, where):
    quantized = raw.get("quantization_config")
    if quantized and own_quantization(raw) is None:
        method = (
            quantized.get("quant_method", "unnamed") if isinstance(quantized, dict) else quantized
        )
        raise UnsupportedModelError(
            f"{where}: weights quantised by {_plain(str(method))} are not supported; "
            "take the model's unquantised checkpoint"
        )


def _rope(raw, where):
    joined = raw.get("rope_parameters")
    scaling = raw.get("rope_scaling") if joined is None else joined
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{where}: rope scaling is {scaling!r}, expected an object or null")
    where = f"{where}: rope"
    holder = scaling if "rope_theta" in scaling else raw
    theta = _positive(holder, "rope_theta", where, default=Rope.theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{where} type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    for holder in (raw, scaling):
        if holder.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"{where}: partial_rotary_factor is {holder['partial_rotary_factor']!r}, "
                "supported: 1"
            )
    if kind == "default":
        return Rope(theta=theta)
    factor = _positive(scaling, "factor", where)
    if kind == "linear":
        return Rope(theta=theta, type=kind, factor=factor)
    low = _positive(scaling, "low_freq_factor", where)
    high = _positive(scaling, "high_freq_factor", where)
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
        original_max_position_embeddings=_integer(
            scaling,
            "original_max_position_embeddings",
            where,
            limit=LIMITS["max_position_embeddings"],
        ),
    )


def _integer(raw, field, where, *, default=None, limit=None):
    value = raw.get(field)
    if value is None and default is not None:
        return default
    limit = limit or LIMITS[field]
    if type(value) is not int or not 1 <= value <= limit:
        found = "missing" if value is None else repr(value)
        raise CheckpointError(f"{where}: {field} is {found}, expected an integer from 1 to {limit}")
    return value


def _positive(raw, field, where, *, default=None):
    value = raw.get(field)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        found = "missing" if value is None else repr(value)
        raise CheckpointError(f"{where}: {field} is {found}, expected a positive number")
    return float(value)


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
    value = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in ITEM_BYTES:
        raise UnsupportedModelError(
            f"{where}: dtype {value!r} is not supported; supported: {', '.join(ITEM_BYTES)}"
        )
    return name


def _plain(word):
    """A word from outside, as it may stand in a message."""
    return word if word.isprintable() else ascii(word)
