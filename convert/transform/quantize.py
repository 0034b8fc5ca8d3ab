"""Weights into fewer bits: for every group the scale that leaves the least squared error.

Data-free: all that is looked at are the weights themselves. Rows are independent and every sum is
taken in one order, so the bytes are the same however the rows are cut and shared among threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from convert.sources.files import Chunk, Source
from convert.transform.cast import NUMPY_DTYPE
from convert.transform.packed import LEVELS, decode_scales, dequantize, pack
from jlayer.encodings.quantization import FLOAT_SHIFT, INT4, SCALE_OFFSET, Scheme

# The largest magnitude that int4 reaches, with the largest scale: no trained weight comes near.
INT4_LIMIT = float(decode_scales(np.array([127], np.uint8))[0] * LEVELS[-1])
# Weights that a thread works on at a time: all that it needs stays in the processor's cache.
BLOCK_WEIGHTS = 1 << 16
# Scales tried around the smallest that reaches the group's largest weight: for int4 so many steps
# of the stored scale (each 6 to 12%; others gain under 0.5%), for int8 these ratios.
_INT4_STEPS = (1, 0, -1, -2)
_INT8_RATIOS = (1.0, 0.995, 0.99, 0.985, 0.98)
# int4's nearest level is looked up: so many entries for a scale's length.
_FINE = 64
_LOWEST = float(LEVELS[0]) - 0.5
_THRESHOLDS = (LEVELS[1:] + LEVELS[:-1]) / 2
_CODES = np.searchsorted(
    _THRESHOLDS, _LOWEST + (np.arange(int((LEVELS[-1] - _LOWEST + 1) * _FINE)) + 0.5) / _FINE
).astype(np.uint8)
_FINE_LEVELS = LEVELS[_CODES] * _FINE


def whole_rows(chunks: Iterable[Chunk], dtype: str, width: int) -> Iterator[np.ndarray]:
    """A matrix's bytes, in chunks of any size, as float32 [n, width] of some whole rows at a
    time."""
    row_bytes, rest = width * NUMPY_DTYPE[dtype].itemsize, b""
    for chunk in chunks:
        data = rest + bytes(chunk) if rest else memoryview(chunk).cast("B")
        whole = len(data) // row_bytes * row_bytes
        if whole:
            yield np.frombuffer(data[:whole], NUMPY_DTYPE[dtype]).reshape(-1, width)
        rest = bytes(data[whole:])


def sample_errors(source: Source, shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Each matrix's squared error at int4, as a part of its sum of squares, from its first rows (a
    chunk of them: all of a small matrix, hundreds of a large one)."""
    found = {}
    for tensor, shape in shapes.items():
        rows = next(whole_rows(source.chunks(tensor), source.tensors[tensor].dtype, shape[1]))
        try:
            found[tensor] = relative_error(rows, INT4, quantize(rows, INT4))
        except OverflowError:
            found[tensor] = math.inf
    return found


