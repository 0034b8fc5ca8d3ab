"""Folders that bitsandbytes has quantized: what is wrong with one is told with its place, and codes
stay as they are. Written here, with random codes; `tests/reference` has those of the library."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.layout import read_manifest
from jlayer.checkpoint.nested import Nested
from jlayer.checkpoint.store import Store
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.progress import Progress
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.parts import Quantized
from jlayer.plan.machine import PLATFORMS
from tests.bitsandbytes_files import EIGHT_BITS, FOUR_BITS, edit_state, eight_bits, four_bits, save
from tests.campaigns import slow_but
from tests.convert.checkpoints import (
    edit_json,
    edit_tensors,
    numbers,
    read_tensors,
    tensor_of,
    tensors_of,
    write_tensors,
)
from tests.convert.refused import assert_refused
from tests.streaming.conftest import set_tile_bytes

UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
SCB = "model.layers.1.mlp.up_proj.SCB"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> a folder."""
    home = tmp_path_factory.mktemp("bitsandbytes")
    return {
        "nested": save(home / "nested"),
        "flat": save(home / "flat", nested=False),
        "int8": save(home / "int8", is_8bit=True),
    }


def changed(source, folder, edit=None, **config):
    """A copy with other tensors, and other keys of its quantization_config."""
    shutil.copytree(source, folder)
    if edit:
        edit_tensors(folder / "model.safetensors", edit)
    if config:
        said = json.loads((folder / "config.json").read_text())["quantization_config"] | config
        edit_json(folder / "config.json", quantization_config=said)
    return folder


def without(*ends):
    def edit(tensors):
        for end in ends:
            del tensors[UP + end]

    return edit


def says(**changes):
    return lambda tensors: edit_state(tensors, UP, **changes)


def text(raw):
    return lambda tensors: tensors.update({STATE: ("U8", (len(raw),), raw)})


def array(end, change):
    """Changes the numbers of a statistic."""

    def edit(tensors):
        tensors[UP + end] = tensor_of(change(numbers(tensors[UP + end])))

    return edit


def with_number(at, value):
    def change(array):
        array[at] = value
        return array

    return change


def part(end, dtype, shape, n_bytes):
    return lambda tensors: tensors.update({UP + end: (dtype, shape, bytes(n_bytes))})


def codes_alone(tensors):
    for name in [name for name in tensors if name.startswith(f"{UP}.")]:
        del tensors[name]


def two_states(tensors):
    tensors[STATE.replace("nf4", "fp4")] = tensors[STATE]


def other_kind(tensors):
    tensors[STATE.replace("nf4", "int4")] = tensors.pop(STATE)


