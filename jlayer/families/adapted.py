"""A model with adapters: the leaves that stand beside its matrices, and what is added by them.

A matrix W [out, in] gets A [rank, in] and B [out, rank], and with some adapters the lengths of its
rows [out]. B and lengths move with the rows of W, as a bias does; A comes with each range of them:
it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jlayer.additions import Addition, Additions
from jlayer.families.base import LayerKind, Stage, lengths_name, low_rank_names
from jlayer.spec import Leaf, ModelConfig, Role

# How the published name of a matrix ends, and those of A, B and lengths in the place of that.
_END = "weight"
A_END, B_END, LENGTHS_END = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def adapted_kinds(
    cfg: ModelConfig, kinds: Sequence[LayerKind], name_of: Callable[[Leaf, int], str]
) -> tuple[LayerKind, ...]:
    """The kind of each layer, with what the adapters of `cfg` add. `name_of`: (a leaf, the number
    of a layer) -> its published name."""
    found: dict[tuple, LayerKind] = {}
    return tuple(
        _adapted(cfg, kind, _added(cfg.additions, kind, layer, name_of), found)
        for layer, kind in enumerate(kinds)
    )


def added_leaves(cfg: ModelConfig, matrix: Leaf, added: Addition) -> tuple[Leaf, ...]:
    """A and B of a matrix, and the lengths of its rows if they get some."""
    (out, width), (a, b) = matrix.shape(cfg), low_rank_names(matrix.name)
    stem = matrix.published.removesuffix(_END)
    sizes = (("rank", added.rank), ("adapted_in", width), ("adapted_out", out))
    more = {"role": Role.LOW_RANK, "of": matrix.name, "sizes": sizes}
    found = (
        Leaf(a, stem + A_END, ("rank", "adapted_in"), **more),
        Leaf(b, stem + B_END, ("adapted_out", "rank"), **more),
    )
    if not added.has_lengths:
        return found
    name = lengths_name(matrix.name)
    return (*found, Leaf(name, stem + LENGTHS_END, ("adapted_out",), **more))


def with_additions(stage: Stage, added: dict[str, Addition]) -> Stage:
    """A stage whose groups know what is added to the products of their matrices."""
    groups = tuple(
        replace(group, added=tuple((leaf, added[leaf]) for leaf in group.leaves if leaf in added))
        for group in stage.groups
    )
    return replace(stage, groups=groups)


def multiplied(kind: LayerKind) -> frozenset[str]:
    """The matrices of a kind that are multiplied by rows, and once: not those of experts."""
    return frozenset(name for stage in kind.stages if not stage.per_expert for name in stage.leaves)


def _added(additions: Additions, kind, layer, name_of):
    """(matrix, what is added to its product) of a layer."""
    own = multiplied(kind)
    leaves = ((leaf, name_of(leaf, layer)) for leaf in kind.leaves if leaf.name in own)
    return tuple(
        (leaf.name, additions.of_matrix[name])
        for leaf, name in leaves
        if name in additions.of_matrix
    )


def _adapted(cfg, kind, added, found):
    if not added:
        return kind
    if (kind.name, added) not in found:
        leaves = [
            leaf
            for matrix, addition in added
            for leaf in added_leaves(cfg, kind.leaf(matrix), addition)
        ]
        found[kind.name, added] = replace(
            kind,
            name=f"{kind.name} adapted {len(found) + 1}",
            leaves=(*kind.leaves, *leaves),
            stages=tuple(with_additions(stage, dict(added)) for stage in kind.stages),
        )
    return found[kind.name, added]
