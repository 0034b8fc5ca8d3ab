"""Zarr arrays as Orbax writes them, decompressed as streams, so that no chunk is held whole.

A chunk may hold a matrix of every layer, compressed in one frame. Its stream pauses where a layer
ends and continues when the next layer is read. Tensorstore knows the format itself: which arrays
there are, and where a chunk lies. Nothing here knows about models.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jlayer.interrupts import imported

# Compressed bytes that are read at a time; they stay in memory until they are decompressed.
PACKED_BYTES = 256 << 10
UNPACKED_BYTES = 1 << 20
# Streams of an array that wait for its next layer, at 1 to 3 MB each. A chunk beyond these is
# decompressed from its start again for each of its layers.
MAX_WAITING = 32


@dataclass(frozen=True)
class Packing:
    """How an array is chunked and compressed; `stored` gives the stored chunk at an index."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    item_bytes: int
    is_zstd: bool
    stored: Callable[[tuple[int, ...]], StoredChunk]


def chunked_array(store, *, is_stacked: bool) -> ChunkedArray | None:
    """A tensorstore array, to be read chunk by chunk; None where it is encoded as Orbax does not.

    Orbax writes zarr version 2 or 3: rows in order, little-endian, uncompressed or in one zstd
    frame, in version 3 also with each chunk as the only one of a shard.
    """
    packing = _packing_of(store)
    if packing is None or len(packing.shape) - is_stacked not in (1, 2):
        return None
    return ChunkedArray(packing, is_stacked=is_stacked)


def _packing_of(store):
    metadata = store.spec().to_json()["metadata"]
    read_metadata = _version_2 if metadata["zarr_format"] == 2 else _version_3
    encoding = read_metadata(store.kvstore, metadata)
    if encoding is None:
        return None
    chunk, is_zstd, stored = encoding
    item_bytes = store.dtype.numpy_dtype.itemsize
    return Packing(tuple(store.shape), tuple(chunk), item_bytes, is_zstd, stored)


def _version_2(kvstore, metadata):
    compressor = metadata["compressor"]
    dtype, separator = metadata["dtype"], metadata.get("dimension_separator", ".")
    plain = dtype == "bfloat16" or (isinstance(dtype, str) and dtype.startswith("<"))
    if not plain or metadata["order"] != "C" or metadata["filters"] is not None:
        return None
    if compressor is not None and compressor["id"] != "zstd":
        return None

    def stored(index):
        return StoredChunk(kvstore, separator.join(map(str, index)).encode())

    return metadata["chunks"], compressor is not None, stored


def _version_3(kvstore, metadata):
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codecs, shard, naming = metadata["codecs"], None, metadata["chunk_key_encoding"]
    separator = naming.get("configuration", {}).get("separator", "/")
    if naming["name"] != "default":
        return None
    if codecs[0]["name"] == "sharding_indexed":
        shard = codecs[0]["configuration"]
        if len(codecs) > 1 or shard["chunk_shape"] != chunk:
            return None
        codecs = shard["codecs"]
    if codecs[0] != {"name": "bytes", "configuration": {"endian": "little"}}:
        return None
    if [codec["name"] for codec in codecs[1:]] not in ([], ["zstd"]):
        return None

    def stored(index):
        name = separator.join(["c", *map(str, index)])
        if shard is None:
            return StoredChunk(kvstore, name.encode())
        return _only_one(kvstore, name, shard, rank=len(index))

    return chunk, len(codecs) > 1, stored


def _only_one(kvstore, name, shard, *, rank):
    """The only chunk of a shard; its key is its index in the shard."""
    ts = imported("tensorstore")

    spec = {
        "driver": "zarr3_sharding_indexed",
        "base": (kvstore + name).spec().to_json(),
        "grid_shape": [1] * rank,
        "index_codecs": shard["index_codecs"],
        "index_location": shard["index_location"],
    }
    return StoredChunk(ts.KvStore.open(spec).result(), struct.pack(f">{rank}I", *[0] * rank))


@dataclass(frozen=True)
class StoredChunk:
    """The bytes of a chunk as they are stored."""

    kvstore: object
    key: bytes

    def read(self, at: int, n_bytes: int) -> bytes:
        """At most `n_bytes` bytes from `at` on; fewer only at the end."""
        try:
            answer = self.kvstore.read(self.key, byte_range=slice(at, at + n_bytes)).result()
        except ValueError as error:  # a range beyond the end is refused, and the size is not known
            if "OUT_OF_RANGE" not in str(error):
                raise
            answer = self.kvstore.read(self.key, byte_range=slice(at, None)).result()
        if answer.state != "value":
            raise ValueError("a chunk of it is missing")
        return answer.value


class PlainStream:
    """An uncompressed chunk of `n_bytes` bytes."""

    def __init__(self, stored: StoredChunk, n_bytes: int):
        self._stored, self._n_bytes = stored, n_bytes

    def read_into(self, view: memoryview, at: int) -> None:
        for done in range(0, len(view), UNPACKED_BYTES):
            part = view[done : done + UNPACKED_BYTES]
            data = self._stored.read(at + done, len(part))
            if len(data) < len(part):
                raise ValueError(f"a chunk of it is cut off at byte {at + done}")
            part[:] = data

    def finish(self) -> None:
        """Raises ValueError where more bytes follow."""
        if self._stored.read(self._n_bytes, 1):
            raise ValueError(f"a chunk of it is longer than {self._n_bytes} bytes")