# 192 x 128 weights: 12288 bytes, 384 blocks, and 2 blocks of those.
NESTED = {
    "no text": (without(f".{STATE.rpartition('weight.')[2]}"), f"missing: {STATE}$"),
    "no largest magnitudes": (without(".absmax"), f"missing: {UP}.absmax$"),
    "no levels": (without(".quant_map"), f"missing: {UP}.quant_map$"),
    "no levels of magnitudes": (without(".nested_quant_map"), f"missing: {UP}.nested_quant_map$"),
    "no magnitudes of magnitudes": (without(".nested_absmax"), f"missing: {UP}.nested_absmax$"),
    "no codes": (without(""), f"missing: {UP}$"),
    "codes alone": (codes_alone, f"missing: {STATE}$"),
    "two texts": (two_states, f"{UP} has .*__fp4 and .*__nf4, expected one of them"),
    "an unknown kind by its name": (other_kind, f"missing: {STATE}$"),
    "an unknown kind": (says(quant_type="af4"), "quant_type is 'af4', expected 'nf4'"),
    "another kind": (says(quant_type="fp4"), f"{STATE} in .*: quant_type is 'fp4', expected 'nf4'"),
    "no kind": (says(quant_type=None), "quant_type is None, expected 'nf4'"),
    "blocks that are no power of two": (says(blocksize=48), r"blocksize is 48, supported: 32, 64,"),
    "blocks too large": (says(blocksize=8192), "blocksize is 8192, supported: 32, 64, 128"),
    "no blocks": (says(blocksize=None), "blocksize is missing, expected an integer"),
    "blocks that are a word": (says(blocksize="64"), "blocksize is '64', expected an integer"),
    "blocks across rows": (
        says(blocksize=256),
        f"{UP} has rows of 128 inputs, supported: whole blocks of 256; take the model's unq",
    ),
    "another shape": (
        says(shape=[128, 192]),
        r"shape is \[128, 192\], by config.json \[192, 128\]",
    ),
    "no shape": (says(shape=None), "shape is None, by config.json"),
    "another dtype": (
        says(dtype="float64"),
        "dtype 'float64' is not supported; supported: float32",
    ),
    "something more": (says(zero_point=3), "'zero_point' is not known, supported: quant_type"),
    "no JSON": (text(b"{'quant_type': 1}"), f"{STATE} in model.safetensors: not JSON"),
    "two of a key": (text(b'{"blocksize": 64, "blocksize": 64}'), "blocksize"),
    "not UTF-8": (text(b'{"\xff": 1}'), "not UTF-8"),
    "a list": (text(b"[64]"), "found a JSON list, expected an object"),
    "a long text": (text(b" " * 5000), r"is uint8 \[5000\], expected uint8 of up to 4096 bytes"),
    "a text of integers": (part(STATE[len(UP) :], "I32", (20,), 80), r"is int32 \[20\], expected"),
    "a magnitude short": (
        part(".absmax", "U8", (383,), 383),
        rf"{UP}.absmax in model.safetensors is uint8 \[383\], expected uint8 \[384\] by its quant",
    ),
    "magnitudes that are not nested": (
        part(".absmax", "F32", (384,), 1536),
        r"absmax in .* is float32 \[384\], expected uint8 \[384\]",
    ),
    "a nested magnitude short": (
        array(".nested_absmax", lambda array: array[:1]),
        r"nested_absmax in .* is float32 \[1\], expected float32 \[2\]",
    ),
    "levels of another count": (
        array(".quant_map", lambda array: array[:8]),
        r"quant_map in .* is float32 \[8\], expected float32 \[16\]",
    ),
    "levels of 16 bits": (
        array(".nested_quant_map", lambda array: array.astype(ml_dtypes.bfloat16)),
        r"nested_quant_map in .* is bfloat16 \[256\], expected float32 \[256\]",
    ),
    "other levels": (
        array(".quant_map", with_number(3, -0.4)),
        f"{UP}.quant_map in .* has other levels than nf4, supported: -0.696193 as the second",
    ),
    "a level that is no number": (
        array(".quant_map", with_number(3, np.nan)),
        "quant_map in .*: NaN or infinite numbers: 1, expected 0",
    ),
    "a nested level that is no number": (
        array(".nested_quant_map", with_number(3, np.inf)),
        "nested_quant_map in .*: NaN or infinite numbers: 1, expected 0",
    ),
    "a nested magnitude that is no number": (
        array(".nested_absmax", with_number(slice(0, 2), np.nan)),
        f"{UP}.nested_absmax in model.safetensors: NaN or infinite numbers: 2, expected 0",
    ),
    "no offset": (says(nested_offset=None), "nested_offset is None, expected a number"),
    "an offset in words": (says(nested_offset="0"), "nested_offset is '0', expected a number"),
    "an offset beyond float32": (says(nested_offset=1e39), "nested_offset is 1e\\+39, expected a"),
    "an offset that is no number": (says(nested_offset=float("nan")), f"{STATE} in .*NaN"),
    "other nested blocks": (says(nested_blocksize=64), "nested_blocksize is 64, supported: 256"),
    "no nested blocks": (says(nested_blocksize=None), "nested_blocksize is None, supported: 256"),
    "no nested dtype": (says(nested_dtype=None), "nested_dtype is None, supported: 'float32'"),
    "other nested numbers": (says(nested_dtype="float16"), "nested_dtype is 'float16', supported"),
    "a byte short": (
        part("", "U8", (12287, 1), 12287),
        rf"{UP} in .* is uint8 \[12287, 1\], expected 12288 bytes of \[192, 128\]",
    ),
    "plain codes": (
        part("", "BF16", (192, 128), 49152),
        rf"{UP} in .* is bfloat16 \[192, 128\], expected 12288 bytes",
    ),
}


