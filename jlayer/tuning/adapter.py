"""A low-rank adapter that is trained: which matrices get one, how it begins, and how it is written
and read as PEFT does (https://huggingface.co/docs/peft).

The trained state is, everywhere, {published name of a matrix: {"a": float32 [rank, in], "b":
float32 [out, rank]}}, in the model's order; rows of "b" are in the order of the matrix as it is
stored, which in a GGUF file may be another than the published one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jlayer.additions import Additions
from jlayer.checkpoint.adapter import CONFIG, WEIGHTS, heads_in_pairs, read_adapter
from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.copies import AGAIN
from jlayer.config import closest
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.adapted import A_END, B_END
from jlayer.families.base import BODY
from jlayer.families.fields import Fields, as_integer
from jlayer.families.layout import in_halves
from jlayer.interrupts import imported
from jlayer.spec import ITEM_BYTES, ModelConfig
from jlayer.strict import parse_json_object
from jlayer.tuning.disk import new_folder
from jlayer.tuning.modules import (
    choices,
    is_named_by_weight,
    module_of,
    name_there,
    said_of_targets,
    trainable,
    untrained,
)

ALL = "all"
CARD = "README.md"
_END = ".weight"
State = dict[str, dict]
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which the sum is computed
_PARTS = {"a": A_END, "b": B_END}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is like. B A is multiplied by alpha / rank, or alpha / sqrt(rank) (`rslora`,
    arXiv 2312.03732). `targets`: the matrices that get one, "all" or the last words of their names
    (`q_proj`, `mlp.up_proj`). `layers`: the layers that get one; (): all.

    Raises UsageError for values that cannot be.
    """

    rank: int = 16
    alpha: float = 32
    rslora: bool = False
    targets: str | tuple[str, ...] = ALL
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise UsageError(f"rank is {self.rank!r}, expected a whole number from 1")
        is_number = type(self.alpha) in (int, float) and math.isfinite(self.alpha)
        if not is_number or self.alpha <= 0 or self.scale > _LARGEST:
            raise UsageError(f"alpha is {self.alpha!r}, expected a number above 0, as 2 x rank")
        _check_names(self.targets)
        odd = [layer for layer in self.layers if type(layer) is not int or layer < 0]
        if odd or len(set(self.layers)) != len(self.layers):
            raise UsageError(f"layers are {self.layers!r}, expected numbers from 0, each once")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale_of(self.alpha, self.rank, self.rslora)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by, as PEFT computes it."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _check_names(targets):
    if targets == ALL:
        return
    names = targets if isinstance(targets, tuple) else (targets,)
    is_list = isinstance(targets, tuple) and len(targets) > 0
    if not is_list or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"targets are {targets!r}, expected {ALL!r} or names of matrices")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"targets: {twice[0]} is there twice")


def targets_of(cfg: ModelConfig, how: AdapterConfig) -> dict[str, tuple[int, int]]:
    """Published name -> shape [out, in] of the matrices that get an adapter, in the model's order.

    "all" is PEFT's `all-linear` without what cannot be trained here (`modules.untrained`): experts,
    routers, the matrix of latent attention that is used uncut. Raises UsageError for a name that
    matches nothing, or only such, and for a layer that the model does not have.
    """
    last = cfg.num_hidden_layers - 1
    if beyond := [layer for layer in how.layers if layer > last]:
        raise UsageError(f"layers: {beyond[0]} is not there, expected numbers from 0 to {last}")
    shapes = trainable(cfg)
    inside = [one for one in (module_of(cfg, name) for name in shapes) if _is_in(one, how)]
    chosen = {one.published for one in inside}
    if how.targets != ALL:
        by_name = {name: {one.published for one in inside if one.is_called(name)}
                   for name in how.targets}  # fmt: skip
        for name, matched in by_name.items():
            if not matched:
                raise UsageError(_refusal(cfg, how, name))
        chosen = set().union(*by_name.values())
    return {name: shape for name, shape in shapes.items() if name in chosen}


def _is_in(module, how):
    return not how.layers or module.layer in how.layers