class ZstdStream:
    """A chunk of `n_bytes` bytes in one zstd frame: read onwards it is decompressed once; each step
    back starts again."""

    def __init__(self, stored: StoredChunk, n_bytes: int):
        self._stored, self._n_bytes = stored, n_bytes
        self._begin()

    def _begin(self):
        from backports import zstd

        self._frame, self._error = zstd.ZstdDecompressor(), zstd.ZstdError
        self._n_read = self._at = 0  # bytes read of the frame, and bytes decompressed

    def read_into(self, view: memoryview, at: int) -> None:
        if at < self._at:
            self._begin()
        self._skip_to(at)
        done = 0
        while done < len(view):
            data = self._decompress(len(view) - done)
            view[done : done + len(data)] = data
            done += len(data)

    def finish(self) -> None:
        """Raises ValueError where the frame does not end with the chunk, or bytes follow it."""
        self._skip_to(self._n_bytes)
        if self._decompress(1, at_end=True) or self._frame.unused_data or self._read():
            raise ValueError(f"a chunk of it is longer than {self._n_bytes} bytes")

    def _skip_to(self, at):
        while self._at < at:
            self._decompress(at - self._at)

    def _read(self):
        packed = self._stored.read(self._n_read, PACKED_BYTES)
        self._n_read += len(packed)
        return packed

    def _decompress(self, most, *, at_end=False):
        """The next bytes, at least one and at most `most`; none at the end of the frame, where
        `at_end` allows it."""
        most = min(most, UNPACKED_BYTES)
        while not self._frame.eof:
            packed = self._read() if self._frame.needs_input else b""
            if self._frame.needs_input and not packed:
                raise ValueError(f"a chunk of it is cut off at byte {self._n_read}")
            try:
                data = self._frame.decompress(packed, most)
            except self._error as error:
                raise ValueError(f"a chunk of it cannot be unpacked: {error}") from None
            if data:
                self._at += len(data)
                return data
        if not at_end:
            raise ValueError(f"a chunk of it has {self._at} bytes, expected {self._n_bytes}")
        return b""


class ChunkedArray:
    """An array read in order: one tensor of one or two axes, or a stack of a tensor a layer.

    `in_order` is False where chunks cut the rows: then only whole rows can be read.
    """

    def __init__(self, packing: Packing, *, is_stacked: bool):
        shape, chunk = packing.shape, packing.chunk
        lead = 0 if is_stacked else 1
        self._axes = slice(lead, lead + len(shape))  # of layer, band and column
        if not is_stacked:
            shape, chunk = (1, *shape), (1, *chunk)
        (self._n_layers, self._rows, *width), (self._depth, self._height, *cut) = shape, chunk
        self._row_bytes = math.prod(width) * packing.item_bytes
        self._cut_bytes = math.prod(cut) * packing.item_bytes
        self._chunk_bytes = math.prod(chunk) * packing.item_bytes
        self._packing = packing
        self._streams: dict[tuple[int, ...], PlainStream | ZstdStream] = {}
        self.in_order = self._row_bytes == self._cut_bytes

    def read_into(self, view: memoryview, at: int, layer: int) -> None:
        """Fills `view` with the bytes of a layer from `at` on; of an array without layers, layer 0.

        Raises ValueError or OSError.
        """
        in_chunk = layer % self._depth * self._height
        while view:
            row, band = at // self._row_bytes, at // self._row_bytes // self._height
            end = min(self._rows, (band + 1) * self._height) * self._row_bytes
            part = view[: end - at]
            if self.in_order:
                before = (in_chunk - band * self._height) * self._row_bytes
                self._stream(layer, band, 0).read_into(part, before + at)
            else:
                rows = np.frombuffer(part, np.uint8).reshape(-1, self._row_bytes)
                self._read_cut(rows, layer, band, in_chunk + row - band * self._height)
            at, view = at + len(part), view[len(part) :]
            if at == end:
                self._leave(layer, band)

    def close(self) -> None:
        self._streams.clear()

    def _read_cut(self, rows, layer, band, first):
        """Fills whole rows from the chunks side by side; the last chunk may be padded."""
        for column in range(self._n_columns):
            cut = bytearray(len(rows) * self._cut_bytes)
            self._stream(layer, band, column).read_into(memoryview(cut), first * self._cut_bytes)
            place = rows[:, column * self._cut_bytes :][:, : self._cut_bytes]
            place[:] = np.frombuffer(cut, np.uint8).reshape(len(rows), -1)[:, : place.shape[1]]

    @property
    def _n_columns(self):
        return -(-self._row_bytes // self._cut_bytes)

    def _stream(self, layer, band, column):
        index = (layer // self._depth, band, column)
        if index not in self._streams:
            kind = ZstdStream if self._packing.is_zstd else PlainStream
            self._streams[index] = kind(self._packing.stored(index[self._axes]), self._chunk_bytes)
        return self._streams[index]

    def _leave(self, layer, band):
        """Keeps a band's streams for the next layer; ends those that have no further layer."""
        is_last = layer + 1 == self._n_layers or (layer + 1) % self._depth == 0
        for column in range(self._n_columns):
            index = (layer // self._depth, band, column)
            if is_last:
                self._streams.pop(index).finish()
            elif len(self._streams) > MAX_WAITING:
                del self._streams[index]
