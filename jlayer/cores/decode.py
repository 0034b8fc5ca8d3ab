"""Matrices decoded and multiplied by numpy: for widths and machines without a kernel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlayer.encodings.base import WHOLE
from jlayer.encodings.grouped import SCALE, Q
from jlayer.encodings.int4 import CUBE, FLOAT_SHIFT, INT4, SCALE_OFFSET, ZERO
from jlayer.encodings.int8 import INT8
from jlayer.encodings.registry import encoding
from jlayer.encodings.tables import E8M0_NAN, TABLES, Table

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


_SCALES, _LEVELS = scale_values(), levels()


def e8m0_values() -> np.ndarray:
    """The scale that each of the 256 bytes of e8m0 stands for, float32."""
    exponents = np.arange(E8M0_NAN) - 127
    return np.append(np.ldexp(np.ones(E8M0_NAN, np.float32), exponents), np.float32(np.nan))


# How the scales of tables are stored -> what each byte stands for.
SCALES_OF_TABLES = {"e8m0": e8m0_values()}


def decoded(form: str, pieces: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    """The weights [rows, width], float32. Each piece has a row for each of the matrix
    (`some_rows`), or one for all."""
    if encoding(form).is_plain:
        return pieces[WHOLE].astype(np.float32)
    q, scale = pieces[Q], pieces[SCALE]
    if form in TABLES:
        return _of_table(TABLES[form], q, scale, width)
    if form == INT8.name:
        return q * _spread(scale.astype(np.float32), INT8.group, width)
    codes = np.concatenate([q & 15, q >> 4], axis=1)[:, :width]
    return _LEVELS[codes] * _spread(_SCALES[scale], INT4.group, width)


def _of_table(table: Table, q, scale, width):
    codes = np.stack([q & 15, q >> 4], axis=-1).reshape(len(q), width)
    levels = np.array(table.levels, np.float32)
    return levels[codes] * _spread(SCALES_OF_TABLES[table.scales][scale], table.group, width)


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


def _spread(factors, group, width):
    """Repeats each group's factor for its inputs: [rows, groups] -> [rows, width]."""
    return np.repeat(factors, group, axis=1)[:, :width]
