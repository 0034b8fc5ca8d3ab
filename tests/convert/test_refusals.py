"""What bad input gets: a row of shared/REFUSALS.md, one test on exit code and words."""

import errno
import json
import os
import socket
import struct
import tracemalloc

import numpy as np
import pytest

from jlayer.app.cli import main
from jlayer.checkpoint.layout import MANIFEST, is_weight_file
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.target.journal import JOURNAL, Journal
from jlayer.errors import JlayerError
from tests.convert.checkpoints import (
    edit_json,
    edit_tensors,
    files_of,
    join,
    numbers,
    split,
    tensor_of,
    tensors_of,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ROWS = {}


def row(*words, kind="single", code=3, **options):
    """Enters a damage into the table: `words`, and what it returns, must stand in the message."""

    def enter(damage):
        name = damage.__name__.replace("_", "-")
        assert name not in ROWS
        ROWS[name] = (kind, damage, code, words, options)
        return damage

    return enter


def refused(source, target, code, words, **options):
    """Converts what must be refused, holds the refusal against its row, and returns it."""
    with pytest.raises(JlayerError) as caught:
        convert_checkpoint(source, target, **options)
    message = str(caught.value)
    assert caught.value.exit_code == code, message
    for word in words:
        assert word in message
    assert "\n" not in message
    refused_target(target)
    return message


def refused_target(target):
    """After a refusal there is nothing, or what can be resumed: never a manifest,
    nothing half-written."""
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    assert all(is_weight_file(name) for name in names - {JOURNAL})
    assert not names or (JOURNAL in names and len(names) > 1)


def edit_header(path, change):
    """Takes a file's header through `change` and leaves its data."""
    header, data = split(path)
    join(path, change(header) or header, data)


def set_entry(tensor, **changes):
    def change(header):
        header[tensor] |= changes

    return change


# Files that are no safetensors, or damaged ones.


@row(SINGLE)
def shard_cut_off(source):
    whole = (source / SINGLE).stat().st_size
    os.truncate(source / SINGLE, whole - 1000)
    return f"expected {whole} bytes", f"found {whole - 1000}"


@row("empty", SINGLE)
def file_empty(source):
    (source / SINGLE).write_bytes(b"")


@row("too short", SINGLE)
def file_too_short(source):
    (source / SINGLE).write_bytes(b"\x10\0\0\0\0\0\0")


@row("header", SINGLE)
def header_longer_than_the_file(source):
    raw = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw[8:])


@row("header", str(1 << 63), SINGLE)
def header_of_2_to_the_63(source):
    raw = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(struct.pack("<Q", 1 << 63) + raw[8:])


@row("trailing", "7 ", SINGLE)
def bytes_after_the_last_tensor(source):
    with open(source / SINGLE, "ab") as file:
        file.write(b"1234567")


@row("gap", SINGLE)
def hole_between_tensors(source):
    header, data = split(source / SINGLE)
    begin = header[NORM]["data_offsets"][0]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= begin:
            entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]
    join(source / SINGLE, header, data[:begin] + bytes(8) + data[begin:])


@row(NORM, "overlap", "model.layers.2.self_attn.v_proj.weight", SINGLE)
def overlapping_tensors(source):
    header, data = split(source / SINGLE)
    begin, end = header[NORM]["data_offsets"]
    join(
        source / SINGLE, set_entry(NORM, data_offsets=[begin - 8, end - 8])(header) or header, data
    )


@row(NORM, "inverted")
def inverted_offsets(source):
    edit_header(source / SINGLE, set_entry(NORM, data_offsets=[96, 0]))


@row(NORM, "negative")
def negative_offsets(source):
    edit_header(source / SINGLE, set_entry(NORM, data_offsets=[-96, 0]))


@row(NORM, "gap")
def offsets_out_of_bounds(source):
    edit_header(source / SINGLE, set_entry(NORM, data_offsets=[1 << 62, (1 << 62) + 96]))


@row(NORM, "data_offsets", "1.5")
def offsets_that_are_no_integers(source):
    edit_header(source / SINGLE, set_entry(NORM, data_offsets=[1.5, 97.5]))


