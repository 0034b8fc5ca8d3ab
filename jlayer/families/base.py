"""The types of a family's tables: stages, kinds of layers, and the leaves outside the layers.

A model is data. A kind of layer is a list of stages. A stage multiplies one input by some matrices,
then calls one pure function of `model.stages`, given here by name. The plan, the executor and the
compiled programs read these tables and never branch on the name of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from jlayer.additions import Addition
from jlayer.encodings.published import OF_ALL_FAMILIES
from jlayer.families.fields import Fields
from jlayer.parts import Attention, Delta, Latent, Logits, Norm, Router
from jlayer.spec import ITEM_BYTES, Leaf, ModelConfig, Place, Role

# The flow: the values that stages pass on, besides the products of a stage, by name:
#     hidden  [R, D]  the residual stream
#     x       [R, in] the input of the current stage; dropped when the stage ends
#     cache   the pool of the layer's cache
#     rows    positions, and what else a mixer needs to know of each row (`model.cache.Rows`)
# Where requests choose among adapters also:
#     adapters [R] int32, the number of the one that each row is computed with; -1: none
# In a layer with latent attention also:
#     latent  [R, L]  what the latent and the key of each row are made of
# In a layer with experts also:
#     inputs  [R, D]  the input of the experts
#     routing [R, E]  float32, the weight of each expert; 0: not chosen
#     mixed   [R, D]  float32, the sum of their outputs so far
#     expert  []      int32, the number of the expert that is at work

# The prefix of the published names of all leaves but the head. A model that was saved without its
# head has names without it.
BODY = "model."
# The prefix of the published names of a layer's leaves.
LAYER_PREFIX = BODY + "layers.{layer}."
# The leaves outside the layers.
EMBEDDING = Leaf("embed_tokens", BODY + "embed_tokens.weight", ("vocab", "width"), role=Role.TABLE)
FINAL_NORM = Leaf("norm", BODY + "norm.weight", ("width",), role=Role.NORM)
HEAD = Leaf("lm_head", "lm_head.weight", ("vocab", "width"))


@dataclass(frozen=True)
class Function:
    """A pure function of `model.stages`, by name.

    It is called as `function(products, whole, *reads, how=how)`: the stage's products by name, the
    leaves in `whole` uncut by name, the values in `reads`. `how`: the form of what it does, plain
    data. It returns the values in `gives`, in that order. Leaves that move come as they are stored,
    and only to a function that ends a stage: they are the stage's last tile.
    """

    name: str
    reads: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    how: object = None


@dataclass(frozen=True)
class NormAt:
    """A norm with the names of its leaves; one that the norm has not is None."""

    norm: Norm
    weight: str | None = None
    bias: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)


@dataclass(frozen=True)
class Join:
    """How the output of a branch is added to the residual stream, for `model.stages`.

    The output is normed by `after`, multiplied by `scale` and added; the sum is multiplied by the
    leaf `scalar`. `following`: the norm that gives the next stage its input; it is taken of what
    was there before the sum if `is_parallel`.
    """

    after: NormAt | None = None
    scale: float = 1.0
    scalar: str | None = None
    following: NormAt | None = None
    is_parallel: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        norms = [norm.leaves for norm in (self.after, self.following) if norm]
        return (*(leaf for leaves in norms for leaf in leaves), *filter(None, (self.scalar,)))


@dataclass(frozen=True)
class JoinBoth:
    """How the outputs of an MLP and of the experts beside it are added, for `model.stages`: each is
    normed, and their sum is the output of one branch."""

    after_shared: NormAt
    after_experts: NormAt
    join: Join

    @property
    def leaves(self) -> tuple[str, ...]:
        return (*self.after_shared.leaves, *self.after_experts.leaves, *self.join.leaves)


@dataclass(frozen=True)
class Group:
    """Matrices with the same number of rows, whose products are combined row by row.

    A tile holds the same rows of each matrix. `combine` names the pure function of
    `model.stages` that combines the products, and `how` is its form; None for a single matrix.
    `product` names the result. `added`: (a matrix, what adapters add to its product).
    """

    product: str
    leaves: tuple[str, ...]
    combine: str | None = None
    how: object = None
    added: tuple[tuple[str, Addition], ...] = ()


def bias_name(matrix: str) -> str:
    """The name in our trees of the bias of a matrix."""
    return f"{matrix}_bias"


def low_rank_names(matrix: str) -> tuple[str, str]:
    """The names in our trees of what an adapter has for a matrix: A [rank, in], B [out, rank]."""
    return f"{matrix}_lora_a", f"{matrix}_lora_b"


def lengths_name(matrix: str) -> str:
    """The name in our trees of the lengths that an adapter gives the rows of a matrix: [out]."""
    return f"{matrix}_lora_lengths"


def one(leaf: str) -> Group:
    """A group of a single matrix; its product has the name of the matrix."""
    return Group(leaf, (leaf,))


@dataclass(frozen=True)
class Stage:
    """Matrices that multiply one input, and the function that uses their products.

    `input` computes the input; None: an earlier stage gave it. `source`: its name in the flow.
    `finish` is called once the products of all rows are there; None: the products are the result.
    `logits`: what becomes of products that stay in float32 and go to the host; None: they are no
    logits. `per_expert`: consecutive stages with it are gone through for each expert of the layer;
    their input is computed once. `weighs_input`: each of them multiplies it by the weights of its
    expert. A stage may have no matrices. `drops`: values that nothing needs any more when it has
    ended.
    """

    name: str
    groups: tuple[Group, ...]
    input: Function | None = None
    finish: Function | None = None
    logits: Logits | None = None
    source: str = "x"
    per_expert: bool = False
    weighs_input: bool = False
    drops: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """The matrices, in order."""
        return tuple(leaf for group in self.groups for leaf in group.leaves)

    @property
    def chooses(self) -> bool:
        """Whether its products depend on the adapter that each row is computed with."""
        return any(added.chooses for group in self.groups for _, added in group.added)


@dataclass(frozen=True)
class CacheArray:
    """One array of a cache: the `shape` of an entry, and its `dtype`; None: the compute dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True)
