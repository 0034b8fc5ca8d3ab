"""A model family that nobody published, as data: three kinds of layers in turn, made of the
functions that there are. What holds for it holds because tables are read, not for Llama alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from jlayer.config import model_config
from jlayer.families.base import Family, Function, LayerKind, Stage, one
from jlayer.families.decoder import decoder, norm_at
from jlayer.families.llama import LLAMA
from jlayer.families.registry import published_tensors
from jlayer.parts import head_sizes
from jlayer.spec import Leaf, ModelConfig, Role
from tests.tiny import TINY

NAME = "made_up"


def _gateless(kind: LayerKind) -> LayerKind:
    """An MLP without a gate or an activation."""
    qkv, o, _, down = kind.stages
    up = Stage("up", groups=(one("up_proj"),), finish=Function("pass_on", (), ("x",)))
    return replace(
        kind,
        name="gateless",
        leaves=tuple(leaf for leaf in kind.leaves if "gate" not in leaf.name),
        stages=(qkv, o, up, down),
    )


def _mlp_first(kind: LayerKind) -> LayerKind:
    """The MLP before attention: other stages make the input of the first and use the cache last."""
    qkv, o, gate_up, down = kind.stages
    return replace(
        kind,
        name="mlp_first",
        stages=(
            replace(gate_up, input=qkv.input),
            replace(down, finish=o.finish),
            replace(qkv, input=None),
            replace(o, finish=down.finish),
        ),
    )


def kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """Each kind in turn. The second and third have the same leaves, in another order of stages."""
    plain = decoder(cfg, cfg.attention)
    all_kinds = (_gateless(plain), _mlp_first(plain), plain)
    return tuple(all_kinds[layer % 3] for layer in range(cfg.num_hidden_layers))


FAMILY = Family(NAME, "MadeUpForCausalLM", LLAMA.read, kinds)


def _sub_norm_kinds(cfg):
    """A norm of what attention gives, before it is projected: a stage whose input is made of what
    the stage before has left."""
    kind = decoder(cfg, cfg.attention)
    qkv, o, gate_up, down = kind.stages
    norm = Leaf(
        *("sub_norm", "self_attn.sub_norm.weight", ("heads",), Role.NORM),
        sizes=tuple(head_sizes(cfg.attention).items()),
    )
    how = norm_at(cfg.norm, "sub_norm")
    sub = replace(o, input=Function("normed", ("x",), ("x",), ("sub_norm",), how))
    found = replace(
        kind, name="sub_norm", leaves=(*kind.leaves, norm), stages=(qkv, sub, gate_up, down)
    )
    return (found,) * cfg.num_hidden_layers


SUB_NORM_FAMILY = Family("sub_norm", "SubNormForCausalLM", LLAMA.read, _sub_norm_kinds)
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
