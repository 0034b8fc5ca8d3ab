"""Experts that are published as one tensor run, and convert, as the same experts one by one."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlayer import AutoModel
from jlayer.checkpoint.layout import read_manifest
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.convert.verify import verify_folder
from jlayer.errors import CheckpointError
from jlayer.families.registry import published_tensors, stacked_tensors
from tests.reference.mixture_forms import save

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

IDS = np.random.default_rng(0).integers(3, 133, (1, 12))
WEIGHTS = "model.safetensors"


def cfg_of(folder):
    return model_config(json.loads((folder / "config.json").read_text()), where="here")


def stacked(cfg, tensors):
    """Tensors with those of all experts in one, as they are published."""
    tensors = dict(tensors)
    for name, stack in stacked_tensors(cfg).items():
        rows = [tensors.pop(part) for part, *_ in stack.parts]
        tensors[name] = np.concatenate(rows).reshape(stack.shape)
    return tensors


def apart(cfg, tensors):
    """Tensors with those of all experts cut into those of each, rows first."""
    tensors = dict(tensors)
    for name, stack in stacked_tensors(cfg).items():
        found = tensors.pop(name)
        found = found.swapaxes(1, 2) if stack.inputs_first else found
        rows = np.ascontiguousarray(found).reshape(-1, found.shape[-1])
        tensors |= {part: rows[first : first + n] for part, first, n in stack.parts}
    return tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with its experts one by one, and in one, under the names of a multimodal one."""
    folder = tmp_path_factory.mktemp("stacked")
    apart, whole = save(folder / "apart", "qwen3_5_moe"), folder / "whole"
    whole.mkdir()
    tensors = stacked(cfg_of(apart), load_file(apart / WEIGHTS))
    assert "model.layers.3.mlp.experts.gate_up_proj" in tensors
    renamed = {
        name.replace("model.", "model.language_model.", 1): tensors[name] for name in tensors
    }
    save_file(renamed, whole / WEIGHTS)
    text = json.loads((apart / "config.json").read_text())
    outer = {"model_type": "qwen3_5_moe", "tie_word_embeddings": False, "text_config": text}
    (whole / "config.json").write_text(json.dumps(outer))
    return apart, whole


def logits(folder):
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        return model.logits(IDS)


def test_they_run_as_they_are_published(folders):
    apart, whole = folders
    np.testing.assert_array_equal(logits(whole), logits(apart))


def digests_of(source, target, scheme):
    convert_checkpoint(source, target, quantize=scheme)
    assert verify_folder(target).findings == ()
    files = read_manifest(target).files
    return {name: entry.digests for name, entry in files.items() if entry.digests}


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_they_convert_to_the_same_bytes(folders, tmp_path, scheme):
    found = [digests_of(each, tmp_path / str(n), scheme) for n, each in enumerate(folders)]
    assert found[0] == found[1]
    assert any(".experts.8.up_proj" in name for table in found[0].values() for name in table)


@pytest.mark.parametrize("name", ["granitemoe", "gemma4", "llama4"])
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_so_do_those_that_are_published_in_no_other_way(tmp_path, name, scheme):
    """A tensor of a Gemma ends in `.scale`, as what a quantized one is stored in does; of a Llama 4
    the inputs of an expert come first."""
    whole = save(tmp_path / "whole", name)
    tensors = apart(cfg_of(whole), load_file(whole / WEIGHTS))
    folders = whole, written(tmp_path / "apart", whole, tensors)
    found = [digests_of(each, tmp_path / f"{each.name}-layered", scheme) for each in folders]
    assert found[0] == found[1]


def test_a_pickle_may_hold_them_too(folders, tmp_path):
    apart, whole = folders
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(whole / "config.json", pickled)
    tensors = {name: torch.from_numpy(array) for name, array in load_file(whole / WEIGHTS).items()}
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(0, 2).contiguous().transpose(0, 2)  # strides
    torch.save(tensors, pickled / "pytorch_model.bin")
    convert_checkpoint(pickled, tmp_path / "layered")
    np.testing.assert_array_equal(logits(tmp_path / "layered"), logits(apart))


def written(folder, source, tensors):
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refusal(folder, tmp_path):
    """What is told where it is run and where it is converted, which is the same."""
    with pytest.raises(CheckpointError) as running:
        AutoModel.from_pretrained(folder, device="cpu")
    with pytest.raises(CheckpointError) as converting:
        convert_checkpoint(folder, tmp_path / "never")
    message = str(running.value)
    assert message.replace(" (jlayer convert --allow-extra leaves them out)", "") == str(
        converting.value
    ).replace(" (see --allow-extra)", "")
    return message


def test_another_shape_is_told(folders, tmp_path):
    tensors = load_file(folders[1] / WEIGHTS)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    found = refusal(written(tmp_path / "turned", folders[1], tensors), tmp_path)
    assert "layers.0.mlp.experts.gate_up_proj is [9, 24, 28], by config.json [9, 28, 24]" in found


def test_an_expert_that_is_there_twice_is_told(folders, tmp_path):
    apart, _ = folders
    both = {**load_file(apart / WEIGHTS), **stacked(cfg_of(apart), load_file(apart / WEIGHTS))}
    found = refusal(written(tmp_path / "both", apart, both), tmp_path)
    assert "is there by itself and in one of all experts" in found


def test_of_many_that_are_missing_few_are_named(folders, tmp_path):
    apart, _ = folders
    kept = {
        name: array
        for name, array in load_file(apart / WEIGHTS).items()
        if ".experts." not in name and name != "model.norm.weight"
    }
    found = refusal(written(tmp_path / "without", apart, kept), tmp_path)
    n_missing = sum(".experts." in name for name in published_tensors(cfg_of(apart)))
    assert "missing: model.layers.0.mlp.experts.0.gate_proj.weight, " in found
    assert "model.norm.weight" in found
    assert f"and {n_missing - 3} more of single experts" in found
    assert found.count(".experts.") == 3


def test_what_it_reads_either_way_is_exported_one_by_one(folders, tmp_path):
    apart, whole = folders
    convert_checkpoint(whole, tmp_path / "layered")
    export_checkpoint(tmp_path / "layered", tmp_path / "exported", format="huggingface")
    found, expected = load_file(tmp_path / "exported" / WEIGHTS), load_file(apart / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