@pytest.mark.parametrize(("edit", "words"), NESTED.values(), ids=NESTED)
def test_tensors_that_do_not_make_a_matrix_are_refused(made, tmp_path, edit, words):
    assert_refused(changed(made["nested"], tmp_path / "changed", edit), tmp_path, words)


def test_whatever_a_text_says_is_read_or_refused(made, tmp_path):
    """Of 200 damaged texts: some bytes changed, some of them left out."""
    folder, rng = changed(made["nested"], tmp_path / "changed"), np.random.default_rng(0)
    path, refusals = folder / "model.safetensors", []
    whole = tensors_of(path)
    for _ in range(200):
        raw = bytearray(whole[STATE][2])
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            raw[at] = rng.integers(32, 127)
        del raw[rng.integers(0, 2 * len(raw)) :]
        write_tensors(path, {**whole, STATE: ("U8", (len(raw),), bytes(raw))})
        try:
            Store(folder)
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 150
    assert all(STATE in line and "\n" not in line for line in refusals)


def test_a_few_problems_are_told_at_once_with_the_number_of_the_others(made, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith(".absmax")]:
            del tensors[name]

    folder = changed(made["nested"], tmp_path / "changed", edit)
    assert_refused(folder, tmp_path, r"(missing: [^;]*absmax; ){3}and 11 more$")


def test_nested_magnitudes_without_what_they_need(made, tmp_path):
    """Of a folder whose statistics are not nested."""
    folder = changed(made["flat"], tmp_path / "one", says(nested_offset=0.5))
    assert_refused(folder, tmp_path, r"absmax in .* is float32 \[384\], expected uint8 \[384\]")
    folder = changed(made["flat"], tmp_path / "two", part(".absmax", "U8", (384,), 384))
    assert_refused(folder, tmp_path, r"absmax in .* is uint8 \[384\], expected float32 \[384\]")


def test_a_quantized_router_is_refused(tmp_path):
    """Earlier versions of Transformers quantized it, unless it was left out."""
    more = {"num_local_experts": 2, "architectures": ["MixtralForCausalLM"]}
    folder = save(tmp_path / "mixtral", model_type="mixtral", **more)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert_refused(folder, tmp_path, rf"encoded, which is not supported of it: {gate} \(nf4\)")


def test_a_statistic_in_two_files_is_refused(made, tmp_path):
    folder = changed(made["nested"], tmp_path / "changed")
    tensors = tensors_of(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "a.safetensors", tensors)
    write_tensors(folder / "b.safetensors", {f"{UP}.absmax": tensors[f"{UP}.absmax"]})
    weight_map = {**dict.fromkeys(tensors, "a.safetensors"), f"{UP}.absmax": "b.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    assert_refused(
        folder, tmp_path, f"{UP}.absmax is in a.safetensors and in b.safetensors, expected in"
    )


def test_a_magnitude_that_is_no_number_is_refused_with_its_place(made, tmp_path):
    folder = changed(made["flat"], tmp_path / "changed", array(".absmax", with_number(5, np.nan)))
    with pytest.raises(CheckpointError, match=rf"tensor {UP}.scale: NaN or infinite numbers: 1,"):
        convert_checkpoint(folder, tmp_path / "target")
    done = convert_checkpoint(folder, tmp_path / "kept", allow_nonfinite=True)
    assert done.nonfinite == {f"{UP}.scale": 1}


