"""The strict header: it reads what the library writes, and refuses all else in words."""

import json
import os
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jlayer.checkpoint.safetensors import MAX_DIMS, parse_header, read_header
from jlayer.errors import CheckpointError
from jlayer.spec import DTYPES
from jlayer.strict import MAX_DEPTH, parse_json_object

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_reads_what_the_library_writes(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = {
        "b": np.ones((2, 3), np.float32),
        "a": np.ones((5,), ml_dtypes.bfloat16),
        "empty": np.ones((0, 7), np.float16),
        "scalar": np.array(3, np.float32),
    }
    numpy_io.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert header.tensors.keys() == tensors.keys()
    assert header.file_bytes == len(raw)
    for name, array in tensors.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == (array.dtype.name, array.shape)
        assert raw[entry.offset : entry.offset + entry.n_bytes] == array.tobytes()
    offsets = [entry.offset for entry in header.tensors.values()]
    assert offsets == sorted(offsets)


def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_length_that_begins_as_a_pickle_does_is_a_length(tmp_path, length):
    text = json.dumps({"a": ENTRY}).encode().ljust(length)
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + text + bytes(24))
    assert read_header(tmp_path / "x").tensors["a"].offset == 8 + length


def test_trailing_padding_of_the_header_is_allowed_and_leading_is_not():
    text = json.dumps({"a": ENTRY}).encode()
    assert parse_header(text + b"   ", file_bytes=len(text) + 35, where="x").tensors
    with pytest.raises(CheckpointError, match="x: header starts with"):
        parse_header(b" " + text, file_bytes=len(text) + 33, where="x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "I64"}, "BF16, F16, F32"),
        ({"dtype": ["F32"]}, "dtype"),
        ({"shape": [1] * (MAX_DIMS + 1)}, "shape"),
        ({"shape": "23"}, "shape"),
        ({"shape": [1 << 40, 1 << 40]}, "overflow"),
        ({"shape": [10**4000] * 8}, "overflow"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [24, 0]}, "inverted"),
        ({"data_offsets": [0, 10**4000]}, "takes 24 bytes"),
        ({"more": 1}, "alone"),
    ],
)
def test_an_entry_is_refused_by_its_tensors_name(change, words):
    text = json.dumps({"odd tensor": ENTRY | change}).encode()
    with pytest.raises(CheckpointError) as caught:
        parse_header(text, file_bytes=8 + len(text) + 24, where="here")
    assert words in str(caught.value)
    assert str(caught.value).startswith("here: tensor 'odd tensor'")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ENTRY, "expected an object"),
        ({"__metadata__": ENTRY, "a": ENTRY}, "__metadata__"),
        ({"a": ENTRY | {"dtype": ENTRY}}, "tensor 'a': dtype"),
        ({"a": ENTRY | {"shape": ENTRY}}, "tensor 'a': shape"),
        ({"a": ENTRY | {"data_offsets": {"0": 0, "24": 24}}}, "tensor 'a': data_offsets"),
        ({"a": {"b": ENTRY}}, "tensor 'a': header entry"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "more": [0, 24]}}, "tensor 'a': header entry"),
    ],
)
def test_an_entry_in_the_place_of_something_else_is_refused(found, words):
    text = json.dumps(found).encode()
    with pytest.raises(CheckpointError, match=words):
        parse_header(text, file_bytes=8 + len(text) + 24, where="x")


def test_metadata_is_a_map_of_strings():
    text = json.dumps({"__metadata__": {"a": 1}, "a": ENTRY}).encode()
    with pytest.raises(CheckpointError, match="__metadata__"):
        parse_header(text, file_bytes=8 + len(text) + 24, where="x")


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "../d", "e\0", ""]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPES, "I8", None]),
                "shape": st.lists(st.integers(-1, 4) | st.none(), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 64), min_size=1, max_size=3),
            }
        ),
        max_size=4,
    ),
    st.integers(0, 400),
)
@example({"a": ENTRY}, 8 + len(json.dumps({"a": ENTRY})) + 24)
def test_any_header_is_either_sound_or_refused(found, file_bytes):
    text = json.dumps(found).encode()
    try:
        header = parse_header(text, file_bytes=file_bytes, where="x")
    except CheckpointError:
        return
    at = 8 + len(text)
    for entry in header.tensors.values():
        assert entry.offset == at
        at += entry.n_bytes
    assert at == file_bytes


@given(st.binary(max_size=100))
def test_any_bytes_are_either_json_or_refused(raw):
    try:
        found = parse_json_object(raw, what="x")
    except CheckpointError:
        return
    assert isinstance(found, dict)


@pytest.mark.parametrize(
    "text",
    [
        '"' + 'a\\"' * 20_000 + "[" * 100,
        '"' * 1_000_000 + "[]" * 100,
        "{}" * 500_000,
        '{"a":"' + "x" * 5_000_000 + '"}' + "[]" * 100,
    ],
)
def test_depth_is_counted_in_time_that_grows_with_the_text_alone(text):
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        parse_json_object(text.encode(), what="x")
    assert time.perf_counter() - started < 30  # hours, if it grew with the square


def test_brackets_inside_strings_are_not_depth():
    text = json.dumps({"a": "[{" * 1000, "b": '\\"[' * 100}).encode()
    assert parse_json_object(text, what="x")
    deep = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    assert parse_json_object(deep, what="x")
    with pytest.raises(CheckpointError, match="nested"):
        parse_json_object(b'{"a":' + deep + b"}", what="x")
