"""Token ids in the types that users pass: lists, numpy, jax or torch."""

from __future__ import annotations

import numpy as np

from jlayer.errors import UsageError


def as_id_lists(input_ids, *, name: str = "input_ids") -> list[list[int]]:
    """Ids [B, T] or [T], as lists, numpy, jax or torch, as B lists of ints.

    Raises UsageError if they are no integers or have more than two dimensions.
    """
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if isinstance(rows, (list, tuple)) and all(type(token) is int for token in rows):
        rows = [rows]
    ok = isinstance(rows, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and all(type(token) is int for token in row) for row in rows
    )
    if not ok or not rows:
        raise UsageError(f"{name}: expected integers of shape [B, T] or [T]")
    return [list(row) for row in rows]


def unpadded(rows, attention_mask):
    """Each row without its padding, marked with 0 in the mask, at either end. Raises UsageError."""
    masks = as_id_lists(attention_mask, name="attention_mask")
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise UsageError("attention_mask: of another shape than input_ids")
    unpadded_rows = []
    for row, mask in zip(rows, masks, strict=True):
        kept = [i for i, mark in enumerate(mask) if mark]
        if not kept or kept != list(range(kept[0], kept[-1] + 1)):
            raise UsageError(
                "attention_mask: expected ones in a row, with padding around them only"
            )
        unpadded_rows.append([row[i] for i in kept])
    return unpadded_rows


def like(given, rows, padding):
    """Rows of ids in the type of `given`: list, numpy, jax or torch; arrays are padded on the
    right."""
    if isinstance(given, (list, tuple)):
        return rows if given and isinstance(given[0], (list, tuple)) else rows[0]
    longest = max(map(len, rows))
    array = np.array([row + [padding] * (longest - len(row)) for row in rows])
    array = array if given.ndim == 2 else array[0]
    if isinstance(given, np.ndarray):
        return array.astype(given.dtype)
    if type(given).__module__.startswith("torch"):
        import torch

        return torch.from_numpy(array).to(device=given.device, dtype=given.dtype)
    import jax.numpy as jnp

    return jnp.asarray(array, dtype=given.dtype)