WEIGHT = UP.removesuffix(".weight")
INT8 = {
    "no scales": (lambda tensors: tensors.pop(SCB), f"missing: {SCB}$"),
    "no codes": (lambda tensors: tensors.pop(UP), f"missing: {UP}$"),
    "a scale short": (
        lambda tensors: tensors.update({SCB: ("F32", (191,), bytes(764))}),
        rf"{SCB} in .* is \[191\], by config.json \[192, 1\]",
    ),
    "scales of 16 bits": (
        lambda tensors: tensors.update({SCB: ("F16", (192,), bytes(384))}),
        f"{SCB} in .* is float16, expected float32",
    ),
    "codes by tiles": (
        lambda tensors: tensors.update({f"{WEIGHT}.weight_format": ("U8", (), b"\2")}),
        rf"{WEIGHT}.weight_format in .* is uint8 \[2\], supported: uint8 \[0\] \(by rows\)",
    ),
    "a layout of another form": (
        lambda tensors: tensors.update({f"{WEIGHT}.weight_format": ("U8", (2,), bytes(2))}),
        rf"{WEIGHT}.weight_format in .* is uint8 \[2\], supported: uint8 \[0\]",
    ),
    "unsigned codes": (
        lambda tensors: tensors.update({UP: ("U8", (192, 128), bytes(24576))}),
        f"{UP}'? .*uint8",
    ),
}


@pytest.mark.parametrize(("edit", "words"), INT8.values(), ids=INT8)
def test_tensors_of_8_bits_that_do_not_fit_are_refused(made, tmp_path, edit, words):
    assert_refused(changed(made["int8"], tmp_path / "changed", edit), tmp_path, words)


CONFIGS = {
    "neither": ({"load_in_4bit": False}, "load_in_4bit and load_in_8bit are both false, supported"),
    "both": ({"load_in_8bit": True}, "load_in_4bit and load_in_8bit are both true, supported: one"),
    "a word": ({"load_in_4bit": "yes"}, "load_in_4bit is 'yes', expected true or false"),
    "an unknown kind": (
        {"bnb_4bit_quant_type": "af4"},
        "bnb_4bit_quant_type 'af4' is not supported; supported: nf4, fp4",
    ),
    "another storage": (
        {"bnb_4bit_quant_storage": "int16"},
        "bnb_4bit_quant_storage is 'int16', supported: 'uint8'",
    ),
    "something more": ({"bits": 3}, "'bits' is not known of bitsandbytes; supported: load_in_4bit"),
    "no list": (
        {"llm_int8_skip_modules": "lm_head"},
        "llm_int8_skip_modules is .*, expected a list",
    ),
    "no pattern": ({"llm_int8_skip_modules": ["*up"]}, "expected a regular expression"),
    "left out": (
        {"llm_int8_skip_modules": ["layers.1.mlp.up_proj"]},
        f"encoded, but left out by quantization_config: {UP}$",
    ),
}


@pytest.mark.parametrize(("config", "words"), CONFIGS.values(), ids=CONFIGS)
def test_configs_of_another_form_are_refused(made, tmp_path, config, words):
    assert_refused(changed(made["nested"], tmp_path / "changed", **config), tmp_path, words)


def test_without_its_config_a_folder_is_told_to_want_it(made, tmp_path):
    for name in ("flat", "int8"):
        folder = changed(made[name], tmp_path / name)
        edit_json(folder / "config.json", quantization_config=None)
        assert_refused(
            folder, tmp_path, "weights quantized by bitsandbytes, in another form than config"
        )


SKIPPED = ("lm_head", "multi_modal_projector", "model.layers.0.self_attn")
# As they are published -> (method, encoding, what is left).
PUBLISHED = {
    "IrfanUruchi/Llama-2-13B-Computer-Engineering-@8a61eb989c9c": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ("bitsandbytes", "nf4", ()),
    ),
    "jeevanchaps/Meta-Llama3.1-8B-Instruct-assessment@3c36ac64c04b": (
        {
            "_load_in_4bit": False,
            "_load_in_8bit": True,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_type": "fp4",
            "llm_int8_threshold": 6.0,
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": None,
        },
        ("bitsandbytes_8bit", "int8_scb", ()),
    ),
    "DocWobble/Orpheus_3B_Quantized@f8992103a23b": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": [*SKIPPED],
        },
        ("bitsandbytes", "nf4", SKIPPED),
    ),
    "without a kind, Transformers' own is fp4": (
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
        ("bitsandbytes", "fp4", ("lm_head",)),
    ),
}


