"""Folders in FP8: what is wrong with one is told with its place, and its codes stay as they are."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.layout import read_manifest
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.progress import Progress
from jlayer.errors import CheckpointError, UnsupportedModelError
from tests.convert.refused import assert_refused
from tests.reference.fp8_forms import GRID, compressed, save

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
UP = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{UP}_scale_inv"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("fp8"), "qwen3", "grid")[0]


def changed(source, folder, tensors=None, config=None):
    """A copy with other tensors (None: without them), or other keys of its config."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    held = load_file(path) | (tensors or {})
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return folder


def with_byte(tensor, value):
    raw = tensor.clone().view(torch.uint8)
    raw[7, 130] = value
    return raw.view(torch.float8_e4m3fn)


def test_a_code_or_scale_that_is_no_number_is_refused_with_its_place(source, tmp_path):
    held = load_file(source / "model.safetensors")
    infinite = held[SCALE].clone()
    infinite[1, 1] = float("inf")
    for name, tensor in {UP: with_byte(held[UP], 255), SCALE: infinite}.items():
        piece = f"{UP}.q" if name == UP else f"{UP}.scale"
        folder = changed(source, tmp_path / piece, {name: tensor})
        with pytest.raises(CheckpointError, match=rf"tensor {piece}: NaN or infinite numbers: 1,"):
            convert_checkpoint(folder, tmp_path / f"{piece}-refused")
        done = convert_checkpoint(folder, tmp_path / f"{piece}-kept", allow_nonfinite=True)
        assert done.nonfinite == {piece: 1}


def test_its_codes_stay_and_no_scheme_is_put_over_them(source, tmp_path):
    convert_checkpoint(source, tmp_path / "layered", dtype="bfloat16")
    made, held = {}, load_file(source / "model.safetensors")
    for path in (tmp_path / "layered").glob("*.safetensors"):
        made |= load_file(path)
    assert torch.equal(made[f"{UP}.q"].view(torch.uint8), held[UP].view(torch.uint8))
    assert torch.equal(made[f"{UP}.scale"], held[SCALE])
    assert made["model.norm.weight"].dtype == torch.bfloat16
    table = read_manifest(tmp_path / "layered").quantization.table
    assert table.as_dict()["model.layers.*.mlp.up_proj.weight"] == "fp8_128x128"
    assert convert_checkpoint(source, tmp_path / "layered", dtype="bfloat16").status == "unchanged"
    with pytest.raises(UnsupportedModelError, match=r"as they are published \(fp8_128x128\)"):
        convert_checkpoint(source, tmp_path / "int8", quantize="int8")


class Stopped(Progress):
    """Ends a conversion where the second layer would begin."""

    def file(self, name):
        if name == "layer-00001.safetensors":
            raise KeyboardInterrupt


