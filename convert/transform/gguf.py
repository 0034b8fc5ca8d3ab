"""A model as one GGUF file: its size in advance, and its bytes on demand, some rows at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import Chunk, Room, Source, TensorInfo
from jlayer.convert.transform.cast import NUMPY_DTYPE, cast, count_nonfinite
from jlayer.convert.transform.quantize import whole_rows
from jlayer.encodings.blocks import BLOCKS
from jlayer.errors import CheckpointError
from jlayer.gguf.writer import NewTensor, encode_head, padding

_Q8_0 = "q8_0"
_WIDTH = BLOCKS[_Q8_0].weights


@dataclass(frozen=True)
class Written:
    """A tensor of the file, and what it is made of: `stored`, of the source, one after another,
    whose rows are reordered within each of `heads` (0: as they are); or `numbers`, which are
    float32. `adds_one`: to each number."""

    tensor: NewTensor
    stored: tuple[str, ...] = ()
    heads: int = 0
    adds_one: bool = False
    numbers: tuple[float, ...] = ()


class GgufFile:
    """The file. `tensors`: by name in it, in its order."""

    def __init__(
        self,
        values: Mapping[str, object],
        tensors: Mapping[str, Written],
        source: Source,
        *,
        progress: Progress,
    ):
        self.tensors, self._source, self._progress = tensors, source, progress
        self.header = encode_head(values, {name: row.tensor for name, row in tensors.items()})
        self.n_bytes = len(self.header) + sum(
            row.tensor.n_bytes + len(padding(row.tensor.n_bytes)) for row in tensors.values()
        )

    @property
    def source_bytes(self) -> int:
        """The bytes that are read for it."""
        stored = (name for row in self.tensors.values() for name in row.stored)
        return sum(self._source.tensors[name].n_bytes for name in stored)

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        """The file's bytes. Raises CheckpointError for numbers that the new type cannot hold."""
        yield self.header
        for row in self.tensors.values():
            for name in row.stored:
                yield from self._rows(row, name)
            if row.numbers:
                yield struct.pack(f"<{len(row.numbers)}f", *row.numbers)
            yield padding(row.tensor.n_bytes)

    def _rows(self, row, name):
        info, where = self._source.tensors[name], self._where(name)
        chunks = self._counted(name)
        if info.dtype not in NUMPY_DTYPE:  # blocks
            yield from chunks
            return
        if row.heads:
            width = info.n_bytes // info.shape[0] // NUMPY_DTYPE[info.dtype].itemsize
            chunks = (
                memoryview(block.view(np.uint8)).cast("B")
                for block in reordered(chunks, info.dtype, info.shape[0] // row.heads, width)
            )
        if row.adds_one:
            chunks = _plus_one(chunks, info.dtype)
            info = TensorInfo("float32", info.shape)
        if row.tensor.type == _Q8_0:
            for rows in whole_rows(chunks, info.dtype, info.shape[1]):
                yield memoryview(_finite_q8_0(rows, where)).cast("B")
        elif row.tensor.type == info.dtype:
            yield from chunks
        else:
            yield from _cast(chunks, info.dtype, row.tensor.type, where)

    def _counted(self, name):
        for chunk in self._source.chunks(name):
            self._progress.advance(len(chunk))
            yield chunk

    def _where(self, name):
        return f"{self._source.where(name)}: tensor {name}"


def reordered(chunks, dtype: str, head_dim: int, width: int) -> Iterator[np.ndarray]:
    """A matrix's rows, some heads at a time, in the order of GGUF: rows 2i and 2i + 1 of a head are
    those that were i and i + H/2. The inverse of the rule unpermute_rope. `width`: of a row."""
    for heads in whole_rows(chunks, dtype, head_dim * width):
        halves = heads.reshape(len(heads), 2, head_dim // 2, width)
        yield np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1, width)


def quantize_q8_0(rows: np.ndarray) -> np.ndarray:
    """Rows [n, in] in blocks of 32 inputs, as ggml's reference quantizes them: uint8
    [n, bytes of a row].

    A block is a float16 scale, the largest magnitude / 127, and 32 codes of 8 bits, rounded half
    away from zero. The codes are of the scale before it is rounded to float16.
    """
    blocks = rows.astype(np.float32).reshape(-1, _WIDTH)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
        stored = scales.astype(np.float16)
    scaled = blocks * inverse
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))
    raw = np.concatenate([stored.view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=1)
    return raw.reshape(len(rows), -1)


def _plus_one(chunks, dtype):
    """Numbers as float32 with 1 added, as llama.cpp's converter adds it."""
    for chunk in chunks:
        numbers = np.frombuffer(chunk, NUMPY_DTYPE[dtype]).astype(np.float32) + np.float32(1)
        yield memoryview(numbers.view(np.uint8))


def _finite_q8_0(rows, where):
    if not np.isfinite(rows.astype(np.float32)).all():
        raise CheckpointError(
            f"{where}: NaN or infinite numbers, which q8_0 cannot hold; choose f16 or bf16, or "
            "fetch the model again"
        )
    raw = quantize_q8_0(rows)
    if count_nonfinite(raw.tobytes(), _Q8_0):
        raise CheckpointError(f"{where}: numbers beyond the scales of q8_0; choose bf16")
    return raw


def _cast(chunks, dtype, target, where):
    for chunk in chunks:
        numbers = cast(chunk, dtype, target)
        lost = count_nonfinite(numbers, target) - count_nonfinite(chunk, dtype)
        if lost:
            raise CheckpointError(
                f"{where}: {dtype} numbers beyond the range of {target}: at least {lost}, "
                "expected 0; choose bf16"
            )
        yield numbers
