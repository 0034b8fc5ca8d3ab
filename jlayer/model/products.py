"""The product of activations with a weight of any encoding.

A matrix that is not plain is decoded to the activations' dtype, a block of rows at a time. On a CPU
a block fits the cache (three to six times faster than decoding the whole). The plan counts the
block's bytes (`encodings.grouped.block_rows`).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jlayer.encodings.base import WHOLE
from jlayer.encodings.grouped import block_rows
from jlayer.encodings.linear import ORDER
from jlayer.encodings.registry import ENCODINGS, encoding
from jlayer.model.blocks import DECODE_BLOCKS
from jlayer.model.codes import in_order, in_rows
from jlayer.model.decoding import DECODE_GROUPED


@struct.dataclass
class InBlob:
    """An array inside a longer array, as it came over the link: of bytes, or of its own numbers.
    `offset`: in bytes."""

    blob: jax.Array  # [bytes] uint8, or [numbers]
    offset: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    def rows(self, first, count: int) -> jax.Array:
        """`count` rows from `first` on; `first` may be traced."""
        dtype = np.dtype(self.dtype)
        if self.blob.dtype == dtype != np.uint8:
            width = math.prod(self.shape[1:])
            first = self.offset // dtype.itemsize + first * width
            raw = jax.lax.dynamic_slice_in_dim(self.blob, first, count * width)
            return raw.reshape(count, *self.shape[1:])
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        raw = jax.lax.dynamic_slice_in_dim(
            self.blob, self.offset + first * row_bytes, count * row_bytes
        )
        shape = (count, *self.shape[1:])
        if dtype.itemsize > 1:
            shape = (*shape, dtype.itemsize)  # the last axis holds the bytes of one number
        return jax.lax.bitcast_convert_type(raw.reshape(shape), dtype)


@struct.dataclass
class Encoded:
    """Some rows of a matrix whose encoding is not plain: its pieces, and how to decode them.

    `encoding`: a name in `encodings.registry`. `block_bytes`: the most decoded bytes at a time.
    """

    pieces: dict[str, jax.Array | InBlob]
    encoding: str = struct.field(pytree_node=False)
    block_bytes: int = struct.field(pytree_node=False)

    @property
    def n_rows(self) -> int:
        return self.pieces[ENCODINGS[self.encoding].main].shape[0]


@struct.dataclass
class InputsFirst:
    """A matrix whose inputs come first. Its product is as fast as of one with its rows first."""

    matrix: jax.Array  # [in, out]


@struct.dataclass
class ScaledRows:
    """A matrix in int8 with one scale a row. The scale is applied to the product, so XLA reads the
    small integers in the product itself, and no decoded copy is made."""

    q: jax.Array  # [out, in] int8
    scale: jax.Array  # [out] float32


def weight(pieces: dict, *, form: str, block_bytes: int):
    """A vector, or some rows of a matrix, from its pieces: an array if it is plain; InputsFirst if
    it is plain but for their order; else Encoded. `form`: the name of its encoding.

    A plain array inside a blob is sliced out; pieces of other encodings stay inside.
    """
    row = encoding(form)
    if row.is_plain:
        array = _rows(pieces[WHOLE], 0, pieces[WHOLE].shape[0])
        return array if row.by_rows else InputsFirst(array)
    return Encoded(pieces, encoding=form, block_bytes=block_bytes)


# Up to this many columns the CPU computes weight @ x.T instead of x @ weight.T.
FEW_COLUMNS = 128


def product(x, weight):
    """x [..., in] @ weight [out, in].T -> float32 [..., out], summed in float32.

    float32 inputs need full precision: accelerators otherwise round them to tf32. On the CPU the
    float32 result avoids an upcast of the whole bfloat16 matrix.
    """
    if isinstance(weight, ScaledRows):
        y = _plain_product(x, weight.q.astype(x.dtype))
        return y * weight.scale.reshape((1,) * (y.ndim - 1) + (-1,))
    if isinstance(weight, InputsFirst):
        return _dot(x, weight.matrix.astype(x.dtype), x.ndim - 1, 0)
    if isinstance(weight, Encoded):
        return PRODUCTS[ENCODINGS[weight.encoding].product](x, weight)
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
    """weight @ x.T, transposed.

    XLA's CPU library repacks the right-hand matrix at every call. For few columns that costs
    several times the product itself, so the weight goes left. The barrier keeps the compiler from
    swapping the sides again.
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


# Up to this many columns a CPU multiplies quantized weights in float32. Decoding takes most of the
# time then, and rounding to bfloat16 is a third of it.
FEW_IN_FLOAT32 = 8


def _grouped_product(x, weight):
    on_gpu = partial(_by_blocks, block_product=_joined_product, blocks=_in_a_row)
    return jax.lax.platform_dependent(x, weight, cpu=_grouped_on_cpu, default=on_gpu)


def _grouped_on_cpu(x, weight):
    if math.prod(x.shape[:-1]) <= FEW_IN_FLOAT32:
        x = x.astype(jnp.float32)
    return _by_blocks(x, weight, block_product=_parts_product, blocks=_in_a_loop)


