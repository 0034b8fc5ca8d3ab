"""Quantization: for every group of weights the scale with the least squared error.

Uses the weights alone, no data. Rows are independent and every sum has one order, so the bytes do
not depend on how rows are divided among chunks and threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from jlayer.convert.sources.files import Chunk, Source
from jlayer.convert.transform.cast import NUMPY_DTYPE
from jlayer.convert.transform.packed import LEVELS, decode_scales, dequantize, pack
from jlayer.encodings.grouped import Grouped
from jlayer.encodings.int4 import FLOAT_SHIFT, INT4, SCALE_OFFSET

# The largest magnitude that int4 can represent; no trained weight comes near.
INT4_LIMIT = float(decode_scales(np.array([127], np.uint8))[0] * LEVELS[-1])
# Weights that a thread works on at a time: its arrays then stay in the processor's cache.
BLOCK_WEIGHTS = 1 << 16
# Candidates around the smallest scale that represents the group's largest weight. int4: steps of
# the stored scale (6 to 12% each; further steps gain under 0.5%). int8: ratios.
_INT4_STEPS = (1, 0, -1, -2)
_INT8_RATIOS = (1.0, 0.995, 0.99, 0.985, 0.98)
# int4's nearest level is looked up in a table with so many entries for each unit of the scale.
_FINE = 64
_LOWEST = float(LEVELS[0]) - 0.5
_THRESHOLDS = (LEVELS[1:] + LEVELS[:-1]) / 2
_CODES = np.searchsorted(
    _THRESHOLDS, _LOWEST + (np.arange(int((LEVELS[-1] - _LOWEST + 1) * _FINE)) + 0.5) / _FINE
).astype(np.uint8)
_FINE_LEVELS = LEVELS[_CODES] * _FINE


def whole_rows(chunks: Iterable[Chunk], dtype: str, width: int) -> Iterator[np.ndarray]:
    """A matrix's rows [n, width], some at a time, from chunks of its bytes of any size."""
    row_bytes, rest = width * NUMPY_DTYPE[dtype].itemsize, b""
    for chunk in chunks:
        data = rest + bytes(chunk) if rest else memoryview(chunk).cast("B")
        whole = len(data) // row_bytes * row_bytes
        if whole:
            yield np.frombuffer(data[:whole], NUMPY_DTYPE[dtype]).reshape(-1, width)
        rest = bytes(data[whole:])


