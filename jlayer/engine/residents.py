"""The weights that stay on the device: each layer's norms and what else is small and used uncut,
and the final norm."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from jlayer.checkpoint.digest import Checks, rows_of
from jlayer.checkpoint.store import Store
from jlayer.families.registry import final_norm_leaves, layer_kinds, published_tensors
from jlayer.plan.cutting import device_parts, parts_of
from jlayer.plan.tiles import Weights
from jlayer.spec import resident_dtype
from jlayer.streaming.devices import Devices
from jlayer.streaming.direct import RowReader


@dataclass(frozen=True)
class Residents:
    """Arrays by leaf, in the compute dtype: of each layer, and after the last one."""

    layers: list[dict[str, jax.Array]]
    final: dict[str, jax.Array]

    def of(self, layer: int | None) -> dict[str, jax.Array]:
        """The arrays of a layer; None: of the head."""
        return self.final if layer is None else self.layers[layer]

    @property
    def n_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.layers, self.final)))


def load(store: Store, weights: Weights, checks: Checks, devices: Devices) -> Residents:
    """Loads what is used uncut to each device once, in the compute dtype; on the host there is one
    of them at a time.

    All vectors are checked here, including biases, which are streamed. Raises CheckpointError or
    StorageError.
    """
    shapes, unread = published_tensors(weights.cfg), dict.fromkeys(store.vectors)

    def read(name):
        unread.pop(name, None)
        return _read_vector(store, name, shapes[name], checks)

    def put(part, dtype):
        vector = read(part.tensor).reshape(part.shape)
        return jax.block_until_ready(devices.put(vector.astype(dtype)))

    kinds = layer_kinds(weights.cfg)
    layers = [
        {
            part.leaf: put(part, resident_dtype(kind.leaf(part.matrix), weights.dtype))
            for part in device_parts(weights, layer)
        }
        for layer, kind in enumerate(kinds)
    ]
    final = {
        part.leaf: put(part, weights.dtype)
        for leaf in final_norm_leaves(weights.cfg)
        for part in parts_of(leaf, leaf.published, weights)
    }
    for name in list(unread):
        if len(shapes[name]) < 2:  # others are checked as they are streamed
            read(name)
    return Residents(layers, final)


def _read_vector(store, name, shape, checks):
    segment = store.segment_of(name)
    rows = RowReader(segment, n_rows=1, identity=store.identities[segment.file])
    try:
        (raw,) = rows.read(np.zeros(1, np.int64))
    finally:
        rows.close()
    checks.add(name, raw, n_rows=rows_of(shape))
    return raw.view(np.dtype(store.form_of(name))).copy()