def _refusal(cfg, how, name):
    known = choices(cfg)
    advice = f"choose among {', '.join(known)}, or {ALL}"
    if any(module_of(cfg, one).is_called(name) for one in trainable(cfg)):
        layers = ", ".join(map(str, how.layers))
        return f"targets: {name} is in none of the layers {layers}; name others, or leave them out"
    whats = {
        what: None for one, what in untrained(cfg).items() if module_of(cfg, one).is_called(name)
    }
    if whats:
        return f"targets: {name} is {' and '.join(whats)}, which cannot be trained; {advice}"
    return (
        f"targets: {name!a:.80} is no matrix of a {cfg.model_type}{closest(name, known)}; {advice}"
    )


def fresh(targets: Mapping[str, tuple[int, int]], how: AdapterConfig, seed: int) -> State:
    """The state that training begins from, as PEFT's: A uniform within 1 / sqrt(in) (Kaiming's rule
    with a = sqrt(5)), B zeros, so that the model is unchanged. The same on every machine."""
    np = imported("numpy")

    if type(seed) is not int or seed < 0:
        raise UsageError(f"seed is {seed!r}, expected a whole number from 0")
    state = {}
    for index, (name, (out, width)) in enumerate(targets.items()):
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
        unit = draw.random((how.rank, width), dtype=np.float32)
        bound = np.float32(1 / math.sqrt(width))
        state[name] = {
            "a": (unit * np.float32(2) - np.float32(1)) * bound,
            "b": np.zeros((out, how.rank), np.float32),
        }
    return state


def low_ranks(
    state: State, how: AdapterConfig, alphas: Mapping[str, float] | None = None
) -> Additions:
    """What the state adds to the matrices of a model, for its config. `alphas`: of the matrices
    that have another than `how`."""
    alphas = alphas or {}
    rows = []
    for name, parts in state.items():
        rank = len(parts["a"])
        rows.append((name, rank, scale_of(alphas.get(name, how.alpha), rank, how.rslora)))
    return Additions.of_one(rows)


@dataclass(frozen=True)
class Begun:
    """An adapter to go on from. `how`: what its config says; its targets are ends of whole names.
    `alphas`: published name -> alpha, of the matrices that have another than `how`."""

    state: State
    how: AdapterConfig
    alphas: dict[str, float] = field(default_factory=dict)
    digest: str = ""


def load_adapter(folder: str | os.PathLike, cfg: ModelConfig) -> Begun:
    """The adapter in a PEFT folder, in float32. Matrices may have ranks of their own.

    Raises CheckpointError, UnsupportedModelError (one that cannot be trained on) or StorageError.
    """
    adapter, shapes = read_adapter(folder, cfg), trainable(cfg)
    others = sorted(adapter.matrices.keys() - shapes.keys())
    lengths = [name for name, added in adapter.matrices.items() if added.magnitude]
    if others or lengths:
        what = "scales the rows of" if lengths else "changes"
        raise UnsupportedModelError(
            f"{adapter.folder}: {what} {listed(lengths or others)}, which cannot be trained; "
            "begin with another adapter, or with none"
        )
    if adapter.copies:
        raise UnsupportedModelError(
            f"{adapter.file.path}: has {listed(sorted(adapter.copies.values()))}, copies of the "
            f"model's own that nothing is trained in; {AGAIN}"
        )
    state, matrices = {}, adapter.matrices
    for name in (name for name in shapes if name in matrices):
        a, b = (_read(adapter, tensor) for tensor in (matrices[name].a, matrices[name].b))
        state[name] = {"a": a, "b": matrices[name].ordered(b)}
    fields = Fields(parse_json_object(adapter.config_bytes, what=CONFIG), CONFIG)
    how = AdapterConfig(
        rank=fields.integer("r"),
        alpha=as_integer(fields.positive("lora_alpha")),
        rslora=fields.boolean("use_rslora"),
        targets=tuple(dict.fromkeys(module_of(cfg, name).end for name in state)),
        layers=_layers_of(cfg, state),
    )
    alphas = {name: one.alpha for name, one in matrices.items() if one.alpha != how.alpha}
    return Begun(state, how, alphas, adapter.digest)


