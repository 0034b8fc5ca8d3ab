"""All known families, and what their tables say about one model: its kinds of layers, and every
tensor of a complete checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from jlayer.encodings.published import FORMS
from jlayer.families import (
    cohere,
    corrected,
    deepseek,
    gemma,
    glm,
    gpt_oss,
    layer_norms,
    llama,
    llama4,
    mixtures,
    olmo,
    phi,
    qwen_next,
)
from jlayer.families.adapted import (
    A_END,
    B_END,
    LENGTHS_END,
    adapted_kinds,
    added_leaves,
    with_additions,
)
from jlayer.families.base import (
    FINAL_NORM,
    LAYER_PREFIX,
    Family,
    Function,
    LayerKind,
    Stage,
    bias_name,
    one,
)
from jlayer.families.decoder import final_norm, norm_leaves
from jlayer.spec import Leaf, ModelConfig, Role

# A new family is a row in a file beside this one; a new file is a line here.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for rows in (
        *(llama, gemma, phi, olmo, glm, cohere, layer_norms),
        *(qwen_next, mixtures, corrected, deepseek, gpt_oss, llama4),
    )
    for family in rows.FAMILIES
}

# How the names of tensors with two axes end that are used whole, as published: norms of heads
# (Cohere), routers, the gates of shared experts, correction biases (Ernie), the matrix that makes
# keys and values of a latent, or those that do; and what an adapter has beside a matrix.
_LATENT = (".kv_b_proj.weight", ".k_b_proj.weight", ".v_b_proj.weight")
_WHOLE = (
    "norm.weight",
    ".gate.weight",
    ".router.weight",
    ".router.layer.weight",
    ".router.proj.weight",
    ".gate.wg.weight",
    "shared_expert_gate.weight",
    "e_score_correction_bias",
    *(f".{end}" for end in (A_END, B_END, LENGTHS_END)),
    *_LATENT,
)

_OF_AN_EXPERT = re.compile(r"\.experts\.[0-9]+\.")
_BEFORE, _AFTER = (re.escape(part) for part in LAYER_PREFIX.split("{layer}"))
_LAYER_NAME = re.compile(rf"{_BEFORE}(0|[1-9][0-9]{{0,8}}){_AFTER}(.+)", re.DOTALL)


def family_of(cfg: ModelConfig) -> Family:
    return FAMILIES[cfg.model_type]


@lru_cache(maxsize=64)
def layer_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of each decoder layer, with the leaves that this model has."""
    kinds = family_of(cfg).kinds(cfg)
    if cfg.additions is None:
        return kinds
    return adapted_kinds(cfg, kinds, lambda leaf, layer: layer_tensor_name(cfg, leaf, layer))


@lru_cache(maxsize=64)
def counted_kinds(cfg: ModelConfig) -> tuple[tuple[LayerKind, int], ...]:
    """(a kind of layer, the number of layers of it), for every kind: sums over the layers need no
    more."""
    return tuple(Counter(layer_kinds(cfg)).items())


@lru_cache(maxsize=64)
def windows_of(cfg: ModelConfig) -> tuple[int, ...]:
    """The windows that some layers have, each once."""
    found = {kind.cache.window for kind, _ in counted_kinds(cfg)} - {None}
    return tuple(sorted(found))


@lru_cache(maxsize=64)
def has_state(cfg: ModelConfig) -> bool:
    """Whether some layers keep a state of a lane, which cannot be cut back."""
    return any(kind.cache.kind == "state" for kind, _ in counted_kinds(cfg))


def final_norm_leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """The leaves of the norm before the head."""
    name = FINAL_NORM.published.removesuffix("norm.weight")
    return norm_leaves(cfg.norm, FINAL_NORM.name, name)


def final_leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """The leaves after the layers: the final norm and, unless tied to the embedding, the head; and
    what stands beside it."""
    head = () if cfg.tie_word_embeddings else (family_of(cfg).head_matrix,)
    return (*final_norm_leaves(cfg), *head, *beside_head(cfg))


def head_leaf(cfg: ModelConfig) -> Leaf:
    """The matrix of the head: the embedding, if the model ties them."""
    family = family_of(cfg)
    return family.embedding if cfg.tie_word_embeddings else family.head_matrix


