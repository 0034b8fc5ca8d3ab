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
from dataclasses import dataclass, replace
from functools import cached_property

import regex

from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.names import Names
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.checkpoint.source import SourceFile, names_in, read_shard, regular_file
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.adapted import multiplied
from jlayer.families.fields import Fields, printable
from jlayer.families.layout import in_pairs, is_rearranged, paired_heads
from jlayer.families.registry import (
    family_of,
    head_leaf,
    layer_kinds,
    layer_of,
    layer_tensor_name,
    published_tensors,
)
from jlayer.spec import ITEM_BYTES, ModelConfig
from jlayer.strict import parse_json_object, read_small_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_NAME = re.compile(rf"base_model\.model\.(.+)\.({'|'.join(map(re.escape, (_A, _B, _MAGNITUDE)))})")
_COPY = re.compile(
    r"base_model\.model\.(?:.+\.)?((?!base_layer)[^.]+)(?:\.base_layer)?\.(weight|bias)"
)
# Where the modules of transformers have the text model of a multimodal one.
_TEXT_MODELS = ("model.language_model.", "language_model.model.")
# What is read, and what says how an adapter was made or where: the tensors tell the rest.
_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
}
_TOLD = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    "task_type",
}
_ALL_LINEAR = "all-linear"
PATIENCE_S = 2.0  # for a pattern and a name: some patterns take longer than anybody lives
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which the sum is computed
# Keys whose values change what is computed -> those under which it is what stands above.
_ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change W itself
}
_LACKS = "which is not supported; merge it with PEFT (merge_and_unload) and take the result"


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix: the tensors `a` and `b` of the adapter, and `magnitude` if it
    has one. `scale`: what B A is multiplied by; PEFT makes it of `alpha`. `shape`: of the matrix.
    `heads`: the rows of so many heads are in pairs there (`families.layout`), and are not in the
    adapter; None: in the same order."""

    a: str
    b: str
    magnitude: str | None
    rank: int
    alpha: float
    scale: float
    shape: tuple[int, int]
    heads: int | None = None

    def ordered(self, rows):
        """An array of the adapter with a row for each of the matrix's, in the order of those."""
        return rows if self.heads is None else in_pairs(rows, self.heads)


