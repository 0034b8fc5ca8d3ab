"""Segments and tiles: which bytes are read for what, and what is refused at the door."""

import ctypes
import json
import os
import shutil

import numpy as np
import pytest

from jlayer.checkpoint.layout import SEAL, seal
from jlayer.checkpoint.store import Segment, Store
from jlayer.errors import CheckpointError
from jlayer.plan.cutting import cut
from jlayer.plan.tiles import Weights
from jlayer.spec import ALIGNMENT
from jlayer.streaming.direct import Reader, aligned_span, disk_speed
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.place import place
from jlayer.streaming.slots import HostMemory, slot_bytes_for, split_room, view


def weights_of(store):
    return Weights(store.cfg, store.form_of, store.float_dtype)


def tiles_of(store, tile_bytes):
    return cut(weights_of(store), tile_bytes, platform="cpu").tiles


def read_tile(store, tile):
    segments, places = place(store, tile)
    memory = HostMemory([slot_bytes_for(segments)], pin=False)
    reader = Reader({segment.file for segment in segments})
    pieces = split_room(memory.slot(0), segments)
    shifts = [reader.read(segment, piece) for segment, piece in zip(segments, pieces, strict=True)]
    reader.close()
    return {own.part.leaf: view(pieces[own.segment], shifts[own.segment], own) for own in places}


def published(folder):
    safetensors = pytest.importorskip("safetensors")
    found = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "np") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def test_a_whole_layer_is_one_aligned_segment_but_for_its_norms(tiny):
    store = Store(tiny)
    for tile in tiles_of(store, None)[:3]:
        segments, _ = place(store, tile)
        assert len(segments) == 1
        assert segments[0].offset % ALIGNMENT == 0


@pytest.mark.parametrize("tile_bytes", [None, 10**9, 4096, 1000, 1])
def test_all_tiles_together_are_the_published_matrices_once_each(tiny, tile_bytes):
    store, expected = Store(tiny), published(tiny)
    rows = {}
    for tile in tiles_of(store, tile_bytes):
        arrays = read_tile(store, tile)
        for part in tile.parts:
            found = arrays[part.leaf]
            assert found.shape == part.shape
            rows.setdefault(part.tensor, []).append((part.first_row, found))
    for tensor, pieces in rows.items():
        assert [first for first, _ in pieces] == sorted(first for first, _ in pieces)
        assert np.array_equal(np.concatenate([piece for _, piece in pieces]), expected[tensor])
    vectors = {name for name in expected if name.endswith("norm.weight")}
    assert set(rows) == set(expected) - vectors - {"model.embed_tokens.weight"}


def test_rows_are_gathered_one_by_one(tiny):
    store, expected = Store(tiny), published(tiny)["model.embed_tokens.weight"]
    rows = Embedding(store, weights_of(store))
    (found,) = rows.read(np.array([132, 0, 7])).values()
    rows.close()
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected[[132, 0, 7]])


@pytest.mark.parametrize(
    ("offset", "n_bytes"), [(0, 1), (4096, 4096), (5, 4096), (4095, 2), (9000, 20000)]
)
def test_unaligned_segments_are_read_with_their_surroundings(tmp_path, offset, n_bytes):
    data = np.random.default_rng(0).integers(0, 256, 40000, np.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    segment = Segment(str(path), offset, n_bytes)
    assert aligned_span(segment)[0] % ALIGNMENT == aligned_span(segment)[1] % ALIGNMENT == 0
    room = HostMemory([slot_bytes_for((segment,))], pin=False).slot(0)
    reader = Reader([str(path)])
    shift = reader.read(segment, room[: aligned_span(segment)[1]])
    reader.close()
    assert np.array_equal(room[shift : shift + n_bytes], data[offset : offset + n_bytes])


def test_a_file_that_ends_before_what_is_to_be_moved_moves_nothing(tmp_path, monkeypatch):
    """Cut off since it was opened; a length below zero would be written all over the memory."""
    path = tmp_path / "data"
    path.write_bytes(bytes(3 * ALIGNMENT))
    segment = Segment(str(path), ALIGNMENT + 3000, 2000)
    room = HostMemory([slot_bytes_for((segment,))], pin=False).slot(0)
    moves, real = [], ctypes.memmove

    def noting(to, source, n_bytes):
        moves.append(n_bytes)
        return real(to, source, max(0, n_bytes))

    monkeypatch.setattr(ctypes, "memmove", noting)
    reader = Reader([str(path)])
    os.truncate(path, ALIGNMENT + 512)
    with pytest.raises(CheckpointError, match="cut off"):
        reader.read(segment, room, ALIGNMENT)
    assert all(n_bytes > 0 for n_bytes in moves)
    moves.clear()
    whole = Segment(str(path), 100, 300)  # what is there is moved, and noted
    assert reader.read(whole, room, ALIGNMENT) == 0
    reader.close()
    assert moves


def spoil(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop(SEAL)
    change(folder, manifest)
    (folder / "manifest.json").write_bytes(seal(manifest))


def drop_layer(folder, manifest):
    (folder / "layer-00001.safetensors").unlink()


def unlist_layer(folder, manifest):
    del manifest["files"]["layer-00001.safetensors"]


def swap_layers(folder, manifest):
    a, b = folder / "layer-00000.safetensors", folder / "layer-00002.safetensors"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def cut_layer(folder, manifest):
    path = folder / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def newer_version(folder, manifest):
    manifest["format_version"] = 99


def other_config(folder, manifest):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 41}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_layer, "layer-00001.safetensors: missing"),
        (unlist_layer, "layer-00001.safetensors is not in the manifest"),
        (swap_layers, "layer-00000.safetensors holds other tensors"),
        (cut_layer, "cut off"),
        (newer_version, "format version is 99"),
        (other_config, r"shape \(40, 24\), config.json says \(41, 24\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused_before_the_first_token(tiny, tmp_path, change, words):
    folder = shutil.copytree(tiny, tmp_path / "model")
    Store(folder)
    spoil(folder, change)
    with pytest.raises(CheckpointError, match=words):
        Store(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "pytorch_model.bin"],
        ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ["params.json", "consolidated.00.pth"],
    ],
    ids=["bin", "bin-shards", "meta"],
)
def test_pickles_get_the_exact_command(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"jlayer convert {tmp_path} {tmp_path}-jlayer"):
        Store(tmp_path)


def test_layers_without_their_manifest_are_no_published_folder(tiny, tmp_path):
    """Index and files would do, but nothing says that the conversion came to its end."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="without their manifest"):
        Store(folder)


def test_the_disks_speed_is_measured_where_there_is_enough_to_read(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1 << 20))
    large.write_bytes(bytes(80 << 20))
    assert disk_speed([small]) is None
    found = disk_speed([str(small), str(large)])
    reader = Reader([str(large)])
    if reader.reads_directly:
        assert 1e6 < found < 1e12
    else:
        assert found is None
    reader.close()


def test_a_manifest_of_another_family_is_refused(tiny, tmp_path):
    """It was only looked at by verify; the same shapes may mean another arithmetic."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny, folder)
    body = json.loads((folder / "manifest.json").read_text())
    del body[SEAL]
    (folder / "manifest.json").write_bytes(seal({**body, "family": "mistral"}))
    with pytest.raises(CheckpointError, match=r"of a 'mistral' model, config\.json says 'llama'"):
        Store(folder)
