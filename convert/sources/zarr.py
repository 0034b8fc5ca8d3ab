"""The chunks of an array as Orbax packs them, each read as a stream, so that none is held whole.

A chunk may hold all layers of a model's matrices, packed at one go: a stream stops where a layer
ends, and goes on from there when the next one is asked for. The format itself (which arrays there
are, where a chunk lies) is tensorstore's; knows nothing of models.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# What is read of a packed chunk at a time: all of it stays until it is unpacked.
PACKED_BYTES = 256 << 10
UNPACKED_BYTES = 1 << 20
# So many streams of an array wait for its next layer, at 1 to 3 MB each; a chunk beyond these is
# unpacked from its start on for each of its layers.
MAX_WAITING = 32


@dataclass(frozen=True)
class Packing:
    """How an array is cut and packed. `value` says where a chunk's bytes lie."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    item_bytes: int
    is_zstd: bool
    value: Callable[[tuple[int, ...]], _Value]


def chunked_array(store, *, is_stacked: bool) -> ChunkedArray | None:
    """Tensorstore's array, chunk by chunk; None where it is packed in none of the ways of Orbax.

    These are zarr's, version 2 and 3: rows in order, little-endian, as they are or in one frame of
    zstd, in version 3 each chunk as the only one of a shard.
    """
    packing = _packing_of(store)
    if packing is None or len(packing.shape) - is_stacked not in (1, 2):
        return None
    return ChunkedArray(packing, is_stacked=is_stacked)


def _packing_of(store):
    metadata = store.spec().to_json()["metadata"]
    found = (_version_2 if metadata["zarr_format"] == 2 else _version_3)(store.kvstore, metadata)
    if found is None:
        return None
    chunk, is_zstd, value = found
    item_bytes = store.dtype.numpy_dtype.itemsize
    return Packing(tuple(store.shape), tuple(chunk), item_bytes, is_zstd, value)


def _version_2(kvstore, metadata):
    compressor = metadata["compressor"]
    dtype, separator = metadata["dtype"], metadata.get("dimension_separator", ".")
    plain = dtype == "bfloat16" or (isinstance(dtype, str) and dtype.startswith("<"))
    if not plain or metadata["order"] != "C" or metadata["filters"] is not None:
        return None
    if compressor is not None and compressor["id"] != "zstd":
        return None

    def value(index):
        return _Value(kvstore, separator.join(map(str, index)).encode())

    return metadata["chunks"], compressor is not None, value


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

    def value(index):
        name = separator.join(["c", *map(str, index)])
        if shard is None:
            return _Value(kvstore, name.encode())
        return _only_one(kvstore, name, shard, rank=len(index))

    return chunk, len(codecs) > 1, value


def _only_one(kvstore, name, shard, *, rank):
    """The only chunk of a shard, which tensorstore knows by its place among the shard's."""
    import tensorstore as ts

    spec = {
        "driver": "zarr3_sharding_indexed",
        "base": (kvstore + name).spec().to_json(),
        "grid_shape": [1] * rank,
        "index_codecs": shard["index_codecs"],
        "index_location": shard["index_location"],
    }
    return _Value(ts.KvStore.open(spec).result(), struct.pack(f">{rank}I", *[0] * rank))


@dataclass(frozen=True)
class _Value:
    """A chunk's bytes as they are stored."""

    kvstore: object
    key: bytes

    def read(self, at: int, n_bytes: int) -> bytes:
        """At most so many bytes, fewer only at the end."""
        try:
            found = self.kvstore.read(self.key, byte_range=slice(at, at + n_bytes)).result()
        except ValueError as error:  # the end is known only by what is refused beyond it
            if "OUT_OF_RANGE" not in str(error):
                raise
            found = self.kvstore.read(self.key, byte_range=slice(at, None)).result()
        if found.state != "value":
            raise ValueError("a chunk of it is missing")
        return found.value


