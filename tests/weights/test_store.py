"""Segments and tiles: which bytes are read for what, and what is refused at the door."""

import json
import shutil

import numpy as np
import pytest

from jlayer.errors import CheckpointError
from jlayer.weights.direct import Reader, RowReader, aligned_span
from jlayer.weights.layout import ALIGNMENT
from jlayer.weights.slots import HostSlots, slot_bytes_for
from jlayer.weights.store import Segment, Store, head_tile_height


def read_tile(store, tile):
    segments, places = store.place(tile)
    slots = HostSlots(1, slot_bytes_for(segments))
    reader = Reader({segment.file for segment in segments})
    rooms = slots.room(0, segments)
    shifts = [reader.read(segment, room) for segment, room in zip(segments, rooms, strict=True)]
    reader.close()
    return {
        place.part.leaf: slots.view(rooms[place.segment], shifts[place.segment], place)
        for place in places
    }


def published(folder):
    safetensors = pytest.importorskip("safetensors")
    found = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "np") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def test_a_layer_is_one_segment_and_its_parts_are_the_published_tensors(tiny):
    store, expected = Store(tiny), published(tiny)
    for layer in range(3):
        tile = store.layer_tile(layer)
        segments, _ = store.place(tile)
        assert len(segments) == 1
        assert segments[0].offset % ALIGNMENT == 0
        found = read_tile(store, tile)
        for part in tile.parts:
            assert np.array_equal(found[part.leaf], expected[part.tensor])


@pytest.mark.parametrize("tile_bytes", [1, 500, 96 * 40, 10**9])
def test_head_tiles_together_are_the_head(tiny, tile_bytes):
    store, expected = Store(tiny), published(tiny)["lm_head.weight"]
    tiles = store.head_tiles(tile_bytes)
    rows = [read_tile(store, tile)["lm_head"] for tile in tiles]
    assert np.array_equal(np.concatenate(rows), expected)
    assert len({len(row) for row in rows}) <= 2
    assert all(tile.n_bytes <= max(tile_bytes, 24 * 4) for tile in tiles)


def test_head_tiles_of_llama_3_are_all_of_one_height():
    assert 128256 % head_tile_height(128256, 8192 * 2, 1_711_308_800) == 0


def test_rows_are_gathered_one_by_one(tiny):
    store, expected = Store(tiny), published(tiny)["model.embed_tokens.weight"]
    segment, dtype = store.embedding()
    rows = RowReader(segment, n_rows=133)
    found = rows.read([132, 0, 7]).view(dtype)
    rows.close()
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
    room = HostSlots(1, slot_bytes_for((segment,))).room(0, (segment,))[0]
    reader = Reader([str(path)])
    shift = reader.read(segment, room)
    reader.close()
    assert np.array_equal(room[shift : shift + n_bytes], data[offset : offset + n_bytes])


def spoil(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(folder, manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


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


def test_an_unconverted_folder_gets_the_exact_command(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"jlayer convert {tmp_path} {tmp_path}-jlayer"):
        Store(tmp_path)
