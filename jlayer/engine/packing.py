"""Small arrays that go to the device together: one transfer instead of ten, each of which takes the
driver 50 us."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def pack(tree) -> np.ndarray:
    """The bytes of all int32 leaves, then those of all bool ones, uint8 [bytes]."""
    leaves = _ordered(jax.tree.leaves(tree))
    return np.concatenate(
        [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves]
    )


def packed_bytes(struct) -> int:
    """The length of what `pack` makes of arrays of these shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(struct))


def unpack(raw, struct):
    """Inside a program: the arrays of these shapes, from the bytes."""
    leaves, tree = jax.tree.flatten(struct)
    found, at = {}, 0
    for leaf in _ordered(leaves):
        end = at + math.prod(leaf.shape) * leaf.dtype.itemsize
        some, at = raw[at:end], end
        if leaf.dtype == bool:
            array = some.reshape(leaf.shape) != 0
        else:
            array = jax.lax.bitcast_convert_type(some.reshape(*leaf.shape, 4), jnp.int32)
        found[id(leaf)] = array
    return jax.tree.unflatten(tree, [found[id(leaf)] for leaf in leaves])


def _ordered(leaves):
    return sorted(leaves, key=lambda leaf: leaf.dtype == bool)  # stable
