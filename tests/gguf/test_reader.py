"""The strict reader of GGUF heads: held against the package `gguf`, and what it refuses."""

import os
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from benchmarks.fuzz_gguf import damaged, head_of, judge
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf import parts, reader
from jlayer.gguf.parts import model_at, models_in, open_head
from jlayer.gguf.reader import TYPES, read_head

STRING, ARRAY = 8, 9


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, raw):
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name, dims=(32, 2), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(path, keys=(), tensors=(), *, data=b"", version=3, n_keys=None, n_tensors=None):
    counts = (len(tensors) if n_tensors is None else n_tensors, n_keys or len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*keys, *tensors))
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + data)
    return path


def refusal(path, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        read_head(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_the_types_have_the_sizes_of_ggml():
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    known = {number: (row.weights, row.n_bytes) for number, row in TYPES.items()}
    assert known.items() <= sizes.items()
    names = {gguf.GGMLQuantizationType(number).name for number in sizes.keys() - known.keys()}
    assert names == {"Q8_1", "Q8_K"}  # of activations; no file has them


def test_a_file_is_read_as_its_own_package_reads_it(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list([f"token {n} é" for n in range(3000)])
    writer.add_token_scores([n / 7 for n in range(3000)])
    for name, value in {"uint8": 7, "int8": -7, "uint16": 300, "int16": -300}.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    for name, value in {"uint32": 1 << 31, "int32": -5, "uint64": 1 << 63, "int64": -9}.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_float32("x.float32", 1e-5)
    writer.add_float64("x.float64", 1e-300)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "sch\u00f6n\n" * 99)
    writer.add_array("x.array", [1, 2, 3])
    writer.add_array("x.bools", [True, False])
    for n, kind in enumerate(("F32", "F16", "BF16", "Q8_0", "Q4_0")):
        array = np.full((3, 32 + 32 * n), n / 3, np.float32)
        type_of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"t.{kind}", gguf.quantize(array, type_of), raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    head, oracle = read_head(path), gguf.GGUFReader(path)
    expected = {
        name: field.contents() for name, field in oracle.fields.items() if name[:5] != "GGUF."
    }
    found = {
        name: list(head.array(name)) if isinstance(value, (tuple, reader.LongArray)) else value
        for name, value in head.values.items()
    }
    assert found == expected
    assert isinstance(head.values["tokenizer.ggml.tokens"], reader.LongArray)
    for one in oracle.tensors:
        own = head.tensors[one.name]
        assert (own.offset, own.n_bytes) == (one.data_offset, one.n_bytes)
        assert list(own.shape[::-1]) == list(one.shape)
        assert own.type == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(
            one.tensor_type.name, one.tensor_type.name.lower()
        )


U32 = struct.pack("<I", 1)
REFUSED = {
    "another magic": (lambda p: p.write_bytes(b"GGML" + bytes(60)), "expected b'GGUF'"),
    "nothing": (lambda p: p.write_bytes(b""), "begins with b''"),
    "cut off in the counts": (lambda p: p.write_bytes(b"GGUF\3\0\0\0\1"), "cut off in its counts"),
    "more keys than bytes": (lambda p: file(p, n_keys=9999), "cut off in its 9999 keys"),
    "keys without end": (lambda p: file(p, n_keys=1 << 60), "over the limit"),
    "more tensors than bytes": (lambda p: file(p, n_tensors=99), "cut off in its 99 tensors"),
    "tensors without end": (lambda p: file(p, n_tensors=1 << 63), "over the limit"),
    "a string of gigabytes": (
        lambda p: file(p, [key("a", STRING, struct.pack("<Q", 5 << 30))]),
        "a string of 5368709120 bytes, over the limit",
    ),
    "a string beyond the end": (
        lambda p: file(p, [key("a", STRING, struct.pack("<Q", 5000))]),
        "cut off in a",
    ),
    "no UTF-8": (lambda p: file(p, [key("a", STRING, text(b"\xff"))]), "not UTF-8"),
    "a key twice": (lambda p: file(p, [key("a", 4, U32)] * 2), "key a stands twice"),
    "a key like a path": (lambda p: file(p, [key("../a", 4, U32)]), "not a name"),
    "an unknown type": (lambda p: file(p, [key("a", 13, bytes(16))]), "type 13"),
    "an unknown element": (
        lambda p: file(p, [key("a", ARRAY, struct.pack("<IQ", 99, 1) + bytes(8))]),
        "type 99",
    ),
    "arrays in an array": (
        lambda p: file(p, [key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, 4, 1))]),
        "array of arrays",
    ),
    "a lying array": (
        lambda p: file(p, [key("a", ARRAY, struct.pack("<IQ", 4, 1 << 20))]),
        "cut off in a",
    ),
    "an array without end": (
        lambda p: file(p, [key("a", ARRAY, struct.pack("<IQ", 4, 1 << 61))]),
        "over the limit",
    ),
    "neither true nor false": (lambda p: file(p, [key("a", 7, b"\2")]), "expected 0 or 1"),
    "an odd alignment": (
        lambda p: file(p, [key("general.alignment", 4, struct.pack("<I", 24))]),
        "expected a power of 2",
    ),
    "a huge alignment": (
        lambda p: file(p, [key("general.alignment", 4, struct.pack("<I", 1 << 30))]),
        "expected a power of 2",
    ),
    "no axes": (lambda p: file(p, [], [tensor("t", ())]), "0 axes"),
    "five axes": (lambda p: file(p, [], [tensor("t", (32, 1, 1, 1, 1))]), "5 axes"),
    "an axis of nothing": (lambda p: file(p, [], [tensor("t", (0, 2))]), "has the shape"),
    "a shape beyond 64 bits": (
        lambda p: file(p, [], [tensor("t", (1 << 40, 1 << 40))]),
        "has the shape",
    ),
    "half a block": (lambda p: file(p, [], [tensor("t", (48, 2), 8)]), "a multiple of 32"),
    "a tensor twice": (
        lambda p: file(p, [], [tensor("t"), tensor("t", offset=256)], data=bytes(512)),
        "tensor t stands twice",
    ),
    "overlapping tensors": (
        lambda p: file(p, [], [tensor("t"), tensor("u", offset=224)], data=bytes(512)),
        "lies at 224 of the data, expected 256: it overlaps",
    ),
    "a gap": (
        lambda p: file(p, [], [tensor("t"), tensor("u", offset=288)], data=bytes(600)),
        "does not follow",
    ),
    "not aligned": (
        lambda p: file(p, [], [tensor("t", (32, 1)), tensor("u", offset=130)], data=bytes(600)),
        "expected 128",
    ),
    "a tensor beyond the end": (
        lambda p: file(p, [], [tensor("t")], data=bytes(255)),
        "cut off in tensor t",
    ),
    "trailing bytes": (lambda p: file(p, [], [tensor("t")], data=bytes(300)), "44 trailing bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    make, words = REFUSED[name]
    make(tmp_path / "m.gguf")
    assert words in refusal(tmp_path / "m.gguf")


def test_versions_and_big_endian_files_are_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    for version in (0, 1, 4):
        file(path, version=version)
        assert f"version {version} of GGUF" in refusal(path, UnsupportedModelError)
    file(path, version=3 << 24)
    assert "big-endian" in refusal(path, UnsupportedModelError)
    file(path, [], [tensor("t", kind=4)])
    assert "ggml's type 4" in refusal(path, UnsupportedModelError)
    assert read_head(file(path, version=2)).tensors == {}


def test_long_arrays_take_no_memory_until_they_are_read(tmp_path):
    count = 300_000
    body = struct.pack("<IQ", STRING, count) + b"".join(text(f"token {n}") for n in range(count))
    path = file(tmp_path / "m.gguf", [key("a", ARRAY, body), key("b", STRING, text("after"))])
    del body
    tracemalloc.start()
    head = read_head(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20  # the window, twice while it moves
    assert head.values["b"] == "after"
    assert head.array("a")[-1] == f"token {count - 1}"


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = file(tmp_path / "m.gguf", [key("a", STRING, text("one"))])
    assert read_head(path).values == {"a": "one"}
    file(path, [key("a", STRING, text("three"))])
    os.utime(path, ns=(1, 1))
    assert read_head(path).values == {"a": "three"}


# Parts


def part(folder, number, count, tensors, **more):
    path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
    said = {"split.no": number, "split.count": count, **more}
    keys = [key(name, 4, struct.pack("<I", value)) for name, value in said.items()]
    infos = [tensor(name, offset=256 * n) for n, name in enumerate(tensors)]
    return file(path, keys, infos, data=bytes(256 * len(tensors)))


def test_parts_are_one_model(tmp_path):
    first = part(tmp_path, 0, 3, ["a"], **{"split.tensors.count": 4})
    part(tmp_path, 1, 3, ["b", "c"])
    last = part(tmp_path, 2, 3, ["d"])
    head = open_head(first)
    assert list(head.tensors) == ["a", "b", "c", "d"]
    assert head.tensors["d"].path == str(last)
    assert len(head.parts) == 3
    assert model_at(tmp_path) == str(first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "m-00002-of-00002.gguf").unlink(), "missing"),
        (lambda folder: part(folder, 1, 2, ["a"]), "tensor a is in"),
        (lambda folder: part(folder, 1, 2, ["b", "c"]), "split.tensors.count is 2"),
        (
            lambda folder: part(folder, 0, 2, ["b"]).rename(folder / "m-00002-of-00002.gguf"),
            r"split.no and split.count are \[0, 2\], expected \[1, 2\]",
        ),
        (lambda folder: part(folder, 0, 2, ["a"], **{"split.count": 3}), "split.count is 3"),
    ],
)
def test_parts_that_do_not_fit(change, words, tmp_path):
    part(tmp_path, 1, 2, ["b"])
    first = part(tmp_path, 0, 2, ["a"], **{"split.tensors.count": 2})
    open_head(first)
    change(tmp_path)
    if not first.exists():
        part(tmp_path, 0, 2, ["a"], **{"split.tensors.count": 2})
    with pytest.raises(CheckpointError, match=words):
        open_head(first)


