"""Matrices decoded and multiplied by numpy: for widths and machines without a kernel."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jlayer.encodings.base import WHOLE
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.fp8 import FP8, Float8
from jlayer.encodings.grouped import SCALE, WHOLE_ROW, Grouped, Q
from jlayer.encodings.int4 import CUBE, FLOAT_SHIFT, SCALE_OFFSET, ZERO
from jlayer.encodings.int8 import INT8
from jlayer.encodings.linear import LINEAR, Linear
from jlayer.encodings.registry import encoding
from jlayer.encodings.tables import E8M0_NAN, TABLES, Table
from jlayer.model.blocks import DECODE_BLOCKS
from jlayer.model.codes import in_rows

# The most decoded bytes at a time: they stay in a core's cache.
BLOCK_BYTES = 1 << 20


def scale_values() -> np.ndarray:
    """The scale that each of the 256 bytes of int4 stands for, float32."""
    bits = np.arange(256, dtype=np.uint32)
    magnitude = ((bits & 127) << FLOAT_SHIFT) + np.uint32(SCALE_OFFSET)
    return (magnitude | (bits >> 7) << 31).view(np.float32)


def levels() -> np.ndarray:
    """The number that each half byte of int4 stands for, before its scale, float32 [16]."""
    u = np.arange(16, dtype=np.float32) - ZERO
    return u * (1 + u * u * np.float32(CUBE))


def e8m0_values() -> np.ndarray:
    """The scale that each of the 256 bytes of e8m0 stands for, float32."""
    exponents = np.arange(E8M0_NAN) - 127
    return np.append(np.ldexp(np.ones(E8M0_NAN, np.float32), exponents), np.float32(np.nan))


def halved_values() -> np.ndarray:
    """Half of what each of the 256 bytes of gguf_mxfp4 stands for, float32: its levels are
    doubled, and every byte is a number."""
    return np.ldexp(np.ones(256, np.float32), np.arange(256) - 128)


def float8_values() -> np.ndarray:
    """The number that each of the 256 bytes of float8_e4m3fn stands for, float32."""
    return np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


_SCALES, _LEVELS, _E8M0 = scale_values(), levels(), e8m0_values()

# How the scales of tables are stored -> what they stand for.
SCALES_OF_TABLES = {
    "e8m0": lambda scale: _E8M0[scale],
    "number": lambda scale: scale.astype(np.float32),
}


def decoded(form: str, pieces: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    """The weights [rows, width], float32. Each piece has a row for each of the matrix
    (`some_rows`), or one for all."""
    row = encoding(form)
    if row.is_plain:
        return pieces[WHOLE].astype(np.float32)
    if form in BLOCKS:
        with np.errstate(invalid="ignore", over="ignore"):  # infinite scales are theirs
            parts = DECODE_BLOCKS[form](**pieces, width=width)
        return in_rows(np.concatenate(parts, axis=1), parts=row.parts, run=row.run)
    if form in TABLES:
        return _of_table(row, **pieces, width=width)
    if form in LINEAR:
        return _of_integers(row, **pieces, width=width)
    if form in FP8:
        return pieces[Q].astype(np.float32) * _spread(pieces[SCALE].astype(np.float32), row, width)
    q, scale = pieces[Q], pieces[SCALE]
    if form == INT8.name:
        return q * _spread(scale.astype(np.float32), row, width)
    codes = np.concatenate([q & 15, q >> 4], axis=1)[:, :width]
    return _LEVELS[codes] * _spread(_SCALES[scale], row, width)


def _of_table(table: Table, *, q, scale, global_scale=None, width):
    levels = np.array(table.levels, np.float32)
    factors = SCALES_OF_TABLES[table.scales](scale)
    if global_scale is not None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # zero is theirs
            divides = table.global_scale == "divides"
            factors = factors / global_scale if divides else factors * global_scale
    return levels[_pairs(q, table.is_high_first)] * _spread(factors, table, width)


def _of_integers(row: Linear, *, q, scale, zero=None, order=None, width):
    zeros = np.float32(row.zero)
    if zero is not None:
        zeros = _spread(zero.astype(np.float32), row, width)
    numbers = (_pairs(q, False) if row.bits == 4 else q).astype(np.float32) - zeros
    weights = numbers * _spread(scale.astype(np.float32), row, width)
    if order is not None:  # sorted by group: each input goes back to its place
        weights[:, order] = weights.copy()
    return weights if row.factor == 1 else weights * np.float32(row.factor)


def _pairs(q, is_high_first):
    """The half bytes [rows, 2 * bytes], of each byte one after the other."""
    halves = (q >> 4, q & 15) if is_high_first else (q & 15, q >> 4)
    return np.stack(halves, axis=-1).reshape(len(q), -1)


def product(x: np.ndarray, form: str, pieces: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    """x float32 [C, in] -> float32 [C, rows], decoding some rows at a time."""
    n_rows = pieces[encoding(form).main].shape[0]
    y = np.empty((x.shape[0], n_rows), np.float32)
    step = max(1, BLOCK_BYTES // (4 * width))
    for first in range(0, n_rows, step):
        count = min(step, n_rows - first)
        some = some_rows(form, pieces, first, count)
        y[:, first : first + count] = x @ decoded(form, some, width).T
    return y


def some_rows(
    form: str, pieces: Mapping[str, np.ndarray], first: int, count: int
) -> dict[str, np.ndarray]:
    """What the pieces of a matrix have for `count` of its rows from `first` on: a row for each; of
    a piece that is for all rows, all of it."""

    def of(name, piece):
        per = encoding(form).rows_per(name)
        if per == 1:
            return piece[first : first + count]
        return piece[np.arange(first, first + count) // per] if per else piece

    return {name: of(name, piece) for name, piece in pieces.items()}


def _spread(factors, row: Grouped | Float8, width):
    """Repeats each group's factor for its inputs: [rows, groups] -> [rows, width]."""
    if row.group == WHOLE_ROW:
        return factors
    return np.repeat(factors, row.group, axis=1)[:, :width]
