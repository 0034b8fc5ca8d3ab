"""A model with an adapter: the leaves that stand beside its matrices, and the scales of what they
add.

A matrix W [out, in] gets A [rank, in] and B [out, rank]. B moves with the rows of W, as a bias
does; A comes with each range of them: it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jlayer.families.base import LayerKind, Stage, low_rank_names
from jlayer.parts import LowRanks
from jlayer.spec import Leaf, ModelConfig, Role

# How the published name of a matrix ends, and those of A and B in the place of that.
_END = "weight"
A_END, B_END = "lora_A.weight", "lora_B.weight"


def adapted_kinds(
    cfg: ModelConfig, kinds: Sequence[LayerKind], name_of: Callable[[Leaf, int], str]
) -> tuple[LayerKind, ...]:
    """The kind of each layer, with what the adapter of `cfg` adds. `name_of`: (a leaf, the number
    of a layer) -> its published name."""
    found: dict[tuple, LayerKind] = {}
    return tuple(
        _adapted(cfg, kind, _added(cfg.adapter, kind, layer, name_of), found)
        for layer, kind in enumerate(kinds)
    )


def low_rank_leaves(cfg: ModelConfig, matrix: Leaf, rank: int) -> tuple[Leaf, Leaf]:
    """A and B of a matrix."""
    (out, width), (a, b) = matrix.shape(cfg), low_rank_names(matrix.name)
    stem = matrix.published.removesuffix(_END)
    sizes = (("rank", rank), ("adapted_in", width), ("adapted_out", out))
    more = {"role": Role.LOW_RANK, "of": matrix.name, "sizes": sizes}
    return (
        Leaf(a, stem + A_END, ("rank", "adapted_in"), **more),
        Leaf(b, stem + B_END, ("adapted_out", "rank"), **more),
    )


def with_scales(stage: Stage, scales: dict[str, float]) -> Stage:
    """A stage whose groups know what their matrices' low-rank parts are multiplied by."""
    groups = tuple(
        replace(
            group, scales=tuple((leaf, scales[leaf]) for leaf in group.leaves if leaf in scales)
        )
        for group in stage.groups
    )
    return replace(stage, groups=groups)


def multiplied(kind: LayerKind) -> frozenset[str]:
    """The matrices of a kind that are multiplied by rows, and once: not those of experts."""
    return frozenset(name for stage in kind.stages if not stage.per_expert for name in stage.leaves)


def _added(adapter: LowRanks, kind, layer, name_of):
    """(matrix, rank, scale) of what is added to the matrices of a layer."""
    own = multiplied(kind)
    leaves = ((leaf, name_of(leaf, layer)) for leaf in kind.leaves if leaf.name in own)
    return tuple(
        (leaf.name, *adapter.of_matrix[name]) for leaf, name in leaves if name in adapter.of_matrix
    )


def _adapted(cfg, kind, added, found):
    if not added:
        return kind
    if (kind.name, added) not in found:
        leaves = [
            leaf
            for matrix, rank, _ in added
            for leaf in low_rank_leaves(cfg, kind.leaf(matrix), rank)
        ]
        scales = {matrix: scale for matrix, _, scale in added}
        found[kind.name, added] = replace(
            kind,
            name=f"{kind.name} adapted {len(found) + 1}",
            leaves=(*kind.leaves, *leaves),
            stages=tuple(with_scales(stage, scales) for stage in kind.stages),
        )
    return found[kind.name, added]