class Quantizer:
    """Quantises rows in all the processor's cores. A context."""

    def __init__(self):
        cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(cores, thread_name_prefix="quantize")

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()

    def quantize(self, rows: np.ndarray, scheme: Scheme) -> dict[str, np.ndarray]:
        """Weights [n, width], of any float dtype and finite, as their pieces.

        Raises OverflowError where one is beyond what the scheme reaches.
        """
        parts = list(self._pool.map(lambda some: quantize(some, scheme), _pieces(rows)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _pieces(rows) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_WEIGHTS // rows.shape[1])
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def quantize(rows: np.ndarray, scheme: Scheme) -> dict[str, np.ndarray]:
    """The same in one thread."""
    n, width = rows.shape
    n_groups = -(-width // scheme.group)
    padded = np.zeros((n, n_groups * scheme.group), np.float32)
    padded[:, :width] = rows
    # Groups as columns: sums run down them, one order whatever stands beside.
    columns = np.ascontiguousarray(padded.reshape(-1, scheme.group).T)
    if scheme is INT4 and np.abs(columns).max() > INT4_LIMIT:
        raise OverflowError(f"weights beyond {INT4_LIMIT:g}, which int4 does not reach")
    search = _search_int4 if scheme is INT4 else _search_int8
    codes, scales = search(columns)
    codes = np.ascontiguousarray(codes.T).reshape(n, -1)[:, :width]
    return {"q": pack(codes) if scheme is INT4 else codes, "scale": scales.reshape(n, n_groups)}


def relative_error(rows: np.ndarray, scheme: Scheme, pieces: dict[str, np.ndarray]) -> float:
    """The squared error of quantised rows, as a part of their sum of squares."""
    rows = rows.astype(np.float32)
    error = dequantize(scheme, pieces["q"], pieces["scale"], width=rows.shape[1]) - rows
    total = np.square(rows, dtype=np.float64).sum()
    return float(np.square(error, dtype=np.float64).sum() / total) if total else 0.0


def _search_int4(columns):
    """[group, N] -> (codes uint8 [group, N], scales' codes uint8 [N])."""
    high, low = columns.max(0), -columns.min(0)
    turned = low > high
    columns = columns * np.where(turned, np.float32(-1), np.float32(1))
    up, down = np.maximum(high, low), np.minimum(high, low)
    reach = np.maximum(up / LEVELS[-1], down / -LEVELS[0])
    largest = _scale_at_least(reach)
    best, chosen = np.full(reach.shape, np.inf, np.float32), np.zeros(reach.shape, np.uint8)
    room = _Room(columns.shape)
    for step in _INT4_STEPS:
        code = np.clip(largest + step, 0, 127).astype(np.uint8)
        scale = decode_scales(code)
        error = np.square(scale) * _level_error(columns, scale, room)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, code, chosen)
    _places(columns, decode_scales(chosen), room)
    return np.take(_CODES, room.places, mode="clip"), chosen | turned.astype(np.uint8) << 7


def _scale_at_least(reach):
    """The code of the smallest scale that is no smaller, or the largest there is."""
    bits = reach.view(np.uint32).astype(np.int64) - SCALE_OFFSET
    return np.clip(-(-bits >> FLOAT_SHIFT), 0, 127)


class _Room:
    """Memory that the search goes through again and again."""

    def __init__(self, shape):
        self.scaled = np.empty(shape, np.float32)
        self.levels = np.empty(shape, np.float32)
        self.places = np.empty(shape, np.intp)


def _places(columns, scale, room):
    """Fills `room.places` with where in the fine table each weight is looked up; the table's ends
    stand for all beyond."""
    np.multiply(columns, np.float32(_FINE) / scale, out=room.scaled)
    np.subtract(room.scaled, np.float32(_LOWEST * _FINE), out=room.levels)
    np.copyto(room.places, room.levels, casting="unsafe")


def _level_error(columns, scale, room):
    """Each group's squared error in units of its scale."""
    _places(columns, scale, room)
    np.take(_FINE_LEVELS, room.places, mode="clip", out=room.levels)
    np.subtract(room.levels, room.scaled, out=room.levels)
    np.multiply(room.levels, room.levels, out=room.levels)
    return np.add.reduce(room.levels, axis=0) / np.float32(_FINE * _FINE)


def _search_int8(columns):
    """[group, N] -> (codes int8 [group, N], scales bfloat16 [N])."""
    reach = np.abs(columns).max(0) / np.float32(127)
    best, chosen = np.full(reach.shape, np.inf, np.float32), reach
    for ratio in _INT8_RATIOS:
        scale = _rounded(reach * np.float32(ratio))
        error = np.square(_rounded_codes(columns, scale) * scale - columns)
        error = np.add.reduce(error, axis=0)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, scale, chosen)
    codes = _rounded_codes(columns, chosen).astype(np.int8)
    return codes, chosen.astype(ml_dtypes.bfloat16)


def _rounded(scale):
    """As it will be stored; a group of zeros has the scale zero."""
    return scale.astype(ml_dtypes.bfloat16).astype(np.float32)


def _rounded_codes(columns, scale):
    found = np.rint(columns / np.where(scale == 0, np.float32(1), scale))
    return np.clip(found, -127, 127, out=found)
