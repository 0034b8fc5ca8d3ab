"""The types of which a family is made: stages, kinds of layers, and the leaves outside the layers.

A model is data. A kind of layer is a list of stages; a stage multiplies one input by some matrices
and then calls one pure function of `model.stages`, which this room knows only by name. The plan,
the executor and the compiled programs read these tables; none of them asks which stage it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from jlayer.spec import Leaf, ModelConfig, Place, Role

# What flows through the stages of a layer besides a stage's products:
#     hidden     [B, T, D]  the residual stream
#     x          [B, T, in] the input of the stage under way; gone once the stage is over
#     cache      the layer's own cache
#     positions  [B, T] int32
FLOW = ("hidden", "x", "cache", "positions")

# Before the published names of all leaves but the head; a model that was saved without its head has
# names without it.
BODY = "model."
# Before the published names of a layer's leaves.
LAYER_PREFIX = BODY + "layers.{layer}."
# The leaves outside the layers.
EMBEDDING = Leaf("embed_tokens", BODY + "embed_tokens.weight", ("vocab", "width"), role=Role.TABLE)
FINAL_NORM = Leaf("norm", BODY + "norm.weight", ("width",), role=Role.NORM)
HEAD = Leaf("lm_head", "lm_head.weight", ("vocab", "width"))


@dataclass(frozen=True)
class Function:
    """A pure function of `model.stages` by name.

    It is called as `function(products, whole, *reads, cfg=cfg)`, with the stage's products by name
    and the leaves in `whole` uncut, and returns what it `gives`, in that order.
    """

    name: str
    reads: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Matrices of the same height whose products are needed row by row together.

    A tile holds the same rows of all of them. `combine` names the pure function that makes one
    product of theirs; with a single matrix there is none. `product` names the result.
    """

    product: str
    leaves: tuple[str, ...]
    combine: str | None = None


def bias_name(matrix: str) -> str:
    """What the bias of a matrix is called in our trees."""
    return f"{matrix}_bias"


def one(leaf: str) -> Group:
    """A group of a single matrix, whose product bears its name."""
    return Group(leaf, (leaf,))


@dataclass(frozen=True)
class Stage:
    """Matrices that multiply one input, and what becomes of their products.

    `input` makes the input `x` of the flow before the first rows arrive; None: the stage before has
    left it. `finish` is called once all rows are there; None: the products are the result.
    `logits`: products stay in float32, and go to the host.
    """

    name: str
    groups: tuple[Group, ...]
    input: Function | None = None
    finish: Function | None = None
    logits: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        """The matrices, in order."""
        return tuple(leaf for group in self.groups for leaf in group.leaves)


@dataclass(frozen=True)
class CacheSpec:
    """What a layer remembers of earlier tokens. `rows`: keys and values of every position."""

    kind: str = "rows"

    def entry_shapes(self, cfg: ModelConfig, *, batch: int, capacity: int) -> dict[str, tuple]:
        """The arrays of one layer's cache, by name: k and v [B, S, K, H]."""
        shape = (batch, capacity, cfg.num_key_value_heads, cfg.head_dim)
        return {"k": shape, "v": shape}

    def n_elements(self, cfg: ModelConfig, *, batch: int, capacity: int) -> int:
        shapes = self.entry_shapes(cfg, batch=batch, capacity=capacity).values()
        return sum(map(math.prod, shapes))


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its leaves, and the stages in which they are used."""

    name: str
    leaves: tuple[Leaf, ...]
    stages: tuple[Stage, ...]
    cache: CacheSpec = field(default_factory=CacheSpec)

    def leaf(self, name: str) -> Leaf:
        (found,) = (leaf for leaf in self.leaves if leaf.name == name)
        return found

    def with_bias(self, matrix: str) -> tuple[Leaf, ...]:
        """A matrix and, where it has one, its bias."""
        return (self.leaf(matrix), *(leaf for leaf in self.leaves if leaf.of == matrix))

    def kept_in(self, place: Place) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.place is place)

    def for_config(self, cfg: ModelConfig) -> LayerKind:
        """Without the leaves that this model does not have."""
        there = tuple(leaf for leaf in self.leaves if not leaf.switch or getattr(cfg, leaf.switch))
        return LayerKind(self.name, there, self.stages, self.cache)


@dataclass(frozen=True)
class Family:
    """One architecture. `kinds(cfg)` gives the kind of each layer; `head_input` makes the head's
    input of the last hidden states.

    `dropped`: patterns of published names that hold no weights (computed tables) and are left out.
    """

    model_type: str
    architecture: str
    kinds: Callable[[ModelConfig], tuple[LayerKind, ...]]
    head_input: Function
    dropped: tuple[str, ...] = ()
    embedding: Leaf = EMBEDDING
    final_norm: Leaf = FINAL_NORM
    head_matrix: Leaf = HEAD
    layer_prefix: str = LAYER_PREFIX
