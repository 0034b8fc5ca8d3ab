"""Quantised weights: the leaf type, and the one product that takes plain and quantised weights.

A quantised matrix is written out in the activations' dtype for the product, a block of its rows at
a time: what is written out stays in the processor's cache (three to six times faster than the
whole, on a CPU) and never exceeds a bound that the plan knows (`quantization.block_rows`).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jlayer.encodings.quantization import (
    CUBE,
    FLOAT_SHIFT,
    SCALE_OFFSET,
    ZERO,
    block_rows,
    scheme_of_q,
    split_piece,
)


@struct.dataclass
class InBlob:
    """An array that lies in a longer one of bytes, as it came over the link."""

    blob: jax.Array  # [bytes] uint8
    offset: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    def rows(self, first, count: int) -> jax.Array:
        """`count` of its rows from `first` on, which a program may compute."""
        dtype = np.dtype(self.dtype)
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        raw = jax.lax.dynamic_slice_in_dim(
            self.blob, self.offset + first * row_bytes, count * row_bytes
        )
        shape = (count, *self.shape[1:])
        if dtype.itemsize > 1:
            shape = (*shape, dtype.itemsize)  # bytes of a number, which become one
        return jax.lax.bitcast_convert_type(raw.reshape(shape), dtype)


@struct.dataclass
class Quantized:
    """Some rows of a quantised matrix, as `jlayer.encodings.quantization` describes them.

    `block_bytes`: the most that is written out at a time.
    """

    q: jax.Array | InBlob  # [out, in] int8, or [out, (in + 1) // 2] uint8
    scale: jax.Array | InBlob  # [out, groups]
    block_bytes: int = struct.field(pytree_node=False)


def join_pieces(arrays: dict, *, block_bytes: int) -> dict:
    """Arrays by leaf, with the pieces of each quantised leaf (`q_proj.q`, `q_proj.scale`) joined to
    one under its own name. What lies in a blob stays there if it is a piece."""
    found, pieces = {}, {}
    for name, array in arrays.items():
        leaf, piece = split_piece(name)
        if piece is None:
            found[leaf] = _rows(array, 0, array.shape[0])
        else:
            pieces.setdefault(leaf, {})[piece] = array
    return found | {leaf: Quantized(**own, block_bytes=block_bytes) for leaf, own in pieces.items()}


# Columns up to which the CPU is asked for weight @ x.T instead of x @ weight.T.
FEW_COLUMNS = 128


def product(x, weight):
    """x [..., in] @ weight [out, in].T -> float32 [..., out], summed in float32.

    float32 inputs ask for full precision, since accelerators otherwise round them to tf32; on the
    CPU the float32 result spares bfloat16 an upcast of the whole matrix.
    """
    if isinstance(weight, Quantized):
        return _quantized_product(x, weight)
    return _plain_product(x, weight.astype(x.dtype))


def exact_for(dtype):
    """The matrix precision that keeps every bit of `dtype`."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _plain_product(x, weight):
    if math.prod(x.shape[:-1]) > FEW_COLUMNS:
        return _input_first(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=_weight_first, default=_input_first)


def _input_first(x, weight):
    return _dot(x, weight, x.ndim - 1, 1)


def _weight_first(x, weight):
    """XLA's CPU library repacks the right-hand matrix at every call, which for few columns costs
    several times the product itself: so the weight stands on the left. The barrier keeps the
    compiler from turning it back.
    """
    y = _dot(weight, x.reshape(-1, x.shape[-1]), 1, 1)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


def _dot(left, right, left_axis, right_axis):
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=exact_for(left.dtype),
        preferred_element_type=jnp.float32,
    )


# Columns up to which a CPU multiplies quantised weights in float32: there the time goes into
# writing them out, and to round them to bfloat16 takes a third of that.
FEW_IN_FLOAT32 = 8


