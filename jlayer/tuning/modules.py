"""The matrices of a model by the names that PEFT knows them by: which can be trained, how few words
name them, and what the config of an adapter says of them.

A module is a published name without `.weight`. Its end is what follows the number of its layer
(`self_attn.q_proj`), or the last words of that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from jlayer.checkpoint.adapter import layer_matrices
from jlayer.families.base import BODY
from jlayer.families.layout import is_rearranged
from jlayer.families.registry import (
    family_of,
    is_latent_matrix,
    is_of_an_expert,
    layer_of,
    published_tensors,
    stacked_tensors,
)
from jlayer.spec import ModelConfig

_END = ".weight"
# Of these model types PEFT (0.18 and later, with transformers 5) takes a target of such a name, in
# whatever module, for the experts, which transformers has as one parameter
# (peft/utils/transformers_weight_conversion.py). Dense layers and shared experts have them too, and
# are found by the name of the parameter, as the same LoRA (PEFT 0.17 and later).
_FUSED = ("gate_proj", "up_proj", "down_proj")
_OF_FUSED_EXPERTS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("ernie4_5_moe", "qwen3_moe", "qwen3_next", "hunyuan_v1_moe", "olmoe"),
)


@dataclass(frozen=True)
class Module:
    """A matrix of a model. `end`: its name without that of its layer; the whole name outside the
    layers, where `layer` is None."""

    published: str
    layer: int | None
    end: str

    @property
    def name(self) -> str:
        return self.published.removesuffix(_END)

    def is_called(self, words: str) -> bool:
        """Whether the last words of its name are these, as PEFT looks for a target."""
        return f".{self.name}".endswith(f".{words}")


def module_of(cfg: ModelConfig, published: str) -> Module:
    """The module of a published matrix."""
    layer = layer_of(published)
    prefix = "" if layer is None else family_of(cfg).layer_prefix.format(layer=layer)
    return Module(published, layer, published.removeprefix(prefix).removesuffix(_END))


def name_there(published: str, lead: str = BODY) -> str:
    """What transformers calls the module of a published matrix, where `lead` stands before the
    names of the text model's modules."""
    return lead + published.removeprefix(BODY).removesuffix(_END)


def trainable(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Published name -> shape of the matrices that can have an adapter which is trained, in the
    model's order: all linear modules of its layers but those of `untrained`."""
    shapes = layer_matrices(replace(cfg, additions=None))
    return {name: shape for name, shape in shapes.items() if not is_rearranged(cfg, name)}


def untrained(cfg: ModelConfig) -> dict[str, str]:
    """Published name -> what it is, of the matrices that can have none."""
    plain, known = replace(cfg, additions=None), trainable(cfg)
    shapes = published_tensors(plain)
    names = [name for name, shape in shapes.items() if len(shape) == 2 and name not in known]
    head = family_of(cfg).head_matrix.published  # a module also where it is the embedding
    return {name: _what(cfg, name) for name in (*names, head, *stacked_tensors(plain))}


def _what(cfg, name):
    if is_of_an_expert(name) or name in stacked_tensors(replace(cfg, additions=None)):
        return "of many experts"
    if is_latent_matrix(name):
        return "used uncut, for keys and values of a latent"
    if is_rearranged(cfg, name):
        return "in another order in a GGUF file"
    if name == family_of(cfg).embedding.published:
        return "the embedding"
    if name == family_of(cfg).head_matrix.published:
        return "the head"
    return "used uncut, as routers and norms are"


def choices(cfg: ModelConfig) -> list[str]:
    """The fewest words that name each kind of matrix that can be trained, and no other."""
    ends = dict.fromkeys(module_of(cfg, name).end for name in trainable(cfg))
    others = {module_of(cfg, name).end for name in untrained(cfg)}
    return [_shortest(end, others | (ends.keys() - {end})) or end for end in ends]


def said_of_targets(cfg: ModelConfig, names: Iterable[str], lead: str = BODY) -> dict:
    """What the config of an adapter says of the matrices that it is for: `target_modules`,
    `layers_to_transform` and, where there are such, `target_parameters`.

    Ends where they name these matrices and no others of the model, in all layers or in some; else,
    and where another model is around the text's, whole names.
    """
    found = [module_of(cfg, name) for name in names]
    own = {one.published for one in found}
    known = {**trainable(cfg), **untrained(cfg)}
    others = [module_of(cfg, name) for name in known if name not in own]
    weights = [one for one in found if _is_named_by_weight(cfg, one)]
    said = _said(found=[one for one in found if one not in weights], others=others, lead=lead)
    if weights:
        ends = _ends_of(weights, others) if lead == BODY else None
        called = ends or [name_there(one.published, lead) for one in weights]
        said["target_parameters"] = [one + _END for one in called]
    return said


def is_named_by_weight(cfg: ModelConfig, published: str) -> bool:
    """Whether PEFT finds a matrix by the name of its parameter alone (`target_parameters`)."""
    return _is_named_by_weight(cfg, module_of(cfg, published))


def _is_named_by_weight(cfg, module):
    return cfg.model_type in _OF_FUSED_EXPERTS and module.end.split(".")[-1] in _FUSED


def _said(found, others, lead):
    layers = sorted({one.layer for one in found})
    for among in (None, layers) if lead == BODY else ():
        ends = _ends_of(found, [one for one in others if among is None or one.layer in among])
        if ends is not None:
            return {"target_modules": ends, "layers_to_transform": among}
    called = [name_there(one.published, lead) for one in found]
    return {"target_modules": called, "layers_to_transform": None}


def _ends_of(found, others):
    """Ends that tell these modules from the others, sorted; None where none do: one of the others
    is called the same in another layer."""
    apart = {one.end for one in others}
    ends = {_shortest(one.end, apart) for one in found}
    return None if None in ends else sorted(ends)


def _shortest(end: str, others: Collection[str]) -> str | None:
    """The fewest last words of `end` that no other one ends in; None where all are not enough."""
    words = end.split(".")
    tries = (".".join(words[-n:]) for n in range(1, len(words) + 1))
    return next(
        (one for one in tries if not any(f".{o}".endswith(f".{one}") for o in others)), None
    )