@dataclass(frozen=True)
class Adapter:
    """An adapter for a model. `matrices`: published name of a matrix -> what is added to it.
    `tensors`: those of `file`. `copies`: published name of a tensor of the model -> the tensor here
    that has to be equal to it (`copies.check_copies`)."""

    folder: str
    file: SourceFile
    tensors: dict[str, TensorEntry]
    matrices: dict[str, LowRank]
    config_bytes: bytes
    copies: dict[str, str]

    @cached_property
    def digest(self) -> str:
        """Of its config and its weights: of equal adapters the same."""
        digest = hashlib.sha256(self.config_bytes)
        with open(self.file.real, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def read_adapter(folder: str | os.PathLike, cfg: ModelConfig) -> Adapter:
    """The adapter in a folder, for a model, of which it may have copies: whoever uses it compares
    them. Raises CheckpointError, UnsupportedModelError or StorageError."""
    folder = os.fspath(folder)
    _check_names(folder)
    config = regular_file(folder, CONFIG)
    raw = read_small_file(config.real)
    fields = Fields(parse_json_object(raw, what=config.path), config.path)
    _check_supported(fields)
    file = regular_file(folder, WEIGHTS)
    tensors = read_shard(file)
    shapes = published_tensors(cfg)
    copies = _copies(file, tensors, shapes, cfg)
    modules = _modules(file, tensors.keys() - set(copies.values()))
    named = _matrices(file, modules, shapes, cfg)
    _check_targets(fields, file, modules)
    matrices = {
        name: replace(
            _low_rank(file, fields, module, modules[module], tensors, shapes[name]),
            heads=heads_in_pairs(cfg, name),
        )
        for name, module in named.items()
    }
    return Adapter(folder, file, tensors, matrices, raw, copies)


def layer_matrices(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Published name -> shape of the matrices in layers that are multiplied by rows, in the model's
    order: not those of experts, and none that a function reads uncut."""
    found = {}
    for layer, kind in enumerate(layer_kinds(cfg)):
        own = multiplied(kind)
        leaves = (leaf for leaf in kind.leaves if leaf.name in own)
        found |= {layer_tensor_name(cfg, leaf, layer): leaf.shape(cfg) for leaf in leaves}
    return found


def heads_in_pairs(cfg: ModelConfig, name: str) -> int | None:
    """As `families.layout.paired_heads`, of a matrix by its published name alone."""
    layer = layer_of(name)
    attention = None if layer is None else layer_kinds(cfg)[layer].attention
    return paired_heads(cfg, name, attention)


def _check_names(folder):
    expected = "expected an adapter's folder, as PEFT saves it"
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder, {expected}")
    names = names_in(folder)
    if WEIGHTS not in names and _PICKLE in names:
        raise UnsupportedModelError(
            f"{os.path.join(folder, _PICKLE)}: an adapter's pickle is not read; load it with PEFT, "
            f"save it again (save_pretrained), and take the folder with {WEIGHTS}"
        )
    for name in (CONFIG, WEIGHTS):
        if name not in names:
            raise CheckpointError(f"{os.path.join(folder, name)}: missing, {expected}")


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

    named = _list_of(fields, "target_parameters", str)
    if others := [name for name in named if not name.endswith(".weight")]:
        raise UnsupportedModelError(
            f"{fields.where}: target_parameters has {listed(others)}, {_LACKS}"
        )


def _copies(file, tensors, shapes, cfg):
    """See `Adapter`. PEFT saves the head and the embedding as they were in training where one of
    them has an adapter, or the vocabulary was resized (`save_embedding_layers`)."""
    family, found = family_of(cfg), {}
    leaves = {leaf.published.split(".")[-2]: leaf for leaf in (family.embedding, head_leaf(cfg))}
    leaves.setdefault(family.head_matrix.published.split(".")[-2], head_leaf(cfg))
    for name in tensors:
        match = _COPY.fullmatch(name)
        if match is None or match[1] not in leaves:
            continue
        published = leaves[match[1]].published.removesuffix("weight") + match[2]
        shape = tensors[name].shape
        if published not in shapes or shape != shapes[published]:
            own = list(shapes[published]) if published in shapes else "none"
            raise UnsupportedModelError(
                f"{file.path}: has {name} {list(shape)}, the model's own is {own}: a resized "
                f"vocabulary, {_LACKS}"
            )
        found[published] = name
    return found


def _modules(file, tensors):
    """Module -> the tensors of its A, B and magnitude by their kind."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in sorted(tensors):
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


def _matrices(file, modules, shapes, cfg):
    """Published name of a matrix -> the module that it is in."""
    tied = [module for module in modules if _is_shared(module, cfg)]
    if tied:
        raise UnsupportedModelError(
            f"{file.path}: changes {listed(tied)}, which the model uses twice, {_LACKS}"
        )
    leads = [lead for lead in _TEXT_MODELS if any(module.startswith(lead) for module in modules)]
    used = frozenset(shapes) - {family_of(cfg).embedding.published}  # no product: PEFT has others
    names = Names(cfg, used, *leads[:1])
    table = {f"{module}.weight": module for module in modules}
    found = names.renamed(table, where=file.path)
    unknown = [
        module for name, module in found.items() if name not in used or len(shapes[name]) != 2
    ]
    if unknown:
        raise CheckpointError(
            f"{file.path}: has modules that are no matrices of the model: {listed(unknown)}; "
            "take the model that the adapter was trained for or, if that is this one, merge it "
            "with PEFT (merge_and_unload) and take the result"
        )
    if rearranged := [module for name, module in found.items() if is_rearranged(cfg, name)]:
        raise UnsupportedModelError(
            f"{file.path}: changes {listed(rearranged)}, whose rows are in another order where the "
            "model comes from a GGUF file; take its plain checkpoint"
        )
    return found


def _is_shared(module, cfg):
    """Whether a module is the embedding or the head, where they are one; under any lead."""
    family = family_of(cfg)
    ends = {leaf.published.split(".")[-2] for leaf in (family.embedding, family.head_matrix)}
    return head_leaf(cfg) is family.embedding and module.rpartition(".")[2] in ends


def _check_targets(fields, file, modules):
    """PEFT passes over tensors of modules that the config does not name, with a warning."""
    others = [module for module in modules if not _is_target(fields, module)]
    if others:
        raise CheckpointError(
            f"{file.path}: has {listed(others)}, which target_modules, target_parameters, "
            f"exclude_modules or layers_to_transform in {CONFIG} leave out; fetch both again"
        )


def _is_target(fields, module):
    """As `check_target_module_exists` of PEFT's tuners/tuners_utils.py. Without targets in the
    config PEFT knows those of many models, and the tensors are taken as they are."""
    if _is_by_weight(fields, module):
        return True
    if _is_among(fields, "exclude_modules", module):
        return False
    targets = fields.raw.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
        return True
    if not _is_among(fields, "target_modules", module):
        return False
    return isinstance(targets, str) or _is_of_layers(fields, module)


def _is_by_weight(fields, module):
    """Whether a matrix is there by the name of its parameter: PEFT computes the same then."""
    ends = _list_of(fields, "target_parameters", str)
    return any(f".{module}.weight".endswith(f".{end}") for end in ends)


def _is_among(fields, key, module):
    """Whether a pattern matches the whole name, or one of a list of names its end."""
    found = fields.raw.get(key)
    if isinstance(found, str):
        return _match(fields, key, found, module, how=regex.fullmatch) is not None
    return any(f".{module}".endswith(f".{name}") for name in _list_of(fields, key, str))


def _is_of_layers(fields, module):
    wanted = fields.raw.get("layers_to_transform")
    layers = [wanted] if type(wanted) is int else _list_of(fields, "layers_to_transform", int)
    if not layers:
        return True
    given = fields.raw.get("layers_pattern")
    names = [given] if given and isinstance(given, str) else None
    names = names or _list_of(fields, "layers_pattern", str)
    around = r"(?:^|.*?\.){}\.(?P<layer>\d+)\." if names else r".*?\.{}\.(?P<layer>\d+)\."
    how = {"around": around}
    matches = (_match(fields, "layers_pattern", n, module, **how) for n in names or [r"[^.]*"])
    match = next(filter(None, matches), None)
    return match is not None and match["layer"] is not None and int(match["layer"]) in layers


def _list_of(fields, key, kind):
    found = fields.raw.get(key) or []
    if not isinstance(found, list) or any(type(value) is not kind for value in found):
        one = {int: "a number", str: "a pattern or a name"}[kind]
        raise CheckpointError(
            f"{fields.where}: {key} is {found!a:.80}, expected {one}, or a list of them"
        )
    return found


def _match(fields, key, pattern, module, *, around="{}", how=regex.match):
    """`around`: what PEFT has around a pattern of the config. It is one of `re`, as PEFT's are, but
    its matching has an end."""
    whole = around.replace("{}", pattern)
    try:
        re.compile(whole)
        return how(whole, module, timeout=PATIENCE_S)
    except TimeoutError:
        raise CheckpointError(
            f"{fields.where}: {key} has {printable(pattern)!a:.80}, which after {PATIENCE_S:g} s "
            f"had neither matched {module} nor not; write it without repeats of repeats"
        ) from None
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{fields.where}: {key} has {printable(pattern)!a}, which is no pattern ({error})"
        ) from None


def _low_rank(file, fields, module, parts, tensors, shape):
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
    named = f"{module}.weight" if _is_by_weight(fields, module) else module
    rank = _of_module(fields, "rank_pattern", named, fields.integer("r"))
    alpha = _of_module(fields, "alpha_pattern", named, fields.positive("lora_alpha"))
    out, width = shape
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
    if alpha / root > _LARGEST:
        raise CheckpointError(
            f"{fields.where}: lora_alpha is {alpha:g} for {module}, expected less than "
            f"{_LARGEST:.3g} times its rank; fetch the file again"
        )
    magnitude = parts.get(_MAGNITUDE)
    return LowRank(parts[_A], parts[_B], magnitude, rank, alpha, alpha / root, (out, width))


def _of_module(fields, key, module, default):
    """What a pattern says of a module, the first that matches the end of its name as PEFT does."""
    patterns = fields.raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{fields.where}: {key} is {patterns!a:.80}, expected an object")
    for pattern in patterns:
        if _match(fields, key, pattern, module, around=r"(.*\.)?({})$"):
            own = Fields(patterns, f"{fields.where}: {key}")
            return own.integer(pattern) if key == "rank_pattern" else own.positive(pattern)
    return default
