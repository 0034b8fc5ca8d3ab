"""What adapters add to products of matrices, and the lengths that they give the rows: in float32
whatever the model is computed in, as PEFT has it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.additions import Addition
from jlayer.encodings.grouped import BLOCK_BYTES, block_rows
from jlayer.model.products import Encoded, decoded_rows, product


def low_rank_product(x, a, b, added: Addition, adapters=None):
    """x [..., in], A [ranks, in], B [out, ranks] -> float32 [..., out].

    `adapters`: int32 [R], the number of the adapter that each row is computed with; -1: none. Where
    the addition chooses, x is [R, in].
    """
    inner = product(x.astype(jnp.float32), a)
    if not added.chooses:
        return added.scale * product(inner, b)
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


def row_factors(weight, a, b, lengths, added: Addition):
    """What the rows of W + `scale` * B A are multiplied by to have these `lengths`: float32 [out].

    Some rows of W are there in float32 at a time (`plan.low_rank` counts them). How long they are
    could be known before only by a pass over all weights, whenever a model is opened.
    """
    by_blocks = partial(_row_lengths, scale=added.scale)
    own = jax.lax.platform_dependent(
        *(weight, a.astype(jnp.float32), b.astype(jnp.float32)),
        cpu=partial(by_blocks, block_bytes=BLOCK_BYTES["cpu"], rows_of=_rows_on_cpu),
        default=partial(by_blocks, block_bytes=BLOCK_BYTES["gpu"], rows_of=_rows),
    )
    return lengths.astype(jnp.float32) / own


def _row_lengths(weight, a, b, *, scale, block_bytes, rows_of):
    """The lengths of the rows of W + `scale` * B A, [out]: a block of rows after another, of which
    the last may overlap the one before. `rows_of`: (W, the first, how many) -> some of its rows."""
    (n_rows, _), width = b.shape, a.shape[1]
    height = block_rows(n_rows, 4 * width, block_bytes)

    def of_rows(first):
        own = jax.lax.dynamic_slice_in_dim(b, first, height)
        more = jnp.matmul(own, a, precision=jax.lax.Precision.HIGHEST)
        rows = rows_of(weight, first, height, width) + scale * more
        return jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))

    if height == n_rows:
        return of_rows(0)
    firsts = np.minimum(np.arange(0, n_rows, height, dtype=np.int32), n_rows - height)
    found = jax.lax.map(of_rows, jnp.asarray(firsts))
    n_whole, rest = divmod(n_rows, height)
    return jnp.concatenate(
        [found[:n_whole].reshape(-1), found[n_whole:, height - rest :].reshape(-1)]
    )


def _rows(weight, first, count, width):
    if isinstance(weight, Encoded):
        return decoded_rows(weight, first, count, width)
    return jax.lax.dynamic_slice_in_dim(weight, first, count).astype(jnp.float32)


def _rows_on_cpu(weight, first, count, width):
    """XLA's CPU has no slices of 16-bit floats: it would cast the whole matrix. So it copies it."""
    if isinstance(weight, Encoded) or weight.dtype == jnp.float32:
        return _rows(weight, first, count, width)
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint16)
    rows = jax.lax.dynamic_slice_in_dim(bits, first, count)
    return jax.lax.bitcast_convert_type(rows, weight.dtype).astype(jnp.float32)
