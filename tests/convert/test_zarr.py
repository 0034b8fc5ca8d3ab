"""Chunks read as streams: tensorstore's bytes and refusals, each stored byte read once, and a few
pieces in memory whatever a chunk holds."""

import gc
import math
import random

import numpy as np
import pytest
import tensorstore as ts
from backports import zstd

from jlayer.convert.sources import zarr

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
ZSTD = {"name": "zstd", "configuration": {"level": 3}}


def version_2(compressor, **more):
    def metadata(shape, chunk):
        return {"shape": shape, "chunks": chunk, "compressor": compressor, **more}

    return "zarr", metadata


def version_3(*codecs, shard=False, inner=None):
    def metadata(shape, chunk):
        used = list(codecs)
        if shard:
            index = [LITTLE, {"name": "crc32c"}]
            held = {"chunk_shape": inner or chunk, "codecs": used, "index_codecs": index}
            used = [{"name": "sharding_indexed", "configuration": held}]
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        return {"shape": shape, "chunk_grid": grid, "codecs": used}

    return "zarr3", metadata


PACKINGS = {
    "2-plain": version_2(None),
    "2-zstd": version_2({"id": "zstd", "level": 1}),
    "3-plain": version_3(LITTLE),
    "3-zstd": version_3(LITTLE, ZSTD),
    "3-shard-plain": version_3(LITTLE, shard=True),
    "3-shard-zstd": version_3(LITTLE, ZSTD, shard=True),
}
# Shape and chunk; a stack has three axes, or two where its layers are vectors.
CUTS = {
    "whole": ((5, 7, 6), (5, 7, 6)),
    "rows": ((5, 7, 6), (5, 3, 6)),
    "columns": ((5, 7, 6), (5, 7, 4)),
    "both, some layers": ((5, 7, 6), (2, 3, 4)),
    "each layer": ((5, 7, 6), (1, 7, 6)),
    "wider than the array": ((5, 7, 6), (8, 9, 11)),
    "vectors": ((5, 30), (3, 7)),
}