class CacheSpec:
    """The cache of a layer: arrays of entries that are read and written together.

    Kind `rows`: an entry for every token, in a pool row; `window`: a token sees so many, itself
    among them. Kind `state`: an entry for a lane, in a slot, that is replaced as a whole.
    """

    kind: str
    arrays: tuple[CacheArray, ...]
    window: int | None = None

    def entry_shapes(self, *, n_rows: int) -> dict[str, tuple]:
        """The arrays of one layer's pool, by name; `n_rows`: its rows or slots."""
        return {array.name: (n_rows, *array.shape) for array in self.arrays}

    def n_bytes(self, *, n_rows: int, item_bytes: int) -> int:
        """`item_bytes`: of the compute dtype."""
        return n_rows * sum(
            math.prod(array.shape) * ITEM_BYTES.get(array.dtype, item_bytes)
            for array in self.arrays
        )


def rows_cache(attention: Attention) -> CacheSpec:
    """A key and a value [K, H] for every token."""
    shape = (attention.n_kv_heads, attention.head_dim)
    return CacheSpec("rows", (CacheArray("k", shape), CacheArray("v", shape)), attention.window)


def state_cache(delta: Delta) -> CacheSpec:
    """For a lane the last inputs of the convolution [C, W-1], oldest first, and the state
    [N, H, E], which is float32 whatever is computed in."""
    conv = CacheArray("conv", (delta.channels, delta.kernel - 1))
    shape = (delta.n_value_heads, delta.key_dim, delta.value_dim)
    return CacheSpec("state", (conv, CacheArray("state", shape, "float32")))


