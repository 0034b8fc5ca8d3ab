"""Tensors that hold matrices of all experts of a layer, seen as those of single experts.

An expert's lie together in them, its rows or its inputs one after another, so each matrix is a part
of the file as it is: nothing is read or copied for this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from jlayer.errors import CheckpointError
from jlayer.families.registry import stacked_tensors
from jlayer.spec import ModelConfig

Value = TypeVar("Value")


def unstacked(
    cfg: ModelConfig,
    table: Mapping[str, tuple],
    rows: Callable[..., tuple],
    *,
    where: str,
) -> dict[str, tuple]:
    """A file's tensors by their published names, with those of single experts for the ones that
    hold all of them.

    `table`: name -> a place and what is there, with a `shape`. `rows(place, info, first, n,
    inputs_first)`: the same of `n` rows from `first` on, counted through all experts. Raises
    CheckpointError where such a tensor has another shape than the config says, or an expert is
    there by itself too.
    """
    stacks, found = stacked_tensors(cfg), {}
    for name, (place, info) in table.items():
        stack = stacks.get(name)
        if stack is None:
            parts = {name: (place, info)}
        elif info.shape != stack.shape:
            raise CheckpointError(
                f"{where}: tensor {name} is {list(info.shape)}, by config.json "
                f"{list(stack.shape)}: {', '.join(stack.axes)}"
            )
        else:
            parts = {
                part: rows(place, info, first, n, inputs_first=stack.inputs_first)
                for part, first, n in stack.parts
            }
        twice = next((part for part in parts if part in found), None)
        if twice is not None:
            raise CheckpointError(
                f"{where}: tensor {twice} is there by itself and in one of all experts; which is "
                "meant cannot be known"
            )
        found |= parts
    return found