def write(folder, packing, shape, chunk, *, dtype="bfloat16", values=None):
    """An array of random numbers, and what tensorstore says of it."""
    driver, metadata = packing
    spec = {
        "driver": driver,
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata(list(shape), list(chunk)),
        "dtype": dtype,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    store = ts.open(spec, create=True, delete_existing=True).result()
    if values is None:
        values = np.random.default_rng(0).integers(-99, 99, shape)
    values = values.astype(store.dtype.numpy_dtype)
    store.write(values).result()
    return store, values


def read(array, layer, like, *, pieces=None):
    """A layer's bytes, in pieces that are drawn; `like` is an array of the same shape."""
    row = like[:1].nbytes
    found, at = memoryview(bytearray(like.nbytes)), 0
    while at < len(found):
        step = pieces.choice([2, 6, 10, 1000]) if pieces else len(found)
        step = step if array.in_order else -(-step // row) * row
        array.read_into(found[at : at + step], at, layer)
        at += step
    return bytes(found)


@pytest.fixture
def stored(monkeypatch):
    """(Size, bytes read) of each chunk that is; packed ones are asked for in pieces of 16 bytes."""
    counts, real = {}, zarr.StoredChunk.read
    monkeypatch.setattr(zarr, "PACKED_BYTES", 16)

    def reading(self, at, n_bytes):
        found = real(self, at, n_bytes)
        key = str(self.kvstore), self.key
        size, before = counts.get(key) or (len(self.kvstore[self.key]), 0)
        counts[key] = size, before + len(found)
        return found

    monkeypatch.setattr(zarr.StoredChunk, "read", reading)
    return counts


def counted_frames(monkeypatch):
    """The frames of zstd that are begun from now on, each with the largest piece it gave."""
    frames, real = [], zstd.ZstdDecompressor

    class Frame:
        def __init__(self):
            self.inner, self.largest = real(), 0
            frames.append(self)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def decompress(self, *arguments):
            found = self.inner.decompress(*arguments)
            self.largest = max(self.largest, len(found))
            return found

    monkeypatch.setattr(zstd, "ZstdDecompressor", Frame)
    return frames


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_made_here_is_looked_at():
    """To look for streams among all that the process has imported takes a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def n_streams():
    """How many chunks are being read, by all arrays that are made here."""
    gc.collect()
    kinds = (zarr.PlainStream, zarr.ZstdStream)
    return sum(type(found) in kinds for found in gc.get_objects())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_in_any_order_and_in_any_pieces_the_bytes_are_equal(tmp_path, packing, cut):
    store, values = write(tmp_path, PACKINGS[packing], *CUTS[cut])
    array, pieces = zarr.chunked_array(store, is_stacked=True), random.Random(0)
    for layer in [*range(5), 3, 3, 0, 4, 1, 2]:
        assert read(array, layer, values[layer], pieces=pieces) == values[layer].tobytes()
    store, values = write(tmp_path, PACKINGS[packing], *(sizes[1:] for sizes in CUTS[cut]))
    array = zarr.chunked_array(store, is_stacked=False)
    assert read(array, 0, values, pieces=pieces) == values.tobytes()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_layer_by_layer_every_stored_byte_is_read_once(tmp_path, stored, packing, cut):
    shape, chunk = CUTS[cut]
    store, values = write(tmp_path, PACKINGS[packing], shape, chunk)
    array, rows = zarr.chunked_array(store, is_stacked=True), random.Random(0)
    for layer in range(5):
        read(array, layer, values[layer], pieces=rows)
    n_chunks = math.prod(-(-n // own) for n, own in zip(shape, chunk, strict=True))
    assert len(stored) == n_chunks
    for size, n_read in stored.values():
        assert n_read == size or ("plain" in packing and n_read < size)
    if "plain" in packing and chunk[2:] in ((), shape[2:]):  # else with what fills rows up
        assert sum(n_read for _, n_read in stored.values()) == values.nbytes
    assert n_streams() == 0, "a stream of an array that was read to its end is kept"


def test_streams_beyond_the_limit_begin_again(tmp_path, stored, monkeypatch):
    store, values = write(tmp_path, PACKINGS["2-zstd"], (5, 8, 6), (5, 2, 3))
    read_bytes = []
    for limit in (8, 3, 0):
        monkeypatch.setattr(zarr, "MAX_WAITING", limit)
        array = None  # and with it the streams of the array before
        array = zarr.chunked_array(store, is_stacked=True)
        stored.clear()
        for layer in range(5):
            assert read(array, layer, values[layer]) == values[layer].tobytes()
            assert n_streams() <= limit
        read_bytes.append(sum(n_read for _, n_read in stored.values()))
    assert read_bytes[0] < read_bytes[1] < read_bytes[2]


def test_what_a_chunk_unpacks_to_does_not_matter_to_memory(tmp_path, monkeypatch):
    """Zeros, a thousand times smaller packed than not: what one piece of it would unpack to."""
    shape = (4, 4096, 1024)
    zeros = np.zeros(shape)
    store, _ = write(tmp_path, PACKINGS["2-zstd"], shape, shape, values=zeros)
    array = zarr.chunked_array(store, is_stacked=True)
    frames = counted_frames(monkeypatch)
    piece = memoryview(bytearray(1 << 20))
    for layer in (0, 2, 3):
        array.read_into(piece, 7 << 20, layer)
    assert 0 < max(frame.largest for frame in frames) <= zarr.UNPACKED_BYTES


def outcome(work):
    """What it returns; None where it refuses."""
    try:
        return work()
    except ValueError:
        return None


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_tensorstore_refuses_is_refused_and_all_else_reads_alike(tmp_path, packing):
    """But that tensorstore passes over what follows the frame, where no shard says its length."""
    shape = (3, 40, 6)
    store, values = write(tmp_path, PACKINGS[packing], shape, shape)
    (path,) = (path for path in tmp_path.rglob("*0") if path.is_file())
    whole, draw = path.read_bytes(), random.Random(0)
    damages = [whole[:-n] for n in (1, 2, 3, 4, 20, len(whole) // 2, len(whole))]
    damages += [b"\0" + whole, whole + b"\0", whole + whole]
    for _ in range(100):
        damages.append(bytearray(whole))
        damages[-1][draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    n_refused = 0
    for damage in damages:
        path.write_bytes(damage)
        expected = outcome(lambda: store.read().result().tobytes())
        if packing == "3-zstd" and damage[: len(whole) + 1] in (whole + b"\0", whole + whole[:1]):
            expected = None
        array = zarr.chunked_array(store, is_stacked=True)
        layers = ((array, n, values[n]) for n in range(3))
        assert outcome(lambda own=layers: b"".join(read(*layer) for layer in own)) == expected
        n_refused += expected is None
    assert n_refused >= (10 if "shard" not in packing else 8)
    path.unlink()
    with pytest.raises(ValueError, match="a chunk of it is missing"):
        read(zarr.chunked_array(store, is_stacked=True), 0, values[0])


@pytest.mark.parametrize(
    ("packing", "dtype"),
    [
        (version_2({"id": "gzip", "level": 1}), "bfloat16"),
        (version_2({"id": "blosc", "cname": "lz4"}), "bfloat16"),
        (version_2(None, order="F"), "bfloat16"),
        (version_2(None, dtype=">f4"), "float32"),
        (version_3({"name": "bytes", "configuration": {"endian": "big"}}), "float32"),
        (version_3(LITTLE, {"name": "gzip", "configuration": {"level": 1}}), "float32"),
        (version_3(LITTLE, shard=True, inner=[1, 4, 6]), "float32"),
        (
            version_3({"name": "transpose", "configuration": {"order": [2, 1, 0]}}, LITTLE),
            "float32",
        ),
    ],
)
def test_other_ways_of_packing_are_left_to_tensorstore(tmp_path, packing, dtype):
    store, _ = write(tmp_path, packing, (5, 8, 6), (5, 4, 6), dtype=dtype)
    assert zarr.chunked_array(store, is_stacked=True) is None
    assert zarr.chunked_array(store, is_stacked=False) is None