def _by_blocks(x, weight, *, block_product, blocks):
    """The product, one block of rows after another; the last block may overlap the one before.
    `blocks`: how they follow one another."""
    row = ENCODINGS[weight.encoding]
    if ORDER in weight.pieces:
        x = jnp.take(x, _order(weight), axis=-1, mode="clip")
    x = in_order(x, parts=row.parts, run=row.run)
    n_rows, width = weight.n_rows, x.shape[-1]
    height = block_rows(n_rows, width * x.dtype.itemsize, weight.block_bytes)

    def rows_from(first, x):
        return block_product(x, _parts(weight, first, height, width))

    if height == n_rows:
        return rows_from(0, x)
    firsts = np.minimum(np.arange(0, n_rows, height, dtype=np.int32), n_rows - height)
    n_whole, rest = divmod(n_rows, height)
    return blocks(rows_from, firsts, x, n_whole=n_whole, rest=rest)


def _in_a_loop(rows_from, firsts, x, *, n_whole, rest):
    """For a CPU: a loop, which is compiled once. Of the last block only the last `rest` rows."""
    found = jax.lax.map(partial(rows_from, x=x), jnp.asarray(firsts))
    products = jnp.moveaxis(found[:n_whole], 0, -2).reshape(*x.shape[:-1], -1)
    if rest:
        products = jnp.concatenate([products, found[-1][..., -rest:]], axis=-1)
    return products


def _in_a_row(rows_from, firsts, x, *, n_whole, rest):
    """For a GPU: `_in_a_loop` without the loop, which would launch a third more kernels. The input
    of each block waits for the product before it: so one decoded block is there at a time."""
    found, own = [], x
    for first in firsts.tolist():
        found.append(rows_from(first, own))
        own, _ = jax.lax.optimization_barrier((x, found[-1]))
    last = [found[-1][..., -rest:]] if rest else []
    return jnp.concatenate([*found[:n_whole], *last], axis=-1)


def _joined_product(x, parts):
    """For a GPU: joins the ranges before one product, which launches fewer kernels."""
    return _plain_product(x, jnp.concatenate([part.astype(x.dtype) for part in parts], axis=1))


def _parts_product(x, parts):
    """For a CPU: multiplies each range by its own inputs; joining them first would copy."""
    total, at = None, 0
    for half in parts:
        part = _plain_product(x[..., at : at + half.shape[1]], half.astype(x.dtype))
        total = part if total is None else total + part
        at += half.shape[1]
    return total


def dequantize(weight: Encoded, width: int):
    """The decoded weights, float32 [out, in]; `width` is in."""
    return decoded_rows(weight, 0, weight.n_rows, width)


def decoded_rows(weight: Encoded, first, count: int, width: int):
    """Some rows of the decoded weights, float32 [count, in]; `first` may be traced."""
    row = ENCODINGS[weight.encoding]
    parts = jnp.concatenate(_parts(weight, first, count, width), axis=1)
    weights = in_rows(parts, parts=row.parts, run=row.run)
    if ORDER in weight.pieces:
        return jnp.zeros_like(weights).at[:, _order(weight)].set(weights)
    return weights


def _order(weight):
    """The place of each input of a matrix before they were sorted by group, int32 [in]."""
    return _rows(weight.pieces[ORDER], 0, weight.pieces[ORDER].shape[0])


def as_array(weight, width: int):
    """All of a matrix [out, in] as one array: as it is, or decoded; `width` is in."""
    return dequantize(weight, width) if isinstance(weight, Encoded) else weight


def embedded(table, ids, *, width: int, dtype):
    """Rows of an embedding table of any form: ids [R] -> [R, width] in `dtype`."""

    def rows(array):
        return array.at[ids].get(mode="clip")

    found = jax.tree.map(rows, table)
    if isinstance(table, ScaledRows):
        return (found.q.astype(jnp.float32) * found.scale[:, None]).astype(dtype)
    if isinstance(table, Encoded):
        return dequantize(found, width).astype(dtype)
    return found.astype(dtype)


def _parts(weight, first, count, width):
    """Some rows decoded to float32, as arrays of ranges of inputs, in the order of `in_order`."""
    row = ENCODINGS[weight.encoding]
    pieces = {
        name: _rows_for(piece, first, count, per=row.rows_per(name))
        for name, piece in weight.pieces.items()
        if name != ORDER
    }
    return DECODE[weight.encoding](**pieces, width=width)


def _rows_for(piece, first, count, *, per: int):
    """What a piece has for some rows of its matrix, a row for each; where it has a row for all of
    them, that one."""
    if per == 1:
        return _rows(piece, first, count)
    whole = _rows(piece, 0, piece.shape[0])
    return whole[(first + jnp.arange(count)) // per] if per else whole


def _rows(matrix, first, count):
    """Some rows of an array or of an InBlob."""
    if isinstance(matrix, InBlob):
        return matrix.rows(first, count)
    if count == matrix.shape[0]:
        return matrix
    return jax.lax.dynamic_slice_in_dim(matrix, first, count)


# How to multiply, and how to decode some rows, by the names of encodings.
PRODUCTS = {"grouped": _grouped_product}
DECODE = DECODE_GROUPED | DECODE_BLOCKS