def test_the_first_part_is_to_be_named(tmp_path):
    part(tmp_path, 0, 2, ["a"])
    other = part(tmp_path, 1, 2, ["b"])
    with pytest.raises(CheckpointError, match=r"name the first one, .*m-00001-of-00002.gguf"):
        open_head(other)


def test_siblings_are_left_alone(tmp_path):
    names = [
        "mmproj-model-f16.gguf",
        "model-mmproj.gguf",
        "a.gguf",
        "imatrix.gguf",
        "b-00002-of-00003.gguf",
    ]
    assert models_in(names) == ["a.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert model_at(tmp_path) == str(tmp_path / "a.gguf")
    (tmp_path / "c.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        model_at(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model_at(tmp_path) == str(tmp_path)
    assert parts.is_gguf(tmp_path / "a.gguf")


# Damaged heads


def test_damaged_heads_are_read_or_refused_in_one_line(tmp_path):
    """A short run of benchmarks/fuzz_gguf.py."""
    path = tmp_path / "m.gguf"
    whole, rng, kinds = head_of(tmp_path / "whole.gguf"), np.random.default_rng(0), set()
    for _ in range(1500):
        path.write_bytes(damaged(whole, rng))
        began = time.monotonic()
        kinds.add(judge(path))
        assert time.monotonic() - began < 60
    assert kinds == {"read", "refused"}
