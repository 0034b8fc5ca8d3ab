"""Experts published in MXFP4: conversion keeps their bytes whatever becomes of the rest, and what
is wrong with such a folder is told."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.layout import read_manifest
from jlayer.convert import convert_checkpoint
from jlayer.convert.progress import Progress
from jlayer.convert.target.seal import seal_folder
from jlayer.convert.verify import verify_folder
from jlayer.encodings.tables import E8M0_NAN
from jlayer.errors import CheckpointError
from tests.reference.gpt_oss_forms import MXFP4, drawn, write

IDS = np.random.default_rng(0).integers(3, 133, (1, 12))
EXPERTS = "model.layers.1.mlp.experts."
TABLE = {
    f"model.layers.*.mlp.experts.*.{name}.weight": "mxfp4" for name in ("down_proj", "gate_up_proj")
}
BLOCKS, SCALES = EXPERTS + "gate_up_proj_blocks", EXPERTS + "gate_up_proj_scales"


@pytest.fixture(scope="module")
def made():
    """(the config, the published tensors)."""
    return drawn(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


@pytest.fixture(scope="module")
def source(made, tmp_path_factory):
    return write(tmp_path_factory.mktemp("mxfp4") / "published", *made)


@pytest.fixture(scope="module")
def layered(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("mxfp4") / "layered"
    convert_checkpoint(source, target)
    return target


def digests_of_experts(folder):
    files = read_manifest(folder).files
    return {
        name: digest
        for entry in files.values()
        for name, digest in entry.digests.items()
        if ".experts." in name
    }


def logits(folder):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        return model.logits(IDS)


@pytest.mark.parametrize(
    "options",
    [{"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "bfloat16"}],
    ids=["int8", "int4", "bfloat16"],
)
def test_the_codes_of_experts_stay_whatever_becomes_of_the_rest(layered, source, options, tmp_path):
    done = convert_checkpoint(source, tmp_path / "other", **options)
    assert verify_folder(tmp_path / "other").findings == ()
    codes = [
        {name: digest for name, digest in digests_of_experts(folder).items() if ".weight." in name}
        for folder in (layered, tmp_path / "other")
    ]
    assert codes[0] == codes[1]
    assert len(codes[0]) == 2 * 7 * 2 * 2  # layers, experts, matrices, pieces
    assert done.quantization["published"] == TABLE
    assert done.quantization["scheme"] == options.get("quantize")
    assert (done.block_bits is None) == ("quantize" not in options)
    again = convert_checkpoint(source, tmp_path / "other", **options)
    assert again.status == "unchanged"


def test_a_quantized_rest_runs_beside_them(made, source, tmp_path):
    """As with what the others stand for as plain numbers."""
    from jlayer.convert.transform.packed import dequantize

    config, tensors = made
    convert_checkpoint(source, tmp_path / "int8", quantize="int8")
    choice = read_manifest(tmp_path / "int8").quantization
    stored = {}
    for path in (tmp_path / "int8").glob("*.safetensors"):
        stored |= load_file(path)
    plain = {
        name: dequantize(
            choice.scheme_of(name, array.shape),
            stored[f"{name}.q"],
            stored[f"{name}.scale"].astype(np.float32),
            width=array.shape[1],
        )
        if f"{name}.q" in stored
        else array
        for name, array in tensors.items()
    }
    assert sum(not np.array_equal(plain[name], tensors[name]) for name in plain) == 2 + 2 * 4
    found, expected = logits(tmp_path / "int8"), logits(write(tmp_path / "plain", config, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_converted_folder_converts_again_to_the_same(layered, tmp_path):
    """It is a published folder too, with experts one by one."""
    convert_checkpoint(layered, tmp_path / "again")
    assert digests_of_experts(tmp_path / "again") == digests_of_experts(layered)


def test_the_source_may_go_as_it_is_converted(source, layered, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    done = convert_checkpoint(tmp_path / "source", tmp_path / "target", delete_source=True)
    assert done.removed == ("model.safetensors",)
    assert digests_of_experts(tmp_path / "target") == digests_of_experts(layered)


class Stopped(Progress):
    """Ends a conversion where the second layer would begin."""

    def file(self, name):
        if name == "layer-00001.safetensors":
            raise KeyboardInterrupt


def test_a_conversion_that_was_stopped_goes_on(source, layered, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", progress=Stopped())
    done = convert_checkpoint(source, tmp_path / "target")
    assert done.n_resumed == 2  # the embedding, the first layer
    assert digests_of_experts(tmp_path / "target") == digests_of_experts(layered)


def test_a_new_side_file_is_taken_in(layered, tmp_path):
    shutil.copytree(layered, tmp_path / "sealed")
    (tmp_path / "sealed" / "chat_template.jinja").write_text("{{ messages }}")
    assert seal_folder(tmp_path / "sealed").status == "sealed"
    assert verify_folder(tmp_path / "sealed").findings == ()


def test_a_damaged_code_is_found(layered, tmp_path):
    shutil.copytree(layered, tmp_path / "damaged")
    path = tmp_path / "damaged" / "layer-00001.safetensors"
    entry = read_manifest(layered).files[path.name].tensors[EXPERTS + "3.gate_up_proj.weight.q"]
    data = bytearray(path.read_bytes())
    data[entry.offset + 5] ^= 1
    path.write_bytes(data)
    assert any(path.name in line for line in verify_folder(tmp_path / "damaged").findings)


def test_plan_and_list_tell_of_them(source, layered, capsys):
    for folder in (source, layered):
        given = ["--device-memory", "2GiB", "--device", "cpu", "--context", "64"]
        assert main(["plan", str(folder), *given, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["fits"]
        assert plan["quantization"]["published"] == TABLE
        assert main(["list", str(folder.parent), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["models"]
        assert (row["state"], row["quantization"]) == ("runs", "mxfp4")


def with_tensor(made, name, change):
    config, tensors = made
    return config, {**tensors, name: change(tensors[name])}


def test_a_scale_that_is_no_number_is_kept_only_if_asked_for(made, tmp_path):
    def change(scales):
        scales = scales.copy()
        scales[3, 5, 1] = E8M0_NAN
        return scales

    folder = write(tmp_path / "source", *with_tensor(made, SCALES, change))
    with pytest.raises(CheckpointError, match=r"experts.3.gate_up_proj.weight.scale: NaN .*: 1,"):
        convert_checkpoint(folder, tmp_path / "refused")
    done = convert_checkpoint(folder, tmp_path / "kept", allow_nonfinite=True)
    assert done.nonfinite == {EXPERTS + "3.gate_up_proj.weight.scale": 1}


WRONG_TENSORS = {
    "a block short": (BLOCKS, lambda a: a[:, :, :1], r"_blocks is \[7, 192, 1, 16\], .* 192, 2,"),
    "an expert more": (SCALES, lambda a: a[[*range(7), 0]], r"_scales is \[8, 192, 2\]"),
    "signed": (BLOCKS, lambda a: a.view(np.int8), r"_blocks in .* is int8, expected uint8"),
    "floats": (SCALES, lambda a: a.astype(np.float32), r"_scales in .* float32, expected uint8"),
    "a bias short": (
        EXPERTS + "down_proj_bias",
        lambda a: a[:, :60],
        r"_bias is \[7, 60\], .* \[7, 64\]: experts, rows$",
    ),
}


@pytest.mark.parametrize(("name", "change", "said"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_of_another_form_are_refused(made, tmp_path, name, change, said):
    folder = write(tmp_path / "source", *with_tensor(made, name, change))
    for attempt in (
        lambda: AutoModel.from_pretrained(folder, device="cpu"),
        lambda: convert_checkpoint(folder, tmp_path / "target"),
    ):
        with pytest.raises(CheckpointError, match=said):
            attempt()


def test_missing_scales_are_named(made, tmp_path):
    config, tensors = made
    folder = write(tmp_path, config, {n: a for n, a in tensors.items() if n != SCALES})
    with pytest.raises(CheckpointError, match=rf"{re.escape(f'{tmp_path}: missing: {SCALES}')}$"):
        AutoModel.from_pretrained(folder, device="cpu")


def said(**more):
    return {"quantization_config": {**MXFP4, **more}}


WRONG_CONFIGS = {
    "nothing said": ({"quantization_config": None}, "weights quantized by mxfp4 are not supported"),
    "another method": (said(quant_method="fp8"), "weights quantized by fp8 are not supported"),
    "something more": (said(block_size=16), "'block_size' is not known of mxfp4"),
    "some experts": (
        said(modules_to_not_convert=["model.layers.0.mlp.experts"]),
        "names 'model.layers.0.mlp.experts', supported: modules that are no experts",
    ),
    "no list": (said(modules_to_not_convert="lm_head"), "expected a list of names"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
    "half a block": ({"intermediate_size": 80}, "intermediate_size is 80, expected a multiple of"),
    "no limit": ({"swiglu_limit": 0}, "swiglu_limit is 0, expected a positive number"),
    "of another family": ({"model_type": "mixtral"}, "quantized by mxfp4 are not supported"),
}


@pytest.mark.parametrize(("change", "words"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_configs_of_another_form_are_refused(source, tmp_path, change, words):
    shutil.copytree(source, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text()) | change
    if config["model_type"] != "gpt_oss":
        config["architectures"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        AutoModel.from_pretrained(tmp_path / "changed", device="cpu")
    assert "\n" not in str(caught.value)
