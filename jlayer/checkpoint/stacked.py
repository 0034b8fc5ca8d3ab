"""Tensors that hold matrices of all experts of a layer, seen as those of single experts.

An expert's lie together in them, its rows or its inputs one after another, so each matrix is a part
of the file as it is: nothing is read or copied for this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from jlayer.checkpoint.encoded import form_of, pieces_of
from jlayer.encodings.base import WHOLE
from jlayer.encodings.registry import ENCODINGS, piece_name, piece_names, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.registry import Stacked, stacked_tensors
from jlayer.spec import ModelConfig

Value = TypeVar("Value")


def unstacked(
    cfg: ModelConfig,
    table: Mapping[str, tuple],
    rows: Callable[..., tuple],
    encodings: Mapping[str, str],
    *,
    where: str,
) -> dict[str, tuple]:
    """A file's tensors by their published names, with those of single experts for the ones that
    hold all of them.

    `table`: name -> a place and what is there, with a `shape`. `rows(place, info, first, n,
    inputs_first)`: the same of `n` rows from `first` on, counted through all experts. `encodings`:
    of the tensors that hold all experts, where they are no plain numbers. Raises CheckpointError
    where such a tensor has another shape than the config says, or cannot be cut by experts, or an
    expert is there by itself too.
    """
    stacks, found = stacked_tensors(cfg), {}
    for name, (place, info) in table.items():
        stack, piece = stacks.get(name), WHOLE
        if stack is None:
            matrix, piece = split_piece(name)
            if matrix in encodings and piece in piece_names(encodings[matrix]):
                stack = stacks.get(matrix)
        if stack is None:
            parts = {name: (place, info)}
        elif piece == WHOLE:
            of_expert = ("columns", "rows") if stack.inputs_first else ("rows", "columns")
            axes = ("experts", *of_expert[: len(stack.shape) - 1])
            _check_shape(place, info, stack.shape, axes, where)
            parts = {
                part: rows(place, info, first, n, inputs_first=stack.inputs_first)
                for part, first, n in stack.parts
            }
        else:
            wanted = pieces_of(encodings[matrix], form_of(cfg), None, stack)
            _, shape = wanted.get(piece, (None, info.shape))
            if len(shape) == 2 and info.shape == (shape[0], stack.n_parts):
                shape = info.shape  # a number for each matrix of an expert, not for all of them
            _check_shape(place, info, shape, ("experts", "rows", "columns", "bytes"), where)
            if len(shape) == 2:
                cut = _few(stack, piece, shape[1])
            else:
                cut = _cut(stack, piece, encodings[matrix], where=f"{where}: tensor {place.name}")
            parts = {
                part: rows(place, info, first, n, inputs_first=False) for part, first, n in cut
            }
        twice = next((part for part in parts if part in found), None)
        if twice is not None:
            raise CheckpointError(
                f"{where}: tensor {twice} is there by itself and in one of all experts; which is "
                "meant cannot be known"
            )
        found |= parts
    return found


def _check_shape(place, info, shape, axes, where):
    if info.shape != shape:
        raise CheckpointError(
            f"{where}: tensor {place.name} is {list(info.shape)}, by config.json {list(shape)}: "
            f"{', '.join(axes[: len(shape)])}"
        )


def _few(stack: Stacked, piece: str, n_each: int) -> list[tuple[str, int, int]]:
    """The same as `_cut`, of a piece [experts, n_each]: the matrices of an expert have a number
    each, or one together."""
    return [
        (piece_name(part, piece), n // stack.n_parts * n_each + n % stack.n_parts % n_each, 1)
        for n, (part, *_) in enumerate(stack.parts)
    ]


def _cut(stack: Stacked, piece: str, name: str, *, where: str) -> list[tuple[str, int, int]]:
    """Of a piece that holds all experts: (name of a matrix's piece, its first row, the number of
    its rows), where rows are counted through all experts."""
    encoding, (n_rows, width) = ENCODINGS[name], stack.of_expert
    per = encoding.rows_per(piece)
    found, at = [], 0
    for part, first, n in stack.parts:
        begins = first % n_rows
        if begins % per or (n % per and begins + n < n_rows):
            raise CheckpointError(
                f"{where}: {n} rows of a matrix beside those of others, expected a multiple of "
                f"{per}, since {name} has one row of scales for them; save the experts one by one"
            )
        _, (count, *_) = encoding.pieces((n, width))[piece]
        found.append((piece_name(part, piece), at, count))
        at += count
    return found
