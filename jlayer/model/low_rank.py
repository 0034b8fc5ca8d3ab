"""What adapters add to products of matrices: in float32 whatever the model is computed in, as PEFT
has it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jlayer.additions import Addition
from jlayer.model.products import product


def low_rank_product(x, a, b, added: Addition, adapters=None):
    """x [..., in], A [ranks, in], B [out, ranks] -> float32 [..., out].

    `adapters`: int32 [R], the number of the adapter that each row is computed with; -1: none. Where
    the addition chooses, x is [R, in].
    """
    inner = product(x.astype(jnp.float32), a)
    if not added.chooses:
        (only,) = added.columns
        return only.scale * product(inner, b)
    is_own, scale = chosen(added, adapters)
    # Not times 0: what has overflowed under another adapter would give NaN.
    return scale * product(jnp.where(is_own, inner, 0), b)


def chosen(added: Addition, adapters):
    """Of rows [R] by the number of their adapter: (bool [R, ranks] which columns are theirs,
    float32 [R, 1] the scale of these). For arrays of numpy and of JAX."""
    numbers = np.array([each.adapter for each in added.columns], np.int32)
    scales = np.array([each.scale for each in added.columns], np.float32)
    owners = np.repeat(numbers, [each.rank for each in added.columns])
    is_of = adapters[:, None] == numbers[None]
    # One of them at most is not 0.
    scale = (is_of.astype("float32") * scales[None]).sum(axis=1, keepdims=True)
    return adapters[:, None] == owners[None], scale