def test_a_conversion_that_deletes_its_source_goes_on(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    given = (tmp_path / "source", tmp_path / "target")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(*given, delete_source=True, progress=Stopped())
    assert convert_checkpoint(*given, delete_source=True).n_resumed == 2
    convert_checkpoint(source, tmp_path / "whole")
    files = [read_manifest(tmp_path / name).files for name in ("target", "whole")]
    assert files[0] == files[1]


def test_scales_of_inputs_are_left_out_with_a_note(tmp_path):
    folder, _ = save(tmp_path, "qwen3", "tensor")
    notes = Store(folder).notes
    assert any("left out 14 tensors that are no weights, by fp8 (scales of" in n for n in notes)
    assert any("asks for the inputs of matrices to be quantized as well" in n for n in notes)


def test_matrices_that_are_plain_all_the_same_are_noted(source, tmp_path):
    plain = load_file(source.parent / "plain" / "model.safetensors")
    tensors = {name: tensor for name, tensor in plain.items() if name.startswith("model.layers.0")}
    scales = dict.fromkeys(f"{name}_scale_inv" for name in tensors if "proj" in name)
    folder = changed(source, tmp_path / "mixed", tensors | scales)
    (note,) = (note for note in Store(folder).notes if "plain numbers here" in note)
    assert "says that 7 matrices are encoded" in note
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        found = model.logits(np.arange(3, 15)[None])
    with AutoModel.from_pretrained(source, device="cpu", dtype="float32") as model:
        expected = model.logits(np.arange(3, 15)[None])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def said(**changes):
    return {"quantization_config": {**GRID, **changes}}


def grouped(**changes):
    config = compressed("channel")
    config["config_groups"]["group_0"]["weights"] |= changes
    return {"quantization_config": config}


WRONG_CONFIGS = {
    "another block": (said(weight_block_size=[64, 64]), r"weight_block_size is \[64, 64\], supp"),
    "another form": (said(fmt="e5m2"), "fmt is 'e5m2', supported: 'e4m3'"),
    "experts in fp4": (said(expert_dtype="fp4"), "expert_dtype is 'fp4'"),
    "a table": (said(modules_to_convert=["model.embed_tokens"]), "modules_to_convert is"),
    "something more": (said(rotation=1), "'rotation' is not known of fp8; supported: activation_"),
    "no list": (said(modules_to_not_convert="lm_head"), "expected a list of names"),
    "a pattern that takes for ever": (
        said(ignored_layers=["(a*)*b"]),
        r"ignored_layers has the expression '\(a\*\)\*b', supported: up to 200",
    ),
    "no pattern": (said(ignored_layers=["*up_proj"]), "expected a regular expression"),
    "left out": (said(modules_to_not_convert=["model.layers.1.mlp"]), f"left out by .*: .*{UP}"),
    "another format": (
        {"quantization_config": {**compressed("channel"), "format": "marlin-24"}},
        "format 'marlin-24' is not supported; supported: float-quantized, int",
    ),
    "not symmetric": (grouped(symmetric=False), "symmetric is False, supported: True"),
    "four bits": (grouped(num_bits=4), "num_bits is 4, supported: 8"),
    "another strategy": (grouped(strategy="group"), "strategy 'group' is not supported"),
    "another block structure": (
        grouped(strategy="block", block_structure=[64, 64]),
        r"block_structure is \[64, 64\]",
    ),
    "sparse": (
        {"quantization_config": {**compressed("tensor"), "sparsity_config": {"format": "2:4"}}},
        "format is '2:4', supported: 'dense'",
    ),
    "turned": (
        {
            "quantization_config": {
                **compressed("tensor"),
                "transform_config": {"config_groups": {"R1": {}}},
            }
        },
        "transform_config turns the inputs",
    ),
    "no groups": (
        {"quantization_config": {**compressed("tensor"), "config_groups": None}},
        "config_groups is missing",
    ),
    "nothing said": ({"quantization_config": None}, "weights quantized by fp8, in another form"),
}


@pytest.mark.parametrize(("change", "words"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_configs_of_another_form_are_refused(source, tmp_path, change, words):
    folder = changed(source, tmp_path / "changed", config=change)
    assert_refused(folder, tmp_path, words)


WRONG_TENSORS = {
    "no scale": ({SCALE: None}, f"missing: {SCALE}$"),
    "no codes": ({UP: None}, f"missing: {UP}$"),
    "a scale short": (
        {SCALE: torch.ones(2, 2)},
        rf"{SCALE} in .* is \[2, 2\], by config.json \[3, 2\]",
    ),
    "integers as scales": (
        {SCALE: torch.ones(3, 2, dtype=torch.int8)},
        rf"{SCALE} in model.safetensors is int8, expected float",
    ),
    "a vector": (
        {
            "model.layers.1.input_layernorm.weight": torch.ones(160).to(torch.float8_e4m3fn),
            "model.layers.1.input_layernorm.weight_scale_inv": torch.ones(1),
        },
        "model.layers.1.input_layernorm.weight'? .*float8_e4m3fn",
    ),
    "both forms": ({f"{UP}.q": torch.ones(2)}, f"tensor {UP}.q is there twice"),
}


@pytest.mark.parametrize(("tensors", "words"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_of_another_form_are_refused(source, tmp_path, tensors, words):
    folder = changed(source, tmp_path / "changed", tensors)
    for attempt in (
        lambda: Store(folder),
        lambda: convert_checkpoint(folder, tmp_path / "target"),
    ):
        with pytest.raises(CheckpointError, match=words):
            attempt()


def test_plan_and_list_tell_of_it(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "models" / "fp8")
    convert_checkpoint(source, tmp_path / "models" / "layered")
    bytes_of_layers = []
    for name in ("fp8", "layered"):
        given = ["--device-memory", "2GiB", "--device", "cpu", "--context", "64", "--json"]
        assert main(["plan", str(tmp_path / "models" / name), *given]) == 0
        plan = json.loads(capsys.readouterr().out)
        bytes_of_layers.append(plan["sweep"]["bytes"])
        assert "fp8_128x128" in plan["quantization"]["published"].values()
    assert bytes_of_layers[0] == bytes_of_layers[1]
    assert main(["list", str(tmp_path / "models"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [(row["state"], row["quantization"]) for row in rows] == [("runs", "fp8")] * 2


# What AutoRound 0.16.1 writes for its scheme FP8_BLOCK, beside GRID.
OF_AUTO_ROUND = {
    "autoround_version": "0.16.1",
    "bits": 8,
    "data_type": "fp",
    "group_size": [128, 128],
    "sym": True,
    "act_bits": 8,
    "act_data_type": "fp",
    "act_dynamic": True,
    "act_group_size": 128,
    "act_sym": True,
    "block_name_to_quantize": "model.layers",
    "enable_quanted_input": False,
}


def test_what_autoround_says_of_its_work_is_no_matter(source, tmp_path):
    said = {"quantization_config": {**GRID, **OF_AUTO_ROUND}}
    assert Store(changed(source, tmp_path / "said", config=said)).form_of(UP) == "fp8_128x128"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"bits": 4}, "bits is 4, supported: 8"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp', supported: 'fp'"),
        ({"sym": False}, "sym is False"),
        ({"rotation_configs": [{}]}, "'rotation_configs' is not known of fp8"),
        ({"extra_config": {"lm_head": {"bits": 4}}}, "'extra_config' is not known of fp8"),
        ({"autoround_version": None}, "'act_bits' is not known of fp8"),
    ],
)
def test_settings_of_autoround_that_would_matter(source, tmp_path, more, words):
    said = {"quantization_config": {**GRID, **OF_AUTO_ROUND, **more}}
    if more == {"autoround_version": None}:
        del said["quantization_config"]["autoround_version"]
    with pytest.raises(UnsupportedModelError, match=words):
        Store(changed(source, tmp_path / "said", config=said))
