"""How weights with a scale for each group of inputs are decoded to float32.

Each function takes the pieces of some rows and gives the row's inputs as several arrays, which in
a row are in the order of `encodings.grouped.Decoded`. A compiler makes one loop of each.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.encodings.fp8 import ALL_ROWS, FP8, Float8
from jlayer.encodings.grouped import WHOLE_ROW, Grouped
from jlayer.encodings.int4 import CUBE, FLOAT_SHIFT, INT4, SCALE_OFFSET, ZERO
from jlayer.encodings.int8 import INT8
from jlayer.encodings.linear import LINEAR, Linear
from jlayer.encodings.tables import TABLES, Table
from jlayer.model.codes import looked_up


def _decode_int8(*, q, scale, width):
    return [q.astype(jnp.float32) * _spread(scale.astype(jnp.float32), INT8, width)]


def _decode_int4(*, q, scale, width):
    """Two ranges of inputs: low half bytes hold the first half of a row, high ones the second."""
    factors, half = _spread(_decode_scales(scale), INT4, width), q.shape[1]
    ranges = [_levels(q & 15) * factors[:, :half]]
    if width > half:  # a row of one input has no second half
        ranges.append(_levels(q[:, : width - half] >> 4) * factors[:, half:])
    return ranges


def _decode_table(*, q, scale, global_scale=None, width, table: Table):
    """Two ranges of inputs: the even ones and the odd ones."""
    scales = SCALES[table.scales](scale)
    if global_scale is not None:
        # XLA would multiply by the inverse of a number that all are divided by.
        of_all = jax.lax.optimization_barrier(jnp.broadcast_to(global_scale[None], scales.shape))
        scales = scales / of_all if table.global_scale == "divides" else scales * of_all
    factors = _spread(scales, table, width)
    halves = (q >> 4, q & 15) if table.is_high_first else (q & 15, q >> 4)
    return [looked_up(half, table.levels) * factors for half in halves]


def _decode_linear(*, q, scale, zero=None, width, row: Linear):
    """The even inputs and the odd ones where they share a byte."""
    factors = _spread(scale.astype(jnp.float32), row, width)
    zeros = row.zero if zero is None else _spread(zero.astype(jnp.float32), row, width)
    ranges = []
    for codes in (q & 15, q >> 4) if row.bits == 4 else (q,):
        weights = (codes.astype(jnp.float32) - zeros) * factors
        ranges.append(weights if row.factor == 1 else weights * np.float32(row.factor))
    return ranges


def _decode_fp8(*, q, scale, width, row: Float8):
    """A scale for all rows is [1]; else there is one for each row and group."""
    factors = scale.astype(jnp.float32)
    factors = factors[None] if row.rows == ALL_ROWS else _spread(factors, row, width)
    return [q.astype(jnp.float32) * factors]


def _e8m0(codes):
    """2 ** (code - 127), float32; 0 becomes the bits of 2 ** -127, and 255 those of infinity."""
    bits = codes.astype(jnp.uint32) << 23
    return jax.lax.bitcast_convert_type(jnp.maximum(bits, np.uint32(1 << 22)), jnp.float32)


def _spread(factors, row: Grouped | Float8, width):
    """Repeats each group's factor for its inputs of one part: [out, groups] -> [out, in / parts].
    A group is a multiple of the parts."""
    rows, groups = factors.shape
    if row.group == WHOLE_ROW:
        return factors
    group, width = row.group // row.parts, width // row.parts
    wide = jnp.broadcast_to(factors[:, :, None], (rows, groups, group))
    return wide.reshape(rows, groups * group)[:, :width]


def _levels(codes):
    u = codes.astype(jnp.int32).astype(jnp.float32) - ZERO
    return u * (1 + u * u * CUBE)


def _decode_scales(codes):
    bits = codes.astype(jnp.uint32)
    magnitude = ((bits & 127) << FLOAT_SHIFT) + np.uint32(SCALE_OFFSET)
    return jax.lax.bitcast_convert_type(magnitude | (bits >> 7) << 31, jnp.float32)


# The name of an encoding -> its function of the pieces of some rows.
DECODE_GROUPED = (
    {INT8.name: _decode_int8, INT4.name: _decode_int4}
    | {name: partial(_decode_table, table=table) for name, table in TABLES.items()}
    | {name: partial(_decode_linear, row=row) for name, row in LINEAR.items()}
    | {name: partial(_decode_fp8, row=row) for name, row in FP8.items()}
)
# How the scales of tables are decoded.
SCALES = {"e8m0": _e8m0, "number": lambda scale: scale.astype(jnp.float32)}
