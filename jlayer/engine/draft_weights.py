"""Loads a small model to the device whole, its layers stacked; checks what it reads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.encodings.registry import encoding
from jlayer.families.registry import (
    family_of,
    final_norm_leaves,
    head_leaf,
    layer_tensor_name,
)
from jlayer.interrupts import check
from jlayer.model.products import ScaledRows, weight
from jlayer.model.whole import WholeModel, one_kind, to_bits
from jlayer.plan.cutting import parts_of
from jlayer.plan.machine import platform_of
from jlayer.plan.tiles import Weights
from jlayer.streaming.direct import Reader, aligned_buffer, aligned_span

# Rows are rounded to int8 in blocks of so many numbers, several at a time.
BLOCK_NUMBERS = 1 << 21
LARGEST = 127  # of the small integers


def load(store: Store, weights: Weights, device: jax.Device) -> WholeModel:
    """Reads all weights of a store to the device. Raises CheckpointError or StorageError."""
    cfg, kind = weights.cfg, one_kind(weights.cfg)
    assert not cfg.head_bias, "of the families that have one all have experts, and are no drafts"
    reader, checks = Reader(store.files, store.identities), Checks(store.expected())

    def matrix(leaf, tensor):
        return _matrix(store, weights, reader, checks, leaf, tensor, device)

    try:
        layers = {}
        for leaf in kind.leaves:
            stack = None
            for layer in range(cfg.num_hidden_layers):
                check()
                found = jax.tree.map(to_bits, matrix(leaf, layer_tensor_name(cfg, leaf, layer)))
                stack = _placed(stack, found, layer, cfg.num_hidden_layers)
            layers[leaf.name] = stack
        table, head = family_of(cfg).embedding, head_leaf(cfg)
        return WholeModel(
            table=matrix(table, table.published),
            layers=layers,
            final={leaf.name: matrix(leaf, leaf.published) for leaf in final_norm_leaves(cfg)},
            head=None if head is table else matrix(head, head.published),
        )
    finally:
        reader.close()


def _matrix(store, weights, reader, checks, leaf, tensor, device):
    """One tensor on the device, in the form in which it is kept there."""
    parts = parts_of(leaf, tensor, weights)
    pieces = {part.piece: _read(store, reader, checks, part) for part in parts}
    if leaf.is_uncut or len(leaf.axes) == 1:
        (whole,) = pieces.values()
        return jax.device_put(whole.astype(weights.dtype), device)
    platform = platform_of(device.platform)
    if encoding(parts[0].form).is_plain and platform == "gpu":
        (whole,) = pieces.values()
        return jax.device_put(scaled_rows(whole), device)
    put = {piece: jax.device_put(array, device) for piece, array in pieces.items()}
    return weight(put, form=parts[0].form, block_bytes=BLOCK_BYTES[platform])


def _read(store, reader, checks, part):
    segment = store.segment_of(part.tensor)
    buffer = aligned_buffer(aligned_span(segment)[1])
    at = reader.read(segment, buffer)
    raw = buffer[at : at + segment.n_bytes]
    checks.add(part.tensor, raw, n_rows=part.shape[0] if len(part.shape) > 1 else 1)
    return raw.view(np.dtype(part.dtype)).reshape(part.shape)


def scaled_rows(matrix: np.ndarray) -> ScaledRows:
    """A plain matrix [out, in] in int8 with one scale a row, on the host. A number that is not
    finite makes its row zeros: a draft guesses badly then, and changes no token."""
    n_rows, width = matrix.shape
    q, scale = np.empty((n_rows, width), np.int8), np.empty(n_rows, np.float32)
    height = max(1, BLOCK_NUMBERS // width)

    def round_rows(first):
        rows = matrix[first : first + height].astype(np.float32)
        largest = np.abs(rows).max(axis=1)
        is_bad = ~np.isfinite(largest)
        rows[is_bad], largest[is_bad] = 0, 0
        step = largest / LARGEST
        step[step < np.finfo(np.float32).tiny] = 1  # too small to divide by
        q[first : first + height] = np.rint(rows / step[:, None])
        scale[first : first + height] = step

    n_threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(n_threads, thread_name_prefix="jlayer-round") as pool:
        list(pool.map(round_rows, range(0, n_rows, height)))
    return ScaledRows(q, scale)


def _placed(stack, found, layer, n_layers):
    """The stack with this layer's arrays in it; memory for all layers is taken at the first."""
    if stack is None:
        stack = jax.tree.map(
            lambda one: jnp.zeros((n_layers, *one.shape), one.dtype, device=one.sharding), found
        )
    return jax.tree.map(_in_place, stack, found, jax.tree.map(lambda _: layer, found))


_in_place = jax.jit(
    lambda stack, one, layer: jax.lax.dynamic_update_index_in_dim(stack, one, layer, 0),
    donate_argnums=0,
)
