"""Low-rank adapters as PEFT saves them (https://huggingface.co/docs/peft): what one adds to which
matrix of a model.

W [out, in] becomes W + scale * B A, where A is [rank, in] and B [out, rank] (LoRA, arXiv
2106.09685); scale is alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). With a
magnitude [out], every row of that then gets the length that it says (DoRA, arXiv 2402.09353).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property

from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.checkpoint.source import SourceFile, names_in, read_shard, regular_file
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.fields import Fields, printable
from jlayer.families.registry import published_tensors
from jlayer.spec import ITEM_BYTES, ModelConfig
from jlayer.strict import parse_json_object, read_small_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_NAME = re.compile(rf"base_model\.model\.(.+)\.({'|'.join(map(re.escape, (_A, _B, _MAGNITUDE)))})")
# What is read, and what says how an adapter was made or where: the tensors tell the rest.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
_TOLD = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}
# Keys whose values change what is computed -> those under which it is what stands above.
_ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change W itself
}
_LACKS = "which is not supported; merge it with PEFT (merge_and_unload) and take the result"


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix: the tensors `a` and `b` of the adapter, and `magnitude` if it
    has one. `shape`: of the matrix."""

    a: str
    b: str
    magnitude: str | None
    rank: int
    scale: float
    shape: tuple[int, int]


@dataclass(frozen=True)
class Adapter:
    """An adapter for a model. `matrices`: published name of a matrix -> what is added to it.
    `tensors`: those of `file`."""

    folder: str
    file: SourceFile
    tensors: dict[str, TensorEntry]
    matrices: dict[str, LowRank]
    config_bytes: bytes

    @cached_property
    def digest(self) -> str:
        """Of its config and its weights: of equal adapters the same."""
        digest = hashlib.sha256(self.config_bytes)
        with open(self.file.real, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def read_adapter(folder: str | os.PathLike, cfg: ModelConfig) -> Adapter:
    """The adapter in a folder, for a model. Raises CheckpointError, UnsupportedModelError or
    StorageError."""
    folder = os.fspath(folder)
    names = names_in(folder)
    for name in (CONFIG, WEIGHTS):
        if name not in names:
            raise CheckpointError(
                f"{os.path.join(folder, name)}: missing, expected an adapter's folder, as PEFT "
                "saves it"
            )
    config = regular_file(folder, CONFIG)
    raw = read_small_file(config.real)
    fields = Fields(parse_json_object(raw, what=config.path), config.path)
    _check_supported(fields)
    file = regular_file(folder, WEIGHTS)
    tensors = read_shard(file)
    modules = _modules(file, tensors)
    shapes = published_tensors(cfg)
    _check_modules(file, modules, shapes, cfg)
    matrices = {
        f"{module}.weight": _low_rank(file, fields, module, parts, tensors, shapes)
        for module, parts in modules.items()
    }
    return Adapter(folder, file, tensors, matrices, raw)


def _check_supported(fields):
    if fields.raw.get("peft_type") != "LORA":
        found = printable(str(fields.raw.get("peft_type")))
        raise UnsupportedModelError(f"{fields.where}: peft_type is {found!a}, {_LACKS}")
    for key, value in fields.raw.items():
        if key in _READ or key in _TOLD:
            continue
        is_known = value in _ONLY[key] if key in _ONLY else value in (None, False, [], {})
        if not is_known:
            found = printable(str(value))
            raise UnsupportedModelError(f"{fields.where}: {printable(key)} is {found}, {_LACKS}")


def _modules(file, tensors):
    """Module -> the tensors of its A, B and magnitude by their kind."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            found.setdefault(match[1], {})[match[2]] = name
    if others:
        raise UnsupportedModelError(
            f"{file.path}: has {listed(others)}, {_LACKS}; expected {_A}, {_B} and {_MAGNITUDE} of "
            "matrices alone"
        )
    if not found:
        raise CheckpointError(f"{file.path}: has no tensors, expected an adapter's")
    return found


def _check_modules(file, modules, shapes, cfg):
    unknown = [module for module in modules if len(shapes.get(f"{module}.weight", ())) != 2]
    if unknown:
        raise CheckpointError(
            f"{file.path}: has modules that are no matrices of the model: {listed(unknown)}; take "
            "the model that the adapter was trained for"
        )
    tied = [module for module in modules if _is_shared(f"{module}.weight", cfg)]
    if tied:
        raise UnsupportedModelError(
            f"{file.path}: changes {listed(tied)}, which the model uses twice, {_LACKS}"
        )


def _is_shared(name, cfg):
    return cfg.tie_word_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight")


def _low_rank(file, fields, module, parts, tensors, shapes):
    name = f"{module}.weight"
    missing = [part for part in (_A, _B) if part not in parts]
    if missing:
        raise CheckpointError(f"{file.path}: {module} has no {missing[0]}; fetch the file again")
    has_magnitude = _MAGNITUDE in parts
    if has_magnitude != fields.boolean("use_dora"):
        words = ("has", "false") if has_magnitude else ("has no", "true")
        raise CheckpointError(
            f"{file.path}: {module} {words[0]} {_MAGNITUDE}, but use_dora is {words[1]} in "
            f"{CONFIG}; fetch both again"
        )
    rank = _of_module(fields, "rank_pattern", module, fields.integer("r"))
    alpha = _of_module(fields, "alpha_pattern", module, fields.positive("lora_alpha"))
    out, width = shapes[name]
    expected = {_A: (rank, width), _B: (out, rank), _MAGNITUDE: (out,)}
    for part, tensor in parts.items():
        entry = tensors[tensor]
        if entry.shape != expected[part] or entry.dtype not in ITEM_BYTES:
            found = f"{entry.dtype} {list(entry.shape)}"
            kinds = ", ".join(ITEM_BYTES)
            raise CheckpointError(
                f"{file.path}: {tensor} is {found}, expected one of {kinds} and "
                f"{list(expected[part])}, by r and {CONFIG}; take the model that the adapter was "
                "trained for"
            )
    root = math.sqrt(rank) if fields.boolean("use_rslora") else rank
    magnitude = parts.get(_MAGNITUDE)
    return LowRank(parts[_A], parts[_B], magnitude, rank, alpha / root, (out, width))


def _of_module(fields, key, module, default):
    """What a pattern says of a module, the first that matches the end of its name as PEFT does."""
    patterns = fields.raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{fields.where}: {key} is {patterns!a:.80}, expected an object")
    for pattern in patterns:
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CheckpointError(
                f"{fields.where}: {key} has {printable(pattern)!a}, which is no pattern ({error})"
            ) from None
        if matches:
            own = Fields(patterns, f"{fields.where}: {key}")
            return own.integer(pattern) if key == "rank_pattern" else own.positive(pattern)
    return default