def sample_errors(source: Source, shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """By matrix: the squared error at int4, relative to the sum of squares.

    Measured on the first chunk: all rows of a small matrix, hundreds of a large one. Infinite where
    int4 cannot represent a weight.
    """
    errors = {}
    for tensor, shape in shapes.items():
        rows = next(whole_rows(source.chunks(tensor), source.tensors[tensor].dtype, shape[1]))
        try:
            errors[tensor] = relative_error(rows, INT4, quantize(rows, INT4))
        except OverflowError:
            errors[tensor] = math.inf
    return errors


class Quantizer:
    """Quantizes rows on all cores of the processor. A context manager."""

    def __init__(self):
        cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(cores, thread_name_prefix="quantize")

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()

    def quantize(self, rows: np.ndarray, scheme: Grouped) -> dict[str, np.ndarray]:
        """Quantizes weights [n, width], finite and of any float dtype; returns pieces by name.

        Raises OverflowError where the scheme cannot represent a weight.
        """
        parts = list(self._pool.map(lambda block: quantize(block, scheme), _blocks(rows)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _blocks(rows) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_WEIGHTS // rows.shape[1])
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def quantize(rows: np.ndarray, scheme: Grouped) -> dict[str, np.ndarray]:
    """Quantizes rows as `Quantizer.quantize` does, in the calling thread."""
    n, width = rows.shape
    n_groups = -(-width // scheme.group)
    padded = np.zeros((n, n_groups * scheme.group), np.float32)
    padded[:, :width] = rows
    # One group a column: a sum then has the same order whatever the other columns are.
    columns = np.ascontiguousarray(padded.reshape(-1, scheme.group).T)
    if scheme is INT4 and np.abs(columns).max() > INT4_LIMIT:
        raise OverflowError(f"weights beyond {INT4_LIMIT:g}, which int4 cannot represent")
    search = _search_int4 if scheme is INT4 else _search_int8
    codes, scales = search(columns)
    codes = np.ascontiguousarray(codes.T).reshape(n, -1)[:, :width]
    return {"q": pack(codes) if scheme is INT4 else codes, "scale": scales.reshape(n, n_groups)}


def relative_error(rows: np.ndarray, scheme: Grouped, pieces: dict[str, np.ndarray]) -> float:
    """The squared error of quantized rows, relative to their sum of squares."""
    rows = rows.astype(np.float32)
    error = dequantize(scheme, pieces["q"], pieces["scale"], width=rows.shape[1]) - rows
    total = np.square(rows, dtype=np.float64).sum()
    return float(np.square(error, dtype=np.float64).sum() / total) if total else 0.0


def _search_int4(columns):
    """Weights [group, N] -> (codes uint8 [group, N], codes of scales uint8 [N])."""
    high, low = columns.max(0), -columns.min(0)
    negated = low > high  # the levels reach further on one side; the scale's sign chooses it
    columns = columns * np.where(negated, np.float32(-1), np.float32(1))
    up, down = np.maximum(high, low), np.minimum(high, low)
    reach = np.maximum(up / LEVELS[-1], down / -LEVELS[0])
    largest = _scale_at_least(reach)
    best, chosen = np.full(reach.shape, np.inf, np.float32), np.zeros(reach.shape, np.uint8)
    scratch = _Scratch(columns.shape)
    for step in _INT4_STEPS:
        code = np.clip(largest + step, 0, 127).astype(np.uint8)
        scale = decode_scales(code)
        error = np.square(scale) * _level_error(columns, scale, scratch)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, code, chosen)
    _look_up(columns, decode_scales(chosen), scratch)
    return np.take(_CODES, scratch.places, mode="clip"), chosen | negated.astype(np.uint8) << 7


def _scale_at_least(reach):
    """The code of the smallest scale of at least `reach`, or of the largest scale."""
    bits = reach.view(np.uint32).astype(np.int64) - SCALE_OFFSET
    return np.clip(-(-bits >> FLOAT_SHIFT), 0, 127)


class _Scratch:
    """Arrays that the search for a scale uses again for each candidate."""

    def __init__(self, shape):
        self.scaled = np.empty(shape, np.float32)
        self.levels = np.empty(shape, np.float32)
        self.places = np.empty(shape, np.intp)


def _look_up(columns, scale, scratch):
    """Fills `scratch.places` with each weight's index in the fine table, to be clipped to it."""
    np.multiply(columns, np.float32(_FINE) / scale, out=scratch.scaled)
    np.subtract(scratch.scaled, np.float32(_LOWEST * _FINE), out=scratch.levels)
    np.copyto(scratch.places, scratch.levels, casting="unsafe")


def _level_error(columns, scale, scratch):
    """Each group's squared error in units of its squared scale."""
    _look_up(columns, scale, scratch)
    np.take(_FINE_LEVELS, scratch.places, mode="clip", out=scratch.levels)
    np.subtract(scratch.levels, scratch.scaled, out=scratch.levels)
    np.multiply(scratch.levels, scratch.levels, out=scratch.levels)
    return np.add.reduce(scratch.levels, axis=0) / np.float32(_FINE * _FINE)


def _search_int8(columns):
    """Weights [group, N] -> (codes int8 [group, N], scales bfloat16 [N])."""
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
    """The scale as it is stored, in bfloat16; that of a group of zeros is zero."""
    return scale.astype(ml_dtypes.bfloat16).astype(np.float32)


def _rounded_codes(columns, scale):
    codes = np.rint(columns / np.where(scale == 0, np.float32(1), scale))
    return np.clip(codes, -127, 127, out=codes)