@pytest.mark.parametrize("named", [{"quant_method": "bitsandbytes"}, {}], ids=["named", "unnamed"])
@pytest.mark.parametrize(("config", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_are_read(made, config, expected, named):
    """Early ones do not name their method."""
    raw = json.loads((made["nested"] / "config.json").read_text())
    raw["quantization_config"] = named | config
    assert model_config(raw, where="config.json").quantized == Quantized(*expected)


def test_names_under_a_prefix_are_those_of_the_same_model(made, tmp_path):
    def edit(tensors):
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    folder = changed(made["nested"], tmp_path / "changed", edit)
    stores = Store(folder), Store(made["nested"])
    assert stores[0].quantization == stores[1].quantization
    segments = [store.rows_segment(f"{UP}.scale", first_row=5, n_bytes=8) for store in stores]
    scales = np.empty((2, 2), np.float32)
    for segment, found in zip(segments, scales, strict=True):
        codes = np.fromfile(segment.file, np.uint8)[segment.offset :][:2]
        segment.nested.decode(codes, found, first=segment.first_code)
    np.testing.assert_array_equal(*scales)


def logits(folder, **options):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", **options) as model:
        return model.logits(np.arange(3, 15)[None])


def test_codes_stay_nested_scales_are_decoded_and_both_run_alike(made, tmp_path, monkeypatch):
    monkeypatch.setattr("jlayer.convert.sources.nested.CHUNK_BYTES", 100)
    source = made["nested"]
    convert_checkpoint(source, tmp_path / "layered")
    held, there = read_tensors(tmp_path / "layered"), read_tensors(source)
    assert held[f"{UP}.q"] == ("U8", (192, 64), there[UP][2])
    codes = np.frombuffer(there[f"{UP}.absmax"][2], np.uint8)
    levels, scales = (numbers(there[f"{UP}.nested_{end}"]) for end in ("quant_map", "absmax"))
    expected = levels[codes] * np.repeat(scales, 256)[: len(codes)] + np.float32(0.05)
    np.testing.assert_array_equal(numbers(held[f"{UP}.scale"]), expected.reshape(192, 2))
    assert read_manifest(tmp_path / "layered").quantization.table.encodings == ("nf4",)
    np.testing.assert_array_equal(logits(tmp_path / "layered"), logits(source))
    assert convert_checkpoint(source, tmp_path / "layered").status == "unchanged"
    with pytest.raises(UnsupportedModelError, match=r"as they are published \(nf4\)"):
        convert_checkpoint(source, tmp_path / "int8", quantize="int8")


def with_embedding(name, nested):
    """A function that quantizes the embedding too, as Transformers does not."""

    def edit(tensors):
        table, rng = "model.embed_tokens.weight", np.random.default_rng(5)
        shape = tensors.pop(table)[1]
        if name == "int8":
            parts = {
                table.removesuffix(".weight") + e: t for e, t in eight_bits(shape, rng).items()
            }
        else:
            parts = {table + e: t for e, t in four_bits(shape, rng, nested=nested).items()}
        tensors |= parts

    return edit


@pytest.mark.parametrize("name", ["flat", "int8"])
def test_an_embedding_may_be_quantized_too(made, tmp_path, name):
    folder = changed(made[name], tmp_path / "changed", with_embedding(name, False))
    assert not np.array_equal(logits(folder), logits(made[name]))
    convert_checkpoint(folder, tmp_path / "layered")
    np.testing.assert_array_equal(logits(tmp_path / "layered"), logits(folder))


def test_an_embedding_with_nested_statistics_is_refused(made, tmp_path):
    folder = changed(made["nested"], tmp_path / "changed", with_embedding("nested", True))
    words = "embed_tokens.weight.absmax in .* has nested statistics, which is not supported of an"
    assert_refused(folder, tmp_path, words)


@pytest.mark.parametrize("joins", slow_but([False, True], (True,)))
def test_nested_scales_pass_through_slots_as_others_do(made, tmp_path, monkeypatch, joins):
    """In ranges of rows, from the disk each time; and in one array of bytes, as on a GPU."""
    convert_checkpoint(made["nested"], tmp_path / "layered")
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=joins))
    set_tile_bytes(monkeypatch, 6000)
    expected = logits(tmp_path / "layered")
    np.testing.assert_array_equal(logits(made["nested"], keeps_layers=False), expected)


