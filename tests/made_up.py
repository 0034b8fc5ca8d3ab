"""A model family that nobody published, as data: three kinds of layers in turn, made of the
functions that there are. What holds for it holds because tables are read, not for Llama alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from jlayer.config import model_config
from jlayer.families.base import Family, Function, LayerKind, Stage, one
from jlayer.families.llama import DECODER, LLAMA
from jlayer.families.registry import published_tensors
from jlayer.spec import Leaf, ModelConfig, Role
from tests.tiny import TINY

NAME = "made_up"
_QKV, _O, _GATE_UP, _DOWN = DECODER.stages

# An MLP without a gate or an activation.
GATELESS = replace(
    DECODER,
    name="gateless",
    leaves=tuple(leaf for leaf in DECODER.leaves if "gate" not in leaf.name),
    stages=(
        _QKV,
        _O,
        Stage("up", groups=(one("up_proj"),), finish=Function("pass_on", (), ("x",))),
        _DOWN,
    ),
)
# The MLP before attention: other stages make the input of the first and use the cache last.
MLP_FIRST = LayerKind(
    "mlp_first",
    leaves=DECODER.leaves,
    stages=(
        replace(_GATE_UP, input=_QKV.input),
        replace(_DOWN, finish=_O.finish),
        replace(_QKV, input=None),
        replace(_O, finish=_DOWN.finish),
    ),
)


def kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """Each kind in turn. The second and third have the same leaves, in another order of stages."""
    all_kinds = [kind.for_config(cfg) for kind in (GATELESS, MLP_FIRST, DECODER)]
    return tuple(all_kinds[layer % 3] for layer in range(cfg.num_hidden_layers))


FAMILY = Family(NAME, "MadeUpForCausalLM", kinds, head_input=LLAMA.head_input)

# A norm of what attention gives, before it is projected: a stage whose input is made of what the
# stage before has left.
SUB_NORM = replace(
    DECODER,
    name="sub_norm",
    leaves=(
        *DECODER.leaves,
        Leaf("sub_norm", "self_attn.sub_norm.weight", ("heads",), Role.NORM),
    ),
    stages=(
        _QKV,
        replace(_O, input=Function("normed", ("x",), ("x",), whole=("sub_norm",))),
        _GATE_UP,
        _DOWN,
    ),
)


def _sub_norm_kinds(cfg):
    return (SUB_NORM.for_config(cfg),) * cfg.num_hidden_layers


SUB_NORM_FAMILY = Family("sub_norm", "SubNormForCausalLM", _sub_norm_kinds, LLAMA.head_input)
FAMILIES = {family.model_type: family for family in (FAMILY, SUB_NORM_FAMILY)}


def config(**overrides) -> ModelConfig:
    """A configuration of the family, while it is among the known ones."""
    return model_config(_published(overrides), where="made up")


def save(folder: Path, *, seed: int = 0, **overrides) -> Path:
    """Saves a random model of the family as it would be published; returns the folder."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.normal(1.0 if "norm" in name else 0.0, 0.2, shape)).astype(np.float32)
        for name, shape in published_tensors(config(**overrides)).items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_published(overrides)))
    return folder


def _published(overrides):
    return {"model_type": NAME, **TINY, "num_hidden_layers": 4, **overrides}