@row(NORM, "[4294967296, 4294967296]", "overflow")
def shape_that_overflows(source):
    edit_header(source / SINGLE, set_entry(NORM, shape=[1 << 32, 1 << 32]))


@row(NORM, "[-24]")
def negative_shape(source):
    edit_header(source / SINGLE, set_entry(NORM, shape=[-24]))


@row(NORM, "[24.0]")
def shape_that_is_no_integer(source):
    edit_header(source / SINGLE, set_entry(NORM, shape=[24.0]))


@row(NORM, "[True]")
def shape_that_is_a_boolean(source):
    edit_header(source / SINGLE, set_entry(NORM, shape=[True]))


@row(NORM, "[24, 1, 1, 1, 1, 1, 1, 1, 1]")
def shape_of_nine_dims(source):
    edit_header(source / SINGLE, set_entry(NORM, shape=[24] + [1] * 8))


@row(NORM, "100 bytes", "96")
def shape_and_dtype_against_the_bytes(source):
    edit_header(source / SINGLE, set_entry(NORM, shape=[25]))


@row(NORM, "twice", SINGLE)
def tensor_twice_in_a_header(source):
    header, data = split(source / SINGLE)
    text = json.dumps(header)
    join(source / SINGLE, (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data)


@row("hidden_size", "twice", "config.json")
def key_twice_in_the_config(source):
    text = (source / "config.json").read_text()
    (source / "config.json").write_text('{"hidden_size": 24,' + text[1:])


@row(NORM, "twice", INDEX, kind="sharded")
def key_twice_in_the_index(source):
    text = (source / INDEX).read_text()
    again = f'"weight_map": {{"{NORM}": "model-00001-of-00009.safetensors",'
    (source / INDEX).write_text(text.replace('"weight_map": {', again))


@row("header", SINGLE)
def white_space_before_the_header(source):
    header, data = split(source / SINGLE)
    join(source / SINGLE, b" " + json.dumps(header).encode(), data)


@row("header", "UTF-8")
def header_not_utf8(source):
    join(source / SINGLE, b'{"\xff": 1}', b"")


@row("header", "not JSON")
def header_not_json(source):
    join(source / SINGLE, b'{"a": }', b"")


@row("header", "not JSON")
def header_of_an_endless_number(source):
    join(source / SINGLE, b'{"a": ' + b"9" * 5000 + b"}", b"")


@row("header", "nested")
def header_nested_a_thousand_deep(source):
    join(source / SINGLE, b'{"a":' * 1000 + b"1" + b"}" * 1000, b"")


@row("header", "NaN")
def header_with_nan(source):
    join(source / SINGLE, b'{"a": NaN}', b"")


@row(NORM, "F8_E4M3", "BF16, F16, F32")
def unknown_dtype(source):
    edit_header(source / SINGLE, set_entry(NORM, dtype="F8_E4M3"))


@row("limit of 200000", SINGLE)
def too_many_tensors(source):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    join(source / SINGLE, json.dumps(dict.fromkeys(map(str, range(200_001)), entry)).encode(), b"")


@row("limit of 33554432", SINGLE)
def header_over_32_mb(source):
    with open(source / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", (32 << 20) + 1) + b"{")
        file.truncate(40 << 20)


@row(r"'..\\..\\x'")
def tensor_name_with_backslashes(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.update({"..\\..\\x": tensors[NORM]}))


@row("'../x'")
def tensor_name_that_is_a_path(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.update({"../x": tensors[NORM]}))


@row(r"'a\x00b'")
def tensor_name_with_nul(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.update({"a\0b": tensors[NORM]}))


@row(r"'a\x1b[2Jb\n'")
def tensor_name_with_control_characters(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.update({"a\x1b[2Jb\n": tensors[NORM]}))


@row("git lfs pull", SINGLE)
def git_lfs_pointer(source):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1\n"
    (source / SINGLE).write_text(pointer)


@row("HTML", SINGLE)
def html_page(source):
    (source / SINGLE).write_text("\n<!DOCTYPE html><html><body>503</body></html>")


@row("zip", SINGLE)
def zip_archive(source):
    (source / SINGLE).write_bytes(b"PK\x03\x04" + bytes(100))


@row("a pickle", SINGLE)
def pickle(source):
    (source / SINGLE).write_bytes(b"\x80\x02}q\0." + bytes(100))


# Folders and indexes.


@row("missing", "config.json")
def config_missing(source):
    (source / "config.json").unlink()


@row("no such folder")
def source_missing(source):
    for path in source.iterdir():
        path.unlink()
    source.rmdir()


@row("no such folder")
def source_is_a_file(source):
    source_missing(source)
    source.write_text("")


@row(SINGLE, INDEX, "other.safetensors")
def weights_under_another_name(source):
    (source / SINGLE).rename(source / "other.safetensors")


@row("pytorch_model.bin", "safetensors under another name")
def safetensors_under_the_name_of_a_pickle(source):
    (source / SINGLE).rename(source / "pytorch_model.bin")


@row(SINGLE, "pytorch_model.bin", "only model.pt")
def a_pickle_under_another_name(source):
    (source / SINGLE).rename(source / "model.pt")


@row("weight_map", INDEX, kind="sharded")
def index_without_a_map(source):
    (source / INDEX).write_text('{"metadata": {}}')


def names_a_file(name):
    def damage(source):
        weight_map = json.loads((source / INDEX).read_text())["weight_map"]
        weight_map[NORM] = name
        edit_json(source / INDEX, weight_map=weight_map)
        for path in source.glob("*.safetensors"):
            path.unlink()  # nothing there: a refusal on this ground comes before any open

    return damage


for label, name, shown in (
    ("absolute", "/etc/passwd", "'/etc/passwd'"),
    ("parent", "../../x.safetensors", "'../../x.safetensors'"),
    ("inner-parent", "a/../../x.safetensors", "'a/../../x.safetensors'"),
    ("backslash", "..\\x.safetensors", r"'..\\x.safetensors'"),
    ("drive", "C:x.safetensors", "'C:x.safetensors'"),
    ("empty", "", "''"),
    ("nul", "a\0.safetensors", r"'a\x00.safetensors'"),
    ("surrogate", "\ud800.safetensors", r"'\ud800.safetensors'"),
    ("endless", "x" * 300, "x" * 100),
    ("number", 7, "7"),
    ("list", ["a"], "['a']"),
):
    ROWS[f"index-names-a-file-{label}"] = ("sharded", names_a_file(name), 3, (shown, INDEX), {})


@row("outside", "/elsewhere", "model-00002-of-00009.safetensors", kind="sharded")
def link_leading_outside(source):
    path = source / "model-00002-of-00009.safetensors"
    (source.parent / "elsewhere").mkdir()
    path.rename(source.parent / "elsewhere" / path.name)
    path.symlink_to(source.parent / "elsewhere" / path.name)


@row("outside", "/blobs")
def link_to_blobs_of_no_hub_cache(source):
    (source.parent / "blobs").mkdir()
    (source / SINGLE).rename(source.parent / "blobs" / "0")
    (source / SINGLE).symlink_to("../blobs/0")


@row("outside", "config.json")
def config_leading_outside(source):
    (source / "config.json").rename(source.parent / "config.json")
    (source / "config.json").symlink_to("../config.json")


@row("missing", SINGLE, "gone.safetensors", "not there")
def link_leading_nowhere(source):
    (source / SINGLE).unlink()
    (source / SINGLE).symlink_to("gone.safetensors")


@row("loop", SINGLE)
def link_to_itself(source):
    (source / SINGLE).unlink()
    (source / SINGLE).symlink_to(SINGLE)


@row("not a regular file", SINGLE)
def fifo_instead_of_a_shard(source):
    (source / SINGLE).unlink()
    os.mkfifo(source / SINGLE)


@row("not a regular file", "config.json")
def fifo_instead_of_the_config(source):
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")


@row("not a regular file", SINGLE)
def folder_instead_of_a_shard(source):
    (source / SINGLE).unlink()
    (source / SINGLE).mkdir()


@row("not a regular file", SINGLE)
def socket_instead_of_a_shard(source):
    (source / SINGLE).unlink()
    here = os.getcwd()
    os.chdir(source)  # a socket's path may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(SINGLE)
    finally:
        os.chdir(here)


@row("not a regular file", "/dev/null", SINGLE)
def device_instead_of_a_shard(source):
    (source / SINGLE).unlink()
    (source / SINGLE).symlink_to("/dev/null")


@row(
    "model-00002-of-00009.safetensors",
    "model-00005-of-00009.safetensors",
    "2 of 9",
    kind="sharded",
)
def shards_missing(source):
    (source / "model-00002-of-00009.safetensors").unlink()
    (source / "model-00005-of-00009.safetensors").unlink()


@row(NORM, "model-00001-of-00009.safetensors", kind="sharded")
def index_says_another_shard(source):
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    actual, weight_map[NORM] = weight_map[NORM], "model-00001-of-00009.safetensors"
    edit_json(source / INDEX, weight_map=weight_map)
    return [actual]


@row("ghost.weight", "model-00001-of-00009.safetensors", "nowhere", kind="sharded")
def index_names_a_tensor_that_is_nowhere(source):
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(
        source / INDEX,
        weight_map=weight_map | {"ghost.weight": "model-00001-of-00009.safetensors"},
    )


def store_norm_again(source, change):
    actual = json.loads((source / INDEX).read_text())["weight_map"][NORM]
    copy = tensor_of(change(numbers(tensors_of(source / actual)[NORM])))
    other = "model-00001-of-00009.safetensors"
    edit_tensors(source / other, lambda tensors: tensors.update({NORM: copy}))
    return actual, other


@row(NORM, "differs", kind="sharded")
def tensor_in_two_shards_with_different_bytes(source):
    return store_norm_again(source, lambda norm: np.nextafter(norm, np.float32(9)))


@row(NORM, "float32", "float16", kind="sharded")
def tensor_in_two_shards_with_different_dtypes(source):
    return store_norm_again(source, lambda norm: norm.astype(np.float16))


# The model.


@row(
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "missing",
    "stray.weight",
    "model.layers.3.input_layernorm.weight",
    "--allow-extra",
)
def tensors_missing_and_tensors_that_belong_nowhere(source):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        moved = tensors.pop("model.layers.2.input_layernorm.weight")
        tensors["model.layers.3.input_layernorm.weight"] = tensors["stray.weight"] = moved

    edit_tensors(source / SINGLE, change)


@row("model.layers.1.mlp.up_proj.weight", "missing", allow_extra=True)
def tensors_missing_with_extra_ones_allowed(source):
    edit_tensors(
        source / SINGLE,
        lambda tensors: tensors.update(x=tensors.pop("model.layers.1.mlp.up_proj.weight")),
    )


@row("model.layers.0.self_attn.k_proj.weight", "[24, 20]", "[20, 24]", "[12, 2]", "[24]", NORM)
def shapes_against_the_config(source):
    def change(tensors):
        k_proj = numbers(tensors["model.layers.0.self_attn.k_proj.weight"])
        tensors["model.layers.0.self_attn.k_proj.weight"] = tensor_of(k_proj.T.copy())
        tensors[NORM] = tensor_of(numbers(tensors[NORM]).reshape(12, 2))

    edit_tensors(source / SINGLE, change)


@row("lm_head", "missing", "tie_word_embeddings")
def head_missing_though_untied(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.pop(HEAD))


@row(HEAD, "[132, 24]", "[133, 24]", kind="tied")
def tied_head_of_another_shape(source):
    def change(tensors):
        tensors[HEAD] = tensor_of(numbers(tensors[EMBEDDING])[:-1].copy())

    edit_tensors(source / SINGLE, change)


@row(EMBEDDING, "missing", kind="tied")
def tied_head_and_embedding_missing(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.pop(EMBEDDING))


@row(EMBEDDING, "missing")
def embedding_missing_though_untied(source):
    edit_tensors(source / SINGLE, lambda tensors: tensors.pop(EMBEDDING))


@row("2 models", "'student.model.'", "'teacher.model.'")
def two_models_in_one_file(source):
    def change(tensors):
        both = {
            f"{who}.{name}": tensors[name] for who in ("student", "teacher") for name in tensors
        }
        tensors.clear()
        tensors.update(both)

    edit_tensors(source / SINGLE, change)


@row(NORM, "two other names", "which is meant")
def one_tensor_under_two_other_names(source):
    def change(tensors):
        norm = tensors.pop(NORM)
        wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(wrapped | {"module.norm.weight": norm, f"module.{NORM}": norm})

    edit_tensors(source / SINGLE, change)


def spoil(tensor, *values):
    def change(tensors):
        weights = numbers(tensors[tensor])
        weights.reshape(-1)[[1, -1][: len(values)]] = values
        tensors[tensor] = tensor_of(weights)

    return change


@row(
    "model.layers.1.mlp.up_proj.weight", "NaN or infinite numbers: 2,", "--allow-nonfinite", SINGLE
)
def nan_and_infinite_weights(source):
    edit_tensors(source / SINGLE, spoil("model.layers.1.mlp.up_proj.weight", np.nan, -np.inf))


@row(NORM, "NaN or infinite numbers: 1,", kind="bfloat16")
def nan_weight_in_bfloat16(source):
    edit_tensors(source / SINGLE, spoil(NORM, np.nan))


@row(NORM, "NaN or infinite numbers: 1,", kind="float16")
def infinite_weight_in_float16(source):
    edit_tensors(source / SINGLE, spoil(NORM, np.inf))


@row("model.layers.1.mlp.up_proj.weight", ": 2,", "float16", dtype="float16")
def weights_that_overflow_in_a_cast(source):
    edit_tensors(source / SINGLE, spoil("model.layers.1.mlp.up_proj.weight", 65520, -1e30))


@row(NORM, ": 1,", "bfloat16", dtype="bfloat16", allow_nonfinite=True)
def weight_that_overflows_beside_one_that_is_infinite(source):
    edit_tensors(source / SINGLE, spoil(NORM, np.inf, np.finfo(np.float32).max))


def config_with(**changes):
    def damage(source):
        edit_json(source / "config.json", **changes)

    return damage


for label, changes, words in (
    ("no-width", {"hidden_size": None}, ("hidden_size", "missing")),
    ("zero-width", {"hidden_size": 0}, ("hidden_size", "0")),
    ("negative-mlp", {"intermediate_size": -4}, ("intermediate_size", "-4")),
    ("huge-vocabulary", {"vocab_size": 10**12}, ("vocab_size", str(10**12))),
    ("huge-depth", {"num_hidden_layers": 10**12}, ("num_hidden_layers", str(10**12))),
    ("fractional-heads", {"num_attention_heads": 6.5}, ("num_attention_heads", "6.5")),
    ("heads-in-words", {"num_key_value_heads": "2"}, ("num_key_value_heads", "'2'")),
    ("heads-and-kv-heads", {"num_key_value_heads": 4}, ("6", "4", "num_key_value_heads")),
    ("odd-head-dim", {"head_dim": 9}, ("head_dim", "9")),
    ("architecture", {"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "LlamaFor")),
    (
        "rope-type",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        ("dynamic", "llama3"),
    ),
    ("architecture-in-control-characters", {"architectures": ["a\x1b[2J"]}, (r"'a\x1b[2J'",)),
    ("model-type-that-is-a-list", {"architectures": None, "model_type": ["x"]}, ("['x']",)),
    ("dtype-that-is-an-object", {"torch_dtype": {"a": 1}, "dtype": None}, ("dtype", "{'a': 1}")),
    ("epsilon-beyond-any-float", {"rms_norm_eps": 10**400}, ("rms_norm_eps", "positive")),
    ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("group_size",)),
    ("awq", {"quantization_config": {"quant_method": "awq"}}, ("bits is None",)),
    (
        "bitsandbytes",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        ("load_in_4bit and load_in_8bit are both false",),
    ),
):
    ROWS[f"config-{label}"] = ("single", config_with(**changes), 3, (*words, "config.json"), {})


@row("gptq", "quantize_config.json")
def quantizer_known_by_its_file_alone(source):
    (source / "quantize_config.json").write_text('{"bits": 4}')


@row("config.json", "not JSON")
def config_not_json(source):
    (source / "config.json").write_text("{'hidden_size': 24}")


@row("generation_config.json", "not JSON")
def generation_config_not_json(source):
    (source / "generation_config.json").write_text("{")


@row("dtype", "float64", code=2, dtype="float64")
def dtype_not_known(source):
    pass


@pytest.mark.parametrize("name", ROWS)
def test_refused(copy_of, tmp_path, name):
    kind, damage, code, words, options = ROWS[name]
    source = copy_of(kind)
    words = (*words, *(damage(source) or ()))
    message = refused(source, tmp_path / "target", code, words, **options)
    assert str(source) in message or code == 2


@pytest.mark.parametrize(
    "name",
    [
        *("header-of-2-to-the-63", "header-over-32-mb", "header-longer-than-the-file"),
        *("offsets-out-of-bounds", "shape-that-overflows", "config-huge-depth"),
        "config-huge-vocabulary",
    ],
)
def test_what_it_says_of_its_size_is_never_allocated(copy_of, tmp_path, name):
    kind, damage, _, _, options = ROWS[name]
    source = copy_of(kind)
    damage(source)
    tracemalloc.start()
    try:
        with pytest.raises(JlayerError):
            convert_checkpoint(source, tmp_path / "target", **options)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# Running in place casts nothing, reads no pickle, and meets a number that is none in its layer.
CONVERTERS_OWN = {
    "nan-and-infinite-weights",
    "nan-weight-in-bfloat16",
    "infinite-weight-in-float16",
    "safetensors-under-the-name-of-a-pickle",
    "a-pickle-under-another-name",
    "tensors-that-belong-nowhere",
}


@pytest.mark.parametrize("name", [n for n in ROWS if not ROWS[n][4] and n not in CONVERTERS_OWN])
def test_refused_in_place_too(copy_of, name):
    kind, damage, code, words, _ = ROWS[name]
    source = copy_of(kind)
    words = (*words, *(damage(source) or ()))
    with pytest.raises(JlayerError) as caught:
        Store(source)
    assert caught.value.exit_code == code
    assert str(source) in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "name",
    [
        *("shard-cut-off", "git-lfs-pointer", "fifo-instead-of-a-shard", "link-leading-outside"),
        *("index-names-a-file-parent", "config-odd-head-dim", "unknown-dtype"),
    ],
)
def test_refused_by_generate(copy_of, capsys, name):
    kind, damage, code, words, _ = ROWS[name]
    source = copy_of(kind)
    words = (*words, *(damage(source) or ()))
    assert main(["generate", str(source), "--prompt-ids", "1", "--device", "cpu"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == []


def test_the_config_is_judged_before_the_weights(copy_of, tmp_path):
    source = copy_of("single")
    (source / SINGLE).write_bytes(b"")
    edit_json(source / "config.json", head_dim=9)
    refused(source, tmp_path / "target", 3, ["head_dim"])


def test_auto_map_is_no_error_and_its_code_is_never_run(copy_of, tmp_path):
    source = copy_of("single")
    (source / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert convert_checkpoint(source, tmp_path / "target").status == "converted"
    assert not (tmp_path / "target" / "modeling_evil.py").exists()


def test_safetensors_are_taken_where_pickles_lie_beside_them(copy_of, tmp_path):
    source = copy_of("single")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    notes = convert_checkpoint(source, tmp_path / "target").notes
    assert len(notes) == 1
    assert "safetensors are taken" in notes[0]


def test_a_header_whose_length_begins_as_a_pickle_does_is_read(copy_of, tmp_path):
    """640 is 80 02 in little-endian."""
    source = copy_of("single")
    header, data = split(source / SINGLE)
    text = json.dumps(header).encode()
    length = next(n for n in range(len(text), 1 << 16) if n & 0xFFFF in (0x0280, 0x0380, 0x1280))
    join(source / SINGLE, text.ljust(length), data)
    assert convert_checkpoint(source, tmp_path / "target").status == "converted"


# The target.


def test_a_target_that_is_the_source_or_inside_it(copy_of, tmp_path):
    source = copy_of("single")
    (tmp_path / "link").symlink_to(source)
    before = sorted(source.iterdir())
    for target in (source, source / "new", source / "a" / "b", tmp_path / "link" / "new"):
        with pytest.raises(JlayerError) as caught:
            convert_checkpoint(source, target)
        assert caught.value.exit_code == 2
        assert str(source) in str(caught.value)
        assert str(target) in str(caught.value)
    assert sorted(source.iterdir()) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_holds_anything_else_is_never_touched(published, copy_of, overwrite):
    other = copy_of("tied")
    before = sorted(other.iterdir())
    with pytest.raises(JlayerError) as caught:
        convert_checkpoint(published("single"), other, overwrite=overwrite)
    assert caught.value.exit_code == 2
    assert SINGLE in str(caught.value)
    assert sorted(other.iterdir()) == before


def test_a_target_with_config_and_tokenizer_alone_is_not_ours(published, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JlayerError) as caught:
        convert_checkpoint(published("single"), tmp_path, overwrite=True)
    assert caught.value.exit_code == 2
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_target_that_is_a_file(published, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(JlayerError) as caught:
            convert_checkpoint(published("single"), target)
        assert caught.value.exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_that_is_not_writable_comes_before_the_source(copy_of, tmp_path, monkeypatch):
    source = copy_of("single")
    (source / "config.json").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    message = refused(source, tmp_path / "target", 6, ["not writable"])
    assert str(tmp_path) in message
    assert "resume" not in message


def test_a_target_that_is_not_writable_any_more_can_be_resumed(published, tmp_path, monkeypatch):
    fail_late(monkeypatch, "pwrite", errno.EIO, nth=12)
    refused(published("single"), tmp_path / "target", 6, ["resume"])
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(published("single"), tmp_path / "target", 6, ["not writable", "resume"])
    resumes(published, tmp_path, monkeypatch)


def test_not_enough_space_at_the_start(published, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    little = os.statvfs_result((*real[:3], 3, 3, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    have = f"{3 * real.f_frsize:,}"
    message = refused(published("single"), tmp_path / "target", 4, ["need", have, "target"])
    assert "resume" not in message  # of what was never begun
    assert not (tmp_path / "target").exists()
    need = int(message.split("need ")[1].split(" bytes")[0].replace(",", ""))
    monkeypatch.undo()
    journals, encode = [], Journal.encode
    monkeypatch.setattr(
        Journal, "encode", lambda self: journals.append(encode(self)) or journals[-1]
    )
    convert_checkpoint(published("single"), tmp_path / "target")
    sizes = [path.stat().st_size for path in (tmp_path / "target").iterdir()]
    sizes += 2 * [max(map(len, journals))]  # the journal, and the journal written aside
    assert need == sum(-(-size // real.f_frsize) for size in sizes) * real.f_frsize


def test_no_inodes_at_the_start(published, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    none = os.statvfs_result((*real[:5], 100, 2, 2, *real[8:]))
    monkeypatch.setattr(os, "statvfs", lambda path: none)
    message = refused(published("single"), tmp_path / "target", 4, ["inodes"])
    assert "resume" not in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "open", "rename"])
def test_no_space_midway(published, tmp_path, monkeypatch, call, code):
    fail_late(monkeypatch, call, code, nth=12)
    words = [str(tmp_path / "target"), os.strerror(code), "resume"]
    refused(published("single"), tmp_path / "target", 4, words)
    resumes(published, tmp_path, monkeypatch)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "open", "rename"])
def test_an_error_of_the_disk_while_writing(published, tmp_path, monkeypatch, call):
    fail_late(monkeypatch, call, errno.EIO, nth=12)
    words = [str(tmp_path / "target"), "Input/output error", "resume"]
    refused(published("single"), tmp_path / "target", 6, words)
    resumes(published, tmp_path, monkeypatch)


def test_an_error_of_the_disk_while_writing_tells_the_place(published, tmp_path, monkeypatch):
    fail_late(monkeypatch, "pwrite", errno.EIO, nth=3)
    words = ["embed.safetensors", "at byte 0"]
    message = refused(published("single"), tmp_path / "target", 6, words)
    assert "resume" not in message  # nothing was finished, and nothing is left
    assert not (tmp_path / "target").exists()


def test_an_error_of_the_disk_while_reading(published, tmp_path, monkeypatch):
    fail_late(monkeypatch, "preadv", errno.EIO, nth=4)
    message = refused(published("single"), tmp_path / "target", 6, [SINGLE, "byte ", "resume"])
    assert "Input/output error" in message
    resumes(published, tmp_path, monkeypatch)


def resumes(published, tmp_path, monkeypatch):
    """The same call, once what failed works again, ends as if nothing had been."""
    monkeypatch.undo()
    convert_checkpoint(published("single"), tmp_path / "target")
    convert_checkpoint(published("single"), tmp_path / "undisturbed")
    assert files_of(tmp_path / "target") == files_of(tmp_path / "undisturbed")


def fail_late(monkeypatch, name, code, *, nth):
    """The nth call of os.NAME fails; of `open`, only those that write count."""
    real, calls = getattr(os, name), []

    def call(*arguments, **options):
        if name != "open" or arguments[1] & os.O_CREAT:
            calls.append(arguments)
        if len(calls) >= nth:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)


def change_while_reading(monkeypatch, change, *, nth=4):
    real, calls = os.preadv, []

    def preadv(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            change()
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)


def test_a_source_that_changes_during_the_run(copy_of, tmp_path, monkeypatch):
    source = copy_of("single")

    def touch():
        status = (source / SINGLE).stat()
        os.utime(source / SINGLE, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    change_while_reading(monkeypatch, touch)
    refused(source, tmp_path / "target", 3, [str(source / SINGLE), "changed"])


def test_a_source_that_is_cut_off_during_the_run(copy_of, tmp_path, monkeypatch):
    source = copy_of("single")
    change_while_reading(monkeypatch, lambda: os.truncate(source / SINGLE, 20_000))
    refused(source, tmp_path / "target", 3, [str(source / SINGLE), "20000", "changed"])


def test_a_source_that_is_gone_midway(copy_of, tmp_path, monkeypatch):
    source = copy_of("sharded")

    def remove():
        for path in source.glob("*.safetensors"):
            path.unlink()

    change_while_reading(monkeypatch, remove)
    refused(source, tmp_path / "target", 6, ["gone", "safetensors", "resume"])


def test_short_reads_and_writes_are_gone_on_with(published, tmp_path, monkeypatch):
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: write(fd, data[: max(1, len(data) // 3)], at)
    )
    monkeypatch.setattr(
        os, "preadv", lambda fd, to, at: read(fd, [to[0][: max(1, len(to[0]) // 3)]], at)
    )
    convert_checkpoint(published("single"), tmp_path / "target")
    resumes(published, tmp_path, monkeypatch)


def test_an_interrupt_before_anything_is_finished_leaves_nothing(published, tmp_path, monkeypatch):
    change_while_reading(monkeypatch, interrupt, nth=1)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(published("single"), tmp_path / "deep" / "target")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_what_is_finished(published, tmp_path, monkeypatch):
    change_while_reading(monkeypatch, interrupt, nth=20)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(published("single"), tmp_path / "target")
    assert (tmp_path / "target" / "embed.safetensors").exists()
    refused_target(tmp_path / "target")
    resumes(published, tmp_path, monkeypatch)


def interrupt():
    raise KeyboardInterrupt


def test_a_failure_while_overwriting_leaves_no_manifest(published, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert_checkpoint(published("tied"), target)
    fail_late(monkeypatch, "pwrite", errno.ENOSPC, nth=8)
    with pytest.raises(JlayerError):
        convert_checkpoint(published("single"), target, overwrite=True)
    assert not (target / MANIFEST).exists()
    refused_target(target)
    resumes(published, tmp_path, monkeypatch)
