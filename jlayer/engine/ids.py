"""Token ids in the types that users pass: lists, and arrays of any library."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jlayer.engine.arrays import as_kind, as_lists, is_array
from jlayer.engine.sample import NO_PADDING, Padding
from jlayer.errors import UsageError


@dataclass(frozen=True)
class Row:
    """A prompt of ids: `given`, as it was handed over, and `ids`, what of it is no padding.
    `scored_from`: in place of the option prompt_logprobs_from. `pooling`: how its final hidden
    states are pooled, where they are wanted. `vectors` [T, D]: embeddings, of which `ids` are
    numbers that nothing else has; nothing was given as ids then."""

    given: list[int]
    ids: list[int]
    padding: Padding = NO_PADDING
    scored_from: int | None = None
    pooling: str | None = None
    vectors: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def width(self) -> int:
        """Its places, with its padding."""
        return len(self.given) + self.padding.n_embedded


def check_ids(ids: Sequence[int], *, vocab_size: int, begin: int | None) -> None:
    """Raises UsageError unless `ids` is a non-empty list of ids of the vocabulary. `begin`: the
    model's beginning token, if it has one."""
    if not ids and begin is None:
        raise UsageError(
            "prompt: empty, and this model has no beginning token to start from; give some text"
        )
    if not ids:
        found = f"prompt: empty; give some text, or the model's beginning token, {begin}"
        raise UsageError(found, command_line=f"{found} (--prompt-ids {begin})")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UsageError(f"prompt: id {token} is outside the vocabulary of {vocab_size}")


def as_id_lists(input_ids, *, name: str = "input_ids") -> list[list[int]]:
    """Ids [B, T] or [T], as lists or arrays, as B lists of ints.

    Raises UsageError if they are no integers or have more than two dimensions.
    """
    rows = plain(input_ids)
    if is_id_list(rows):
        rows = [rows]
    if not isinstance(rows, (list, tuple)) or not rows or not all(map(is_id_list, rows)):
        found = type(input_ids).__name__
        raise UsageError(f"{name}: found {found}, expected integers of shape [B, T] or [T]")
    return [[int(token) for token in row] for row in rows]


def plain(ids):
    """Arrays, and lists of arrays, as lists; anything else as it is."""
    if isinstance(ids, (list, tuple)):
        return [plain(row) if is_array(row) else row for row in ids]
    return as_lists(ids) if is_array(ids) else ids


def is_id_list(row) -> bool:
    """Whether this is a list of integers, those of numpy included."""
    return isinstance(row, (list, tuple)) and all(
        isinstance(token, numbers.Integral) and not isinstance(token, bool) for token in row
    )


def encoded(given, attention_mask=None):
    """(ids, mask) of what a tokenizer gives, a mapping with both, or of ids as they are."""
    if not isinstance(given, Mapping):
        return given, attention_mask
    if "input_ids" not in given:
        raise UsageError(f"input_ids: found a mapping with {', '.join(given)}, expected input_ids")
    mask = given.get("attention_mask")
    if mask is not None and attention_mask is not None:
        raise UsageError("attention_mask: given twice; leave one out")
    return given["input_ids"], attention_mask if mask is None else mask


def as_rows(input_ids, attention_mask, *, pad: int | None = None) -> list[Row]:
    """Ids [B, T] or [T] as prompts without their padding, by transformers' rule.

    The mask marks padding with 0. Without one, the token `pad` is padding.
    A row that is padded at its end goes on from its last token that is none. (transformers goes on
    from the padding there, and warns that the result is wrong.) Raises UsageError.
    """
    rows = as_id_lists(input_ids)
    if attention_mask is not None:
        masks = masks_of(attention_mask, [len(row) for row in rows])
    else:
        masks = [[token != pad for token in row] for row in rows]
    return [_row(row, mask) for row, mask in zip(rows, masks, strict=True)]


def masks_of(
    attention_mask, lengths: Sequence[int], *, of: str = "input_ids"
) -> Sequence[Sequence[int]]:
    """A mask [B, T] or [T] as a list for each row: 0 or 1 for each of so many places. `of`: what it
    is a mask of, for the message. Raises UsageError."""
    masks = plain(attention_mask)
    if isinstance(masks, (list, tuple)) and not any(isinstance(m, (list, tuple)) for m in masks):
        masks = [masks]
    if not isinstance(masks, (list, tuple)) or [len(m) for m in masks] != [*lengths]:
        raise UsageError(f"attention_mask: of another shape than {of}")
    for mark in (mark for mask in masks for mark in mask):
        if mark not in (0, 1):  # True and 1.0 are 1
            raise UsageError(f"attention_mask: found {mark!r}, expected 0 (padding) or 1")
    return masks


def _row(row, mask):
    kept = [index for index, mark in enumerate(mask) if mark]
    if row and not kept:
        raise UsageError("input_ids: a row of padding alone; each needs a token to go on from")
    first = kept[0] if kept else 0
    return Row(row, [row[index] for index in kept], Padding(len(row) - len(kept), first))


def like(given, rows, padding):
    """Rows of ids as the kind that `given` was: lists, or an array of its library, padded on the
    right.

    One row where a flat list or array came in, unless there are several answers to it.
    """
    if isinstance(given, (list, tuple)):
        flat = is_id_list(given) and len(rows) == 1
        return rows[0] if flat else rows
    array = filled(rows, padding)
    is_flat = is_id_list(plain(given)) and len(rows) == 1
    return as_kind(given, array[0] if is_flat else array, like_ids=True)


def filled(rows: Sequence[list[int]], padding: int) -> np.ndarray:
    """Rows of ids as int64 [B, T], padded on the right."""
    longest = max(map(len, rows))
    return np.array([row + [padding] * (longest - len(row)) for row in rows], np.int64)
