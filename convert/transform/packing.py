"""compressed-tensors' pack-quantized made again of what it was repacked into.

The inverse of `sources.repacked`, for zeros and sorted inputs, a tensor at a time. Codes are
streamed, some rows at a time; zeros and the order of inputs are small, and held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jlayer.convert.sources import words
from jlayer.convert.sources.files import Chunk, Source

_WORD_BYTES = 4


def codes_in_words(source: Source, parts: tuple[str, ...], *, bits: int) -> Iterator[Chunk]:
    """Rows of words int32, the first input in the low bits, zeros after the last. `parts`: the
    codes, and the order of their inputs where they are sorted."""
    name, *order = parts
    _, width = source.tensors[name].shape
    places = np.argsort(_whole(source, order[0], np.int32)) if order else None
    for rows in _rows(source, name):
        rows = rows if places is None else words.in_order(rows, places, bits)
        yield _bytes(np.pad(rows, ((0, 0), (0, -width % _WORD_BYTES))))


def zeros_in_words(source: Source, parts: tuple[str, ...], *, bits: int) -> Iterator[Chunk]:
    """Words int32 [out * bits / 32, groups]: those of outputs one below the other share a word, the
    first in the low bits."""
    (name,) = parts
    zeros = _whole(source, name, np.uint8).reshape(source.tensors[name].shape)
    yield _bytes(words.together(zeros, bits))


def groups_of_inputs(source: Source, parts: tuple[str, ...], *, group: int) -> Iterator[Chunk]:
    """int32 [in]: the group of each input. `parts`: the place that each had before they were sorted
    by it."""
    (name,) = parts
    order = _whole(source, name, np.int32)
    groups = np.empty_like(order)
    groups[order] = np.arange(len(order)) // group
    yield _bytes(groups)


def _whole(source, name, dtype):
    return np.frombuffer(b"".join(source.chunks(name)), dtype)


def _rows(source, name):
    """Whole rows of bytes: a chunk may end within one."""
    width, rest = source.tensors[name].shape[1], b""
    for chunk in source.chunks(name):
        raw = np.frombuffer(rest + bytes(chunk), np.uint8)
        n_rows = len(raw) // width
        rest = raw[n_rows * width :].tobytes()
        yield raw[: n_rows * width].reshape(n_rows, width)


def _bytes(array):
    return memoryview(np.ascontiguousarray(array).view(np.uint8)).cast("B")