def _quantized_product(x, weight):
    return jax.lax.platform_dependent(
        x, weight, cpu=_quantized_on_cpu, default=partial(_by_blocks, block_product=_joined_product)
    )


def _quantized_on_cpu(x, weight):
    if math.prod(x.shape[:-1]) <= FEW_IN_FLOAT32:
        x = x.astype(jnp.float32)
    return _by_blocks(x, weight, block_product=_halves_product)


def _by_blocks(x, weight, *, block_product):
    """Blocks of rows one after another; the last may overlap the one before it."""
    n_rows, width = weight.q.shape[0], x.shape[-1]
    height = block_rows(n_rows, width * x.dtype.itemsize, weight.block_bytes)

    def rows_from(first):
        pieces = (_rows(piece, first, height) for piece in (weight.q, weight.scale))
        return block_product(x, *pieces)

    if height == n_rows:
        return rows_from(0)
    firsts = np.minimum(np.arange(0, n_rows, height, dtype=np.int32), n_rows - height)
    blocks = jax.lax.map(rows_from, jnp.asarray(firsts))
    n_whole, rest = divmod(n_rows, height)
    found = jnp.moveaxis(blocks[:n_whole], 0, -2).reshape(*x.shape[:-1], n_whole * height)
    if rest:
        found = jnp.concatenate([found, blocks[-1][..., height - rest :]], axis=-1)
    return found


def _joined_product(x, q, scale):
    """A GPU writes both halves of int4 at once, side by side: fewer programs to start."""
    halves = [half.astype(x.dtype) for half in _halves(q, scale, x.shape[-1])]
    return _plain_product(x, jnp.concatenate(halves, axis=1))


def _halves_product(x, q, scale):
    """A CPU multiplies halves of int4 by their own inputs: to join them first would move them."""
    halves = _halves(q, scale, x.shape[-1])
    found, at = None, 0
    for half in halves:
        part = _plain_product(x[..., at : at + half.shape[1]], half.astype(x.dtype))
        found = part if found is None else found + part
        at += half.shape[1]
    return found


def dequantize(weight: Quantized, width: int):
    """The weights float32 [out, in] that it stands for."""
    n_rows = weight.q.shape[0]
    pieces = (_rows(piece, 0, n_rows) for piece in (weight.q, weight.scale))
    return jnp.concatenate(_halves(*pieces, width), axis=1)


def _rows(matrix, first, count):
    """Some rows of an array, or of one in a blob."""
    if isinstance(matrix, InBlob):
        return matrix.rows(first, count)
    if count == matrix.shape[0]:
        return matrix
    return jax.lax.dynamic_slice_in_dim(matrix, first, count)


def _halves(q, scale, width):
    """The weights in float32, in consecutive ranges of inputs: one of int8, two of int4."""
    scheme = scheme_of_q(q.dtype.name)
    if scheme.bits == 8:
        factors = _spread(scale.astype(jnp.float32), scheme.group, width)
        return [q.astype(jnp.float32) * factors]
    factors = _spread(_decode_scales(scale), scheme.group, width)
    half = q.shape[1]
    found = [_levels(q & 15) * factors[:, :half]]
    if width > half:  # else the one input is a half by itself
        found.append(_levels(q[:, : width - half] >> 4) * factors[:, half:])
    return found


def _spread(factors, group, width):
    """[out, groups] -> [out, in]."""
    rows, groups = factors.shape
    wide = jnp.broadcast_to(factors[:, :, None], (rows, groups, group))
    return wide.reshape(rows, groups * group)[:, :width]


def _levels(codes):
    u = codes.astype(jnp.int32).astype(jnp.float32) - ZERO
    return u * (1 + u * u * CUBE)


def _decode_scales(codes):
    bits = codes.astype(jnp.uint32)
    magnitude = ((bits & 127) << FLOAT_SHIFT) + np.uint32(SCALE_OFFSET)
    return jax.lax.bitcast_convert_type(magnitude | (bits >> 7) << 31, jnp.float32)