@pytest.mark.parametrize("first", [0, 1, 255, 256, 70_000])
def test_nested_scales_are_decoded_from_any_number_on(first):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, 100_000, dtype=np.uint8)
    levels, scales = rng.normal(size=256), rng.uniform(size=-(-len(codes) // 256))
    nested = Nested(levels.astype(np.float32), scales.astype(np.float32), np.float32(0.125))
    whole = nested.levels[codes] * np.repeat(nested.scales, 256)[: len(codes)] + nested.offset
    found = np.empty(len(codes) - first, np.float32)
    nested.decode(codes[first:], found, first=first)
    np.testing.assert_array_equal(found, whole[first:])


class Stopped(Progress):
    """Ends a conversion where the second layer would begin."""

    def file(self, name):
        if name == "layer-00001.safetensors":
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_a_conversion_that_deletes_its_source_goes_on(made, tmp_path, name):
    shutil.copytree(made[name], tmp_path / "source")
    given = (tmp_path / "source", tmp_path / "target")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(*given, delete_source=True, progress=Stopped())
    assert convert_checkpoint(*given, delete_source=True).n_resumed == 2
    assert not list((tmp_path / "source").glob("*.safetensors"))
    convert_checkpoint(made[name], tmp_path / "whole")
    files = [read_manifest(tmp_path / target).files for target in ("target", "whole")]
    assert files[0] == files[1]


def test_a_text_is_continued_planned_and_listed_in_place(made, tmp_path, capsys):
    models = tmp_path / "models"
    shutil.copytree(made["nested"], models / "nested")
    shutil.copytree(made["int8"], models / "int8")
    bytes_of_layers = []
    convert_checkpoint(made["nested"], models / "layered")
    for name in ("nested", "layered"):
        given = ["--device", "cpu", "--device-memory", "2GiB", "--context", "64"]
        assert main(["plan", str(models / name), *given, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        bytes_of_layers.append(plan["sweep"]["bytes"])
        assert plan["quantization"]["published"]["model.layers.*.mlp.up_proj.weight"] == "nf4"
        words = ["generate", str(models / name), "--prompt-ids", "5,6,7"]
        assert main([*words, *given, "--max-tokens", "4"]) == 0
        bytes_of_layers.append(capsys.readouterr().out)
    assert bytes_of_layers[:2] == bytes_of_layers[2:]
    assert main(["list", str(models), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert {row["state"] for row in rows} == {"runs"}
    assert {row["quantization"] for row in rows} == {"bitsandbytes"}


def test_a_config_alone_is_planned(made, tmp_path, capsys):
    found = {}
    for name, config in {"4": FOUR_BITS, "8": EIGHT_BITS, "16": None}.items():
        path = tmp_path / f"{name}.json"
        shutil.copy(made["nested"] / "config.json", path)
        edit_json(path, quantization_config=config)
        given = ["--device", "cpu", "--device-memory", "2GiB", "--context", "64", "--json"]
        assert main(["plan", str(path), *given]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert set(found["4"]["quantization"]["published"].values()) == {"nf4"}
    assert set(found["8"]["quantization"]["published"].values()) == {"int8_scb"}
    assert (
        found["4"]["sweep"]["bytes"] < found["8"]["sweep"]["bytes"] < found["16"]["sweep"]["bytes"]
    )
