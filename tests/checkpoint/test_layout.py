"""The format: what is written reads back the same, aligned, in order, and by others too."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.checkpoint.layout import (
    FileEntry,
    Manifest,
    encode_header,
    encode_index,
    encode_manifest,
    file_of,
    is_weight_file,
    layer_file,
    order_of_tensors,
    read_manifest,
    weight_files,
)
from jlayer.checkpoint.safetensors import LENGTH_BYTES, parse_header
from jlayer.config import model_config
from jlayer.families.registry import published_tensors
from jlayer.spec import ALIGNMENT, ITEM_BYTES
from tests.tiny import TINY

CONFIG = model_config({"model_type": "llama", **TINY}, where="here")
FILES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6).filter(lambda name: ".." not in name),
    st.tuples(
        st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
        st.sampled_from(list(ITEM_BYTES)),
    ),
    min_size=1,
    max_size=6,
)


@given(FILES)
def test_a_header_reads_back_as_it_was_meant(tensors):
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
    raw, entries = encode_header(shapes, dtypes)
    n_bytes = len(raw) + sum(entry.n_bytes for entry in entries.values())
    assert len(raw) % ALIGNMENT == 0
    header = parse_header(raw[LENGTH_BYTES:], file_bytes=n_bytes, where="x")
    assert header.tensors == entries
    assert list(header.tensors) == list(entries) == order_of_tensors(shapes, dtypes)
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (shapes[name], dtypes[name])
        assert entry.offset % ITEM_BYTES[entry.dtype] == 0


def test_matrices_first_and_largest_first_and_equals_by_name():
    shapes = {"norm": (99,), "b": (3, 2), "a": (2, 3), "large": (4, 4), "bias": (2,)}
    order = order_of_tensors(shapes, dict.fromkeys(shapes, "float16"))
    assert order == ["large", "a", "b", "norm", "bias"]


def test_wider_dtypes_come_first_where_they_would_begin_inside_an_element():
    shapes = {"odd": (3, 5), "norm": (7,)}
    assert order_of_tensors(shapes, {"odd": "bfloat16", "norm": "float32"}) == ["norm", "odd"]
    assert order_of_tensors(shapes, {"odd": "float32", "norm": "bfloat16"}) == ["odd", "norm"]


def test_the_library_reads_the_file(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.ones(5, np.float16)}
    shapes = {name: array.shape for name, array in tensors.items()}
    raw, entries = encode_header(shapes, {name: a.dtype.name for name, a in tensors.items()})
    data = b"".join(tensors[name].tobytes() for name in entries)
    (tmp_path / "x.safetensors").write_bytes(raw + data)
    found = numpy_io.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_every_tensor_has_one_file_in_sweep_order():
    files = weight_files(CONFIG)
    assert list(files) == [
        "embed.safetensors",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "layer-00002.safetensors",
        "final.safetensors",
    ]
    assert {name: shape for held in files.values() for name, shape in held.items()} == (
        published_tensors(CONFIG)
    )
    assert files["final.safetensors"].keys() == {"model.norm.weight", "lm_head.weight"}
    assert files[layer_file(2)]["model.layers.2.mlp.up_proj.weight"] == (40, 24)


def test_names_of_weight_files():
    assert file_of("model.layers.12.mlp.up_proj.weight") == layer_file(12)
    assert all(is_weight_file(name) for name in weight_files(CONFIG))
    assert not any(map(is_weight_file, ["layer-1.safetensors", "model.safetensors", "manifest"]))


def manifest_of(files):
    entries = {}
    for name, shapes in files.items():
        raw, tensors = encode_header(shapes, dict.fromkeys(shapes, "bfloat16"))
        entries[name] = FileEntry(len(raw), "ab" * 32, tensors, dict.fromkeys(tensors, "12" * 16))
    entries["config.json"] = FileEntry(7, "cd" * 32, {}, {})
    return Manifest("llama", "ef" * 32, entries)


def test_a_manifest_reads_back_and_its_bytes_do_not_depend_on_order(tmp_path):
    manifest = manifest_of(weight_files(CONFIG))
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    assert read_manifest(tmp_path) == manifest
    backwards = Manifest("llama", "ef" * 32, dict(reversed(manifest.files.items())))
    assert encode_manifest(backwards) == encode_manifest(manifest)


def test_the_index_names_every_tensor_and_the_bytes_of_all():
    files = {name: entry.tensors for name, entry in manifest_of(weight_files(CONFIG)).files.items()}
    index = json.loads(encode_index(files))
    assert index["weight_map"] == {name: file_of(name) for name in published_tensors(CONFIG)}
    n_elements = sum(int(np.prod(shape)) for shape in published_tensors(CONFIG).values())
    assert index["metadata"] == {"total_size": 2 * n_elements}


def test_pieces_of_a_matrix_are_neighbours_and_the_main_one_is_first():
    """Whatever their encodings: a byte of "half" is two weights, one of "whole" is one."""
    shapes = {
        "half.weight.q": (8, 16),
        "half.weight.scale": (8, 1),
        "whole.weight.q": (8, 12),
        "whole.weight.scale": (8, 1),
        "gate.scale": (4,),
        "norm": (8,),
    }
    dtypes = dict.fromkeys(shapes, "uint8")
    assert order_of_tensors(shapes, dtypes) == [
        *("half.weight.q", "half.weight.scale", "whole.weight.q", "whole.weight.scale"),
        *("norm", "gate.scale"),
    ]