def beside_head(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """The bias of the head, and what an adapter adds to it; () where it has none."""
    found, matrix = [], head_leaf(cfg)
    if cfg.head_bias:
        published = family_of(cfg).head_matrix.published.removesuffix("weight") + "bias"
        found.append(Leaf(bias_name(matrix.name), published, ("vocab",), Role.BIAS, of=matrix.name))
    if added := _added_to_head(cfg):
        found += added_leaves(cfg, matrix, added)
    return tuple(found)


def _added_to_head(cfg):
    """What adapters add to the head's product; None: nothing."""
    return cfg.additions and cfg.additions.of_matrix.get(head_leaf(cfg).published)


@lru_cache(maxsize=64)
def head_stage(cfg: ModelConfig) -> Stage:
    """The stage after the last layer; its products are the logits."""
    groups, added = (one(head_leaf(cfg).name),), _added_to_head(cfg)
    stage = Stage("head", groups, input=head_input(cfg), logits=cfg.logits)
    return with_additions(stage, {head_leaf(cfg).name: added}) if added else stage


def head_input(cfg: ModelConfig) -> Function:
    """The function that computes the head's input from the last hidden states."""
    norm = final_norm(cfg)
    return Function("normed", ("hidden",), ("x",), norm.leaves, norm)


def layer_tensor_name(cfg: ModelConfig, leaf: Leaf, layer: int, expert: int | None = None) -> str:
    published = leaf.published.format(expert=expert) if leaf.n_experts else leaf.published
    return family_of(cfg).layer_prefix.format(layer=layer) + published


def published_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a complete checkpoint of this model, in the order of use."""
    embedding = family_of(cfg).embedding
    shapes = {embedding.published: embedding.shape(cfg)}
    for layer, kind in enumerate(layer_kinds(cfg)):
        for leaf, expert in kind.tensors():
            shapes[layer_tensor_name(cfg, leaf, layer, expert)] = leaf.shape(cfg)
    for leaf in final_leaves(cfg):
        shapes[leaf.published] = leaf.shape(cfg)
    return shapes


class Stacked(NamedTuple):
    """A published tensor that holds leaves of all experts of a layer: its shape, and of each leaf
    (its name, its first row, the number of its rows), where rows are counted through all experts.
    `inputs_first`: as of `parts.Stack`."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]
    inputs_first: bool

    @property
    def of_expert(self) -> tuple[int, ...]:
        """The shape of what one expert has of it, rows first."""
        return self.shape[:0:-1] if self.inputs_first else self.shape[1:]

    @property
    def n_parts(self) -> int:
        """How many leaves of one expert it holds."""
        return len(self.parts) // self.shape[0]


@lru_cache(maxsize=8)
def stacked_tensors(cfg: ModelConfig) -> dict[str, Stacked]:
    """By name the tensors that may be there in the place of those of single experts."""
    stacks, found = cfg.experts.stacks if cfg.experts else (), {}
    sparse = [(n, kind) for n, kind in enumerate(layer_kinds(cfg)) if kind.n_experts]
    for layer, kind in sparse if stacks else ():
        for stack in stacks:
            leaves = [kind.leaf(name) for name in stack.leaves]
            shapes = [leaf.shape(cfg) for leaf in leaves]
            of_expert = (sum(n_rows for n_rows, *_ in shapes), *shapes[0][1:])
            of_expert = of_expert[::-1] if stack.inputs_first else of_expert
            parts = [
                (layer_tensor_name(cfg, leaf, layer, expert), n)
                for expert in range(kind.n_experts)
                for leaf, (n, *_) in zip(leaves, shapes, strict=True)
            ]
            ends = accumulate(n_rows for _, n_rows in parts)
            placed = ((name, end - n, n) for (name, n), end in zip(parts, ends, strict=True))
            name = family_of(cfg).layer_prefix.format(layer=layer) + stack.published
            shape = (kind.n_experts, *of_expert)
            found[name] = Stacked(shape, tuple(placed), stack.inputs_first)
    return found


def is_of_an_expert(tensor_name: str) -> bool:
    """Whether a published tensor, by its name, is of one of many experts."""
    return _OF_AN_EXPERT.search(tensor_name) is not None


def is_matrix(tensor_name: str, shape: tuple[int, ...]) -> bool:
    """Whether a published tensor is cut by rows, which are multiplied or looked up: it has two
    axes, and is none of those that are used whole."""
    return len(shape) == 2 and not tensor_name.endswith(_WHOLE)


def is_latent_matrix(tensor_name: str) -> bool:
    """Whether a published tensor makes keys and values of a latent: a matrix that is used whole."""
    return tensor_name.endswith(_LATENT)


def layer_of(tensor_name: str) -> int | None:
    """The layer that a published name belongs to; None for a leaf outside the layers."""
    match = _LAYER_NAME.fullmatch(tensor_name)
    return int(match.group(1)) if match else None


def is_dropped(cfg: ModelConfig, tensor_name: str) -> bool:
    """Whether a published tensor is ignored on purpose: a computed table, a copy of a tied head, of
    another part than the text's, or what its form of encoding says beside the weights."""
    family = family_of(cfg)
    if cfg.tie_word_embeddings and tensor_name == family.head_matrix.published:
        return True
    is_computed = _any_of(family.dropped).fullmatch(tensor_name) is not None
    return is_computed or is_beside(cfg, tensor_name) or is_of_another_part(cfg, tensor_name)


def is_beside(cfg: ModelConfig, tensor_name: str) -> bool:
    """Whether a published tensor is none of the weights, by the form of their encoding: the scale
    of a layer's inputs, say."""
    split = FORMS[cfg.quantized.method].split(tensor_name) if cfg.quantized else None
    return split is not None and split[1] is None


def is_of_another_part(cfg: ModelConfig, tensor_name: str) -> bool:
    """Whether a published tensor holds weights that a text has no use for: of a multimodal model,
    or of the layers that guess further tokens."""
    if cfg.n_further and (layer := layer_of(tensor_name)) is not None:
        first = cfg.num_hidden_layers
        if first <= layer < first + cfg.n_further:
            return True
    return _any_of(family_of(cfg).left_out).fullmatch(tensor_name) is not None


@lru_cache(maxsize=64)
def _any_of(patterns):
    """One pattern: files of 200,000 names are asked for each of them. None matches nothing."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")
