"""Parses config.json into ModelConfig.

Reads every form in which a config.json is published: `rope_theta` beside `rope_scaling`, or both in
`rope_parameters`; `torch_dtype` or `dtype`. If a file says one fact twice, the value that counts in
transformers counts here. A missing field gets the default of transformers. A wrong value is refused
by its field.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace

from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.common import stray_window
from jlayer.families.fields import Fields, printable
from jlayer.families.find import find_family
from jlayer.families.holders import text_only
from jlayer.families.layout import as_laid_out
from jlayer.families.quantized import inputs_note, method_of, read_quantized
from jlayer.small_files import CONFIG, GENERATION_CONFIG, files_of
from jlayer.spec import ITEM_BYTES, ModelConfig

# Marks a config.json whose folder jlayer quantized; its scheme stands beside it. There is no
# "quant_method": without one transformers refuses the folder. For an unknown one it only warns, and
# initialises the matrices at random.
OWN_QUANTIZATION = {"by": "jlayer"}
# Published names of dtypes that are not torch's first name for them.
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
# The keys that say how weights are quantized: today's, compressed-tensors' first, and MLX's.
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
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
    """The ModelConfig of a folder, from its config.json, or of a GGUF file.

    Raises CheckpointError (missing, not strict JSON, a field out of range) or
    UnsupportedModelError.
    """
    files = files_of(folder)
    return model_config(files.json(CONFIG), where=files.where(CONFIG))


def model_config(raw: dict, *, where: str) -> ModelConfig:
    """A parsed config.json as a ModelConfig. `where` names the file in errors.

    Raises what `read_config` raises.
    """
    raw = text_only(raw, where=where)
    family = find_family(raw, where=where)
    _refuse_quantized(raw, family.quantized, where)
    fields = Fields({**raw, "model_type": family.model_type}, where)
    cfg = as_laid_out(fields, family.read(fields))
    quantized = cfg.quantized or read_quantized(fields)
    longest = cfg.max_position_embeddings
    if not family.has_windows:
        longest = min(longest, stray_window(fields) or longest)
    return replace(
        cfg, max_position_embeddings=longest, dtype=_dtype(raw, where), quantized=quantized
    )


def config_notes(raw: dict, cfg: ModelConfig, *, where: str) -> tuple[str, ...]:
    """What to tell the user of a config that was read as `cfg`."""
    raw = text_only(raw, where=where)
    family, longest = find_family(raw, where=where), cfg.max_position_embeddings
    notes = inputs_note(Fields(raw, where)) if cfg.quantized else ()
    if family.longest_key and raw.get("max_position_embeddings") != longest:
        return (
            *notes,
            f"{where}: it runs up to {longest} tokens ({family.longest_key}), all of which a layer "
            "attends to; to choose some of a longer text is not supported",
        )
    window = None if family.has_windows else stray_window(Fields(raw, where))
    if window is None or window != cfg.max_position_embeddings:
        return notes
    return (
        *notes,
        f"{where}: sets a window of {window} tokens, which no {cfg.model_type} has; it runs up to "
        f"{window} tokens, where that changes nothing (set the window to null to attend to all)",
    )


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
    """The generation options published with a model: generation_config.json, else config.json, of
    a multimodal model with what it says of its text.

    Raises CheckpointError if that file is not strict JSON.
    """
    files = files_of(folder)
    name = _generation_file(files)
    raw = files.json(name)
    return text_only(raw, where=files.where(name)) if name == CONFIG else raw


def generation_file(folder: str | os.PathLike) -> str:
    """The file that says what the model's makers set for generation."""
    files = files_of(folder)
    return files.where(_generation_file(files))


def _generation_file(files):
    return GENERATION_CONFIG if files.has(GENERATION_CONFIG) else CONFIG


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


def closest(name: str, known) -> str:
    """ ", did you mean X?" where a known name is close; empty where none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_name(kind: str, name: str, known) -> str:
    """The message for an unknown name: the closest known one, then all known ones."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{kind} {name!r} is not known: {hint}known are {', '.join(sorted(known))}"


def own_quantization(raw: dict) -> str | None:
    """The scheme by which jlayer quantized the folder of this config; None if it did not."""
    section = raw.get("quantization_config")
    ours = isinstance(section, dict) and OWN_QUANTIZATION.items() <= section.items()
    return str(section.get("scheme")) if ours else None


def quantization_named(raw: dict) -> str | None:
    """How a config.json says that the weights are quantized, by jlayer or another program; None:
    not at all."""
    said = next((raw[field] for field in _QUANTIZED if raw.get(field)), None)
    return None if said is None else own_quantization(raw) or _method(said)


def _refuse_quantized(raw, known, where):
    field = next((field for field in _QUANTIZED if raw.get(field)), _QUANTIZED[0])
    said = raw.get(field)
    if field == _QUANTIZED[0] and isinstance(said, dict) and method_of(said) in known:
        return
    if said and own_quantization(raw) is None:
        raise UnsupportedModelError(
            f"{where}: {field}: {quantized_by(_method(said))}; where the weights are not quantized "
            f"at all, remove {field} from config.json"
        )


def quantized_by(method: str) -> str:
    """What to tell whoever has weights that another program has quantized."""
    return (
        f"weights quantized by {printable(method)} are not supported; take the model's unquantized "
        "checkpoint (jlayer convert --quantize int8 or int4 makes that small)"
    )


def _method(said):
    said = said if isinstance(said, dict) else {"quant_method": said}
    by_key = (method for key, method in _METHOD_BY_KEY.items() if key in said)
    return str(said.get("quant_method") or next(by_key, "a method that is not named"))


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