def _layers_of(cfg, state):
    layers = sorted({module_of(cfg, name).layer for name in state})
    return () if layers == list(range(cfg.num_hidden_layers)) else tuple(layers)


def _read(adapter, tensor):
    np, ml_dtypes = imported("numpy"), imported("ml_dtypes")

    entry = adapter.tensors[tensor]
    with open(adapter.file.real, "rb") as file:
        file.seek(entry.offset)
        raw = file.read(entry.n_bytes)
    numbers = np.frombuffer(raw, getattr(ml_dtypes, entry.dtype, entry.dtype)).reshape(entry.shape)
    numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise CheckpointError(
            f"{adapter.file.path}: {tensor} has NaN or infinite numbers, expected finite ones; "
            "fetch the file again, or take an earlier state of the adapter"
        )
    return numbers


def save_adapter(
    folder: str | os.PathLike,
    state: State,
    cfg: ModelConfig,
    how: AdapterConfig,
    *,
    base: str,
    card: str,
    dropout: float = 0.0,
    alphas: Mapping[str, float] | None = None,
    lead: str = BODY,
) -> None:
    """Writes the state as an adapter of PEFT's into the new folder `folder`, whole or not at all.

    `base`: the model's id or folder. `card`: the text of its README.md. `alphas`: of the matrices
    that have another than `how`. `lead`: what transformers has before the names of the modules of a
    text model that is inside another (`families.holders.module_lead`).
    Equal states give equal bytes. Raises UsageError (the folder is there already) or StorageError.
    """
    said = _config(state, cfg, how, base=base, dropout=dropout, alphas=alphas or {}, lead=lead)
    contents = {
        WEIGHTS: _weights(state, cfg, lead),
        CARD: iter([card.encode()]),
        CONFIG: iter([json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"]),
    }
    new_folder(os.fspath(folder), contents)


def _config(state, cfg, how, *, base, dropout, alphas, lead):
    """What PEFT's LoraConfig writes. Keys that are younger than LoRA itself are left to their
    defaults: an older PEFT warns of those that it does not know."""
    ranks = {name: len(parts["a"]) for name, parts in state.items() if len(parts["a"]) != how.rank}
    alphas = {name: alphas[name] for name in state if alphas.get(name, how.alpha) != how.alpha}
    targets = said_of_targets(cfg, state, lead)
    if "target_parameters" in targets:
        dropout = 0.0  # PEFT refuses another one there, and has no use for it when it computes
    return {
        "alpha_pattern": _by_pattern(cfg, alphas, lead),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "lora_alpha": as_integer(how.alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": how.rank,
        "rank_pattern": _by_pattern(cfg, ranks, lead),
        "revision": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": how.rslora,
        **targets,
    }


def _by_pattern(cfg, values, lead):
    return {
        re.escape(name_there(name, lead) + _END * is_named_by_weight(cfg, name)): as_integer(value)
        for name, value in values.items()
    }


def _weights(state: State, cfg, lead) -> Iterator[bytes | memoryview]:
    """The file of the tensors, sorted by their names as safetensors itself writes them."""
    tensors = {
        f"base_model.model.{name_there(name, lead)}.{end}": (name, part)
        for name in state
        for part, end in _PARTS.items()
    }
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for tensor in sorted(tensors):
        name, part = tensors[tensor]
        shape = state[name][part].shape
        n_bytes = math.prod(shape) * ITEM_BYTES["float32"]
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the numbers are aligned
    yield len(raw).to_bytes(8, "little") + raw
    for tensor in sorted(tensors):
        yield _bytes_of(state, cfg, *tensors[tensor])


def _bytes_of(state, cfg, name, part):
    """The numbers of one tensor, its rows in the published order."""
    np = imported("numpy")

    numbers, heads = state[name][part], heads_in_pairs(cfg, name)
    assert numbers.dtype == np.float32, (name, part, numbers.dtype)
    if part == "b" and heads is not None:
        numbers = in_halves(numbers, heads)
    return memoryview(np.ascontiguousarray(numbers, "<f4")).cast("B")