class _Plain:
    """A chunk that is stored as it is."""

    def __init__(self, value: _Value, n_bytes: int):
        self._value, self._n_bytes = value, n_bytes

    def read_into(self, view: memoryview, at: int) -> None:
        for done in range(0, len(view), UNPACKED_BYTES):
            part = view[done : done + UNPACKED_BYTES]
            found = self._value.read(at + done, len(part))
            if len(found) < len(part):
                raise ValueError(f"a chunk of it is cut off at byte {at + done}")
            part[:] = found

    def finish(self) -> None:
        """Raises where more bytes follow."""
        if self._value.read(self._n_bytes, 1):
            raise ValueError(f"a chunk of it is longer than {self._n_bytes} bytes")


class _Zstd:
    """A chunk in one frame of zstd: cheap to go on with, and what lies behind is far away."""

    def __init__(self, value: _Value, n_bytes: int):
        self._value, self._n_bytes = value, n_bytes
        self._begin()

    def _begin(self):
        from backports import zstd

        self._frame, self._error = zstd.ZstdDecompressor(), zstd.ZstdError
        self._taken = self._at = 0  # bytes read of what is stored, and bytes unpacked

    def read_into(self, view: memoryview, at: int) -> None:
        if at < self._at:
            self._begin()
        self._skip_to(at)
        done = 0
        while done < len(view):
            found = self._unpack(len(view) - done)
            view[done : done + len(found)] = found
            done += len(found)

    def finish(self) -> None:
        """Raises where the frame does not end with the chunk, or anything follows it."""
        self._skip_to(self._n_bytes)
        if self._unpack(1, at_end=True) or self._frame.unused_data or self._stored():
            raise ValueError(f"a chunk of it is longer than {self._n_bytes} bytes")

    def _skip_to(self, at):
        while self._at < at:
            self._unpack(at - self._at)

    def _stored(self):
        found = self._value.read(self._taken, PACKED_BYTES)
        self._taken += len(found)
        return found

    def _unpack(self, most, *, at_end=False):
        """The next bytes, at least one; none where the frame ends, if that may be."""
        most = min(most, UNPACKED_BYTES)
        while not self._frame.eof:
            stored = self._stored() if self._frame.needs_input else b""
            if self._frame.needs_input and not stored:
                raise ValueError(f"a chunk of it is cut off at byte {self._taken}")
            try:
                found = self._frame.decompress(stored, most)
            except self._error as error:
                raise ValueError(f"a chunk of it cannot be unpacked: {error}") from None
            if found:
                self._at += len(found)
                return found
        if not at_end:
            raise ValueError(f"a chunk of it has {self._at} bytes, expected {self._n_bytes}")
        return b""


class ChunkedArray:
    """An array whose tensors, of one or two axes, are read in order: itself, or its layers.

    `in_order` is False where rows are cut, too: then only whole ones are read.
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
        self._streams: dict[tuple[int, ...], _Plain | _Zstd] = {}
        self.in_order = self._row_bytes == self._cut_bytes

    def read_into(self, view: memoryview, at: int, layer: int) -> None:
        """Fills `view` with a layer's bytes from `at` on. Of an array that is no stack, layer 0.

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
        """Fills whole rows from chunks side by side; the last one may reach beyond them."""
        for column in range(self._n_columns):
            found = bytearray(len(rows) * self._cut_bytes)
            self._stream(layer, band, column).read_into(memoryview(found), first * self._cut_bytes)
            place = rows[:, column * self._cut_bytes :][:, : self._cut_bytes]
            place[:] = np.frombuffer(found, np.uint8).reshape(len(rows), -1)[:, : place.shape[1]]

    @property
    def _n_columns(self):
        return -(-self._row_bytes // self._cut_bytes)

    def _stream(self, layer, band, column):
        index = (layer // self._depth, band, column)
        if index not in self._streams:
            kind = _Zstd if self._packing.is_zstd else _Plain
            self._streams[index] = kind(self._packing.value(index[self._axes]), self._chunk_bytes)
        return self._streams[index]

    def _leave(self, layer, band):
        """Has a band's streams wait for the next layer; those that have seen their last one end."""
        is_last = layer + 1 == self._n_layers or (layer + 1) % self._depth == 0
        for column in range(self._n_columns):
            index = (layer // self._depth, band, column)
            if is_last:
                self._streams.pop(index).finish()
            elif len(self._streams) > MAX_WAITING:
                del self._streams[index]
