"""A source with an adapter merged into its matrices, some rows at a time: no matrix is ever whole.

Computed in float32, and rounded once to the matrix's own dtype.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from jlayer.checkpoint.adapter import Adapter, read_adapter
from jlayer.checkpoint.copies import check_copies
from jlayer.checkpoint.layout import MERGED
from jlayer.convert.sources.files import Chunk, Room, Source, open_unchanged, read_bytes
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.transform.cast import NUMPY_DTYPE, count_nonfinite
from jlayer.convert.transform.quantize import whole_rows
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf.parts import is_gguf
from jlayer.strict import close, parse_json_object, read_small_file


def merged(checked: CheckedSource, folder: str | os.PathLike) -> CheckedSource:
    """The same source with the adapter in a folder merged into it; a side file says which.

    Raises CheckpointError, UnsupportedModelError (a base in an encoding, whose rounding would lose
    what the adapter adds) or StorageError.
    """
    if is_gguf(checked.folder) or checked.quantization is not None:
        raise UnsupportedModelError(
            f"{checked.folder}: its weights are quantized as they are published, and an adapter "
            "cannot be merged into such; take the plain checkpoint of this model"
        )
    adapter = read_adapter(folder, checked.cfg)
    check_copies(adapter, lambda name: _rows(checked.tensors, name))
    own = {"sha256": adapter.digest, "matrices": len(adapter.matrices)}
    made = {"adapters": [*_merged_before(checked), own]}
    sides = {**checked.side_files, MERGED: (json.dumps(made, indent=2) + "\n").encode()}
    tensors = MergedSource(checked.tensors, adapter)
    return replace(checked, tensors=tensors, side_files=sides)


def _rows(source, name):
    """Yields (the number of the first row, rows) of a tensor."""
    entry, first = source.tensors[name], 0
    for rows in whole_rows(source.chunks(name), entry.dtype, math.prod(entry.shape[1:])):
        yield first, rows
        first += len(rows)


def _merged_before(checked):
    """What the base says of adapters that it has in it already."""
    file = checked.side_files.get(MERGED)
    if file is None:
        return []
    found = parse_json_object(read_small_file(file.real), what=file.path).get("adapters")
    if not isinstance(found, list):
        raise CheckpointError(f"{file.path}: has no list of adapters; remove this file")
    return found


class MergedSource:
    """The tensors of a source, an adapter merged into some."""

    def __init__(self, source: Source, adapter: Adapter):
        self._source, self._adapter = source, adapter
        self.tensors = source.tensors
        self.where, self.places_of, self.close = source.where, source.places_of, source.close

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        added = self._adapter.matrices.get(name)
        if added is None:
            yield from self._source.chunks(name, room)
            return
        dtype, first = self.tensors[name].dtype, 0
        a, b = self._read(added.a), self._read(added.b)
        with np.errstate(over="ignore"):  # what is not finite is found below
            b = b * np.float32(added.scale)
        lengths = self._read(added.magnitude) if added.magnitude else None
        for rows in whole_rows(self._source.chunks(name), dtype, added.shape[1]):
            own = slice(first, first + len(rows))
            found = with_added(rows, a, b[own], None if lengths is None else lengths[own])
            with np.errstate(over="ignore"):
                found = found.astype(NUMPY_DTYPE[dtype])
            chunk = memoryview(found.view(np.uint8)).cast("B")
            if count_nonfinite(chunk, dtype):
                raise CheckpointError(
                    f"{self.where(name)}: tensor {name}: with what the adapter adds, numbers are "
                    f"not finite in {dtype}; fetch both again"
                )
            yield chunk
            first += len(rows)

    def _read(self, tensor) -> np.ndarray:
        """A tensor of the adapter, float32."""
        entry, file = self._adapter.tensors[tensor], self._adapter.file
        fd = open_unchanged(file)
        try:
            raw = read_bytes(fd, entry.offset, entry.n_bytes, file.path)
        finally:
            close(fd)
        if count_nonfinite(raw, entry.dtype):
            raise CheckpointError(
                f"{file.path}: tensor {tensor}: NaN or infinite numbers, expected none; fetch it "
                "again"
            )
        return np.frombuffer(raw, NUMPY_DTYPE[entry.dtype]).reshape(entry.shape).astype(np.float32)


def with_added(
    rows: np.ndarray, a: np.ndarray, b: np.ndarray, lengths: np.ndarray | None
) -> np.ndarray:
    """Rows [n, in] + b [n, rank] a [rank, in], float32; with `lengths` [n] each row then has its
    own. See `checkpoint.adapter`."""
    # What is not finite is told by who writes it.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = rows.astype(np.float32) + b @ a
        if lengths is None:
            return found
        return found * (lengths / np.linalg.norm(found, axis=1))[:, None]