def latent_cache(latent: Latent) -> CacheSpec:
    """The latent and the turned part of the key [1, L] for every token: as the one key that all
    heads attend to. (Of a pool without the 1 XLA makes a copy to attend to it.)"""
    return CacheSpec("rows", (CacheArray("latent", (1, latent.entry)),))


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its leaves, the stages that use them, and what mixes tokens: attention,
    latent attention, or a gated DeltaNet; the others are None. `router`: of its experts; None
    where it has an MLP
    instead."""

    name: str
    leaves: tuple[Leaf, ...]
    stages: tuple[Stage, ...]
    attention: Attention | None = None
    delta: Delta | None = None
    latent: Latent | None = None
    router: Router | None = None

    def __post_init__(self):
        mixers = (self.attention, self.delta, self.latent)
        assert sum(mixer is not None for mixer in mixers) == 1, "a layer has one mixer"
        for stage, following in pairwise(self.stages):
            after_experts = stage.per_expert and not following.per_expert
            assert not (after_experts and following.input), "the last expert may not run"
        inputs = [stage.input.whole for stage in self.stages if stage.input]
        assert self.moving.isdisjoint(sum(inputs, ())), "what moves comes with a stage's last tile"

    @cached_property
    def _hash(self):
        mixers = (self.attention, self.delta, self.latent)
        return hash((self.name, self.leaves, self.stages, mixers))

    def __hash__(self) -> int:
        return self._hash  # a plan looks at the kinds of all layers thousands of times

    @property
    def n_experts(self) -> int:
        return self.router.n_experts if self.router else 0

    @cached_property
    def expert_stages(self) -> tuple[Stage, ...]:
        """The stages that each expert goes through."""
        return tuple(stage for stage in self.stages if stage.per_expert)

    @property
    def route(self) -> Function | None:
        """What chooses the experts; None where there are none."""
        inputs = (stage.input for stage in self.stages if stage.input)
        return next((each for each in inputs if "routing" in each.gives), None)

    @cached_property
    def cache(self) -> CacheSpec:
        if self.latent:
            return latent_cache(self.latent)
        return rows_cache(self.attention) if self.attention else state_cache(self.delta)

    @cached_property
    def moving(self) -> frozenset[str]:
        """The names of the leaves that are used uncut and streamed."""
        return frozenset(leaf.name for leaf in self.leaves if leaf.moves)

    def moving_of(self, function: Function) -> tuple[Leaf, ...]:
        """Those of them that a function reads."""
        return tuple(self.leaf(name) for name in function.whole if name in self.moving)

    def leaf(self, name: str) -> Leaf:
        (leaf,) = (leaf for leaf in self.leaves if leaf.name == name)
        return leaf

    def tensors(self) -> Iterator[tuple[Leaf, int | None]]:
        """Yields (a leaf, the number of an expert or None) for each of its tensors: those of the
        experts come expert by expert."""
        for n_experts, leaves in groupby(self.leaves, lambda leaf: leaf.n_experts):
            leaves = tuple(leaves)
            for expert in range(n_experts) if n_experts else (None,):
                yield from ((leaf, expert) for leaf in leaves)

    def passes(self) -> Iterator[tuple[Stage, int | None]]:
        """Yields (a stage, the number of an expert or None), in the order of a forward pass."""
        for per_expert, stages in groupby(self.stages, lambda stage: stage.per_expert):
            stages = tuple(stages)
            for expert in range(self.n_experts) if per_expert else (None,):
                yield from ((stage, expert) for stage in stages)

    def with_bias(self, matrix: str) -> tuple[Leaf, ...]:
        """A matrix and, if the model has them, its bias and what an adapter adds."""
        return (self.leaf(matrix), *(leaf for leaf in self.leaves if leaf.of == matrix))

    def kept_in(self, place: Place) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.place is place)


@dataclass(frozen=True)
class Family:
    """One architecture.

    `read(fields)`: the configuration in a config.json. `kinds(cfg)`: the kind of each layer.
    `architecture`: the name that transformers saves it under. `dropped`: patterns of published
    names that hold no weights (computed tables) and are ignored; `left_out`: of those that hold
    weights of other parts than the text's, which are left out with a note. `has_windows`: its
    layers may have a window; where they have none, one that a config names nevertheless limits the
    model (`common.stray_window`). `longest_key`: the key of a config that says how many tokens a
    text may have at most for all to be attended to; longer ones are not supported. `quantized`: the
    methods of other programs whose weights it reads as they are.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    kinds: Callable[[ModelConfig], tuple[LayerKind, ...]]
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    has_windows: bool = True
    longest_key: str | None = None
    quantized: tuple[str, ...] = OF_ALL_FAMILIES
    embedding: Leaf = EMBEDDING
    head_matrix: Leaf = HEAD
    layer_prefix: str = LAYER_PREFIX
