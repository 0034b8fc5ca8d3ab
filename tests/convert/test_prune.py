"""Layers that are left out of a conversion: the others are as they were, under new numbers; killed
anywhere, it resumes; and what cannot be renumbered is refused."""

import json

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.layout import CONFIG, PRUNED, read_manifest
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.pruning import check_to_prune, pruning_there
from jlayer.convert.transform.pruned import Pruning
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.fewer import config_with_fewer
from tests import gguf_files
from tests.campaigns import slow_but
from tests.convert import quantized_kinds
from tests.convert.checkpoints import (
    edit_json,
    edit_tensors,
    files_of,
    random_checkpoint,
    read_tensors,
)
from tests.convert.kills import killed
from tests.convert.test_resume import cut_off
from tests.gguf import forms
from tests.programs import few_shapes
from tests.tiny import TINY

IDS = np.random.default_rng(0).integers(3, 16, (1, 12))


def left_out(*layers, n_layers=3):
    return Pruning(n_layers, layers, {"drop_layers": len(layers)}, {"influence": [0.5, 0.1, 0.9]})


@pytest.fixture
def shapes():
    with few_shapes():
        yield


def number_in(name, numbers):
    """A tensor's name with another number of its layer; None where that has none."""
    lead, _, rest = name.partition("model.layers.")
    if not rest:
        return name
    number, _, leaf = rest.partition(".")
    new = numbers.get(int(number))
    return None if new is None else f"{lead}model.layers.{new}.{leaf}"


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_the_others_have_their_bytes_under_new_numbers(published, tmp_path, options):
    convert_checkpoint(published("sharded"), tmp_path / "whole", **options)
    done = convert_checkpoint(
        published("sharded"), tmp_path / "pruned", prune=left_out(1), **options
    )
    whole, pruned = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "pruned")
    renamed = {number_in(name, {0: 0, 2: 1}): value for name, value in whole.items()}
    assert pruned == {name: value for name, value in renamed.items() if name is not None}
    assert done.n_layers == 2
    assert json.loads((tmp_path / "pruned" / CONFIG).read_text())["num_hidden_layers"] == 2
    assert json.loads((tmp_path / "pruned" / PRUNED).read_text())["pruned"][0]["dropped"] == [1]
    assert verify_folder(tmp_path / "pruned").findings == ()


def test_a_pruned_folder_is_pruned_again(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "one", prune=left_out(0))
    convert_checkpoint(tmp_path / "one", tmp_path / "two", prune=left_out(1, n_layers=2))
    convert_checkpoint(published("single"), tmp_path / "both", prune=left_out(0, 2))
    assert read_tensors(tmp_path / "two") == read_tensors(tmp_path / "both")
    found = json.loads((tmp_path / "two" / PRUNED).read_text())["pruned"]
    assert [(one["n_layers"], one["dropped"]) for one in found] == [(3, [0]), (2, [1])]


@pytest.mark.parametrize("n_last", slow_but([8, 1000], [8]))
def test_a_pruning_that_is_killed_anywhere_resumes_to_the_same_bytes(tmp_path, n_last):
    source = random_checkpoint(tmp_path / "source", n_shards=1, num_hidden_layers=2)
    convert_checkpoint(source, tmp_path / "whole", prune=Pruning(2, (0,), {}, {}))
    states = killed("prune 0/2", source, tmp_path / "whole", n_last=n_last)
    assert set(states) == {"none", "new"}


def test_it_resumes_with_the_same_layers_alone(copy_of, tmp_path):
    source, target = copy_of("single"), tmp_path / "target"
    assert pruning_there(target) is None
    cut_off(source, target, after="layer-00000.safetensors", prune=left_out(1))
    before = files_of(target)
    for prune, said in ((left_out(0), "0"), (left_out(0, 2), "0, 2"), (None, "none")):
        with pytest.raises(UsageError, match=f"began with layers left out 1, not {said}; "):
            convert_checkpoint(source, target, prune=prune)
    assert files_of(target) == before
    assert pruning_there(target) == left_out(1)
    assert convert_checkpoint(source, target, prune=pruning_there(target)).n_resumed == 2
    convert_checkpoint(source, tmp_path / "undisturbed", prune=left_out(1))
    assert files_of(target) == files_of(tmp_path / "undisturbed")
    assert pruning_there(target) == left_out(1)
    assert convert_checkpoint(source, target, prune=left_out(1)).status == "unchanged"
    with pytest.raises(UsageError, match="another"):
        convert_checkpoint(source, target, prune=left_out(0))


def test_a_whole_model_in_the_target_is_left_alone(published, copy_of, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "whole")
    begun = cut_off(copy_of("single"), tmp_path / "begun")
    for target in (tmp_path / "whole", begun):
        with pytest.raises(UsageError, match="a conversion of a model with all its layers"):
            pruning_there(target)


@pytest.mark.parametrize("kind", slow_but(quantized_kinds.IN_PLACE, ["symmetric"]))
def test_what_is_published_encoded_stays_so(shapes, monkeypatch, tmp_path, kind):
    monkeypatch.setitem(quantized_kinds.SIZES, "num_hidden_layers", 3)
    quantized_kinds.write(tmp_path / "source", kind)
    convert_checkpoint(tmp_path / "source", tmp_path / "whole")
    convert_checkpoint(tmp_path / "source", tmp_path / "pruned", prune=left_out(1))
    whole, pruned = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "pruned")
    renamed = {number_in(name, {0: 0, 2: 1}): value for name, value in whole.items()}
    assert pruned == {name: value for name, value in renamed.items() if name is not None}
    found = []
    for folder, without in ((tmp_path / "source", (1,)), (tmp_path / "pruned", ())):
        with AutoModel.from_pretrained(folder, device="cpu", without_layers=without) as model:
            found.append(model.logits(IDS))
    np.testing.assert_array_equal(*found)


def test_a_gguf_file_is_pruned(shapes, tmp_path):
    source = forms.save("llama", tmp_path / "source")
    path = tmp_path / "model.gguf"
    gguf_files.write(source, path, kind="Q8_0")
    n_layers = json.loads((source / CONFIG).read_text())["num_hidden_layers"]
    convert_checkpoint(path, tmp_path / "pruned", prune=left_out(0, n_layers=n_layers))
    found = []
    for folder, without in ((path, (0,)), (tmp_path / "pruned", ())):
        with AutoModel.from_pretrained(folder, device="cpu", without_layers=without) as model:
            found.append(model.logits(IDS))
    np.testing.assert_array_equal(*found)


# Refused.


@pytest.mark.parametrize(
    ("dropped", "n_layers"),
    [((), 3), ((0, 1, 2), 3), ((1, 0), 3), ((1, 1), 3), ((3,), 3), ((0,), 4)],
)
def test_layers_that_are_not_there_are_refused(published, tmp_path, dropped, n_layers):
    with pytest.raises(UsageError, match=r"layers to leave out|has 3 layers"):
        convert_checkpoint(
            published("single"), tmp_path / "out", prune=left_out(*dropped, n_layers=n_layers)
        )
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_deleted(published, tmp_path):
    with pytest.raises(UsageError, match="delete_source and prune"):
        convert_checkpoint(
            published("single"), tmp_path / "out", prune=left_out(0), delete_source=True
        )


@pytest.mark.parametrize(("key", "value"), [("attn_layers", [0, 2]), ("per_layer_scale", {"0": 1})])
def test_a_list_of_layers_that_nobody_knows_is_refused_by_name(copy_of, tmp_path, key, value):
    source = copy_of("single")
    edit_json(source / CONFIG, **{key: value})
    for call in (
        lambda: check_to_prune(source, str(tmp_path / "out"), n_dropped=1),
        lambda: convert_checkpoint(source, tmp_path / "out", prune=left_out(0)),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{key} is .* cannot be renumbered"):
            call()


@pytest.mark.parametrize(
    ("n_dropped", "keep", "said"),
    [
        (0, (), "from 1 to 2"),
        (3, (), "has 3 layers; expected from 1 to 2"),
        (2, (0, 1), "2 of which --keep keeps; expected from 1 to 1"),
        (1, (3,), "--keep: found 3, expected numbers of the layers"),
    ],
)
def test_numbers_of_layers_are_checked_before_anything_is_measured(
    published, tmp_path, n_dropped, keep, said
):
    with pytest.raises(UsageError, match=said):
        check_to_prune(published("single"), str(tmp_path / "out"), n_dropped=n_dropped, keep=keep)


def test_what_is_quantized_already_is_refused_at_the_door(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "int8", quantize="int8")
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        check_to_prune(tmp_path / "int8", str(tmp_path / "out"), n_dropped=1)
    assert check_to_prune(published("single"), str(tmp_path / "out"), n_dropped=1).n_layers == 3


def test_a_damaged_note_of_what_was_left_out_is_refused(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "out", prune=left_out(0))
    edit_json(tmp_path / "out" / PRUNED, pruned=[left_out(7).as_dict()])
    with pytest.raises(CheckpointError, match="is damaged"):
        pruning_there(tmp_path / "out")


def test_a_message_names_the_tensor_as_it_is_there(copy_of, tmp_path):
    source, name = copy_of("single"), "model.layers.2.mlp.up_proj.weight"

    def spoil(tensors):
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, np.float32(np.nan).tobytes() + data[4:])

    edit_tensors(source / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=rf"\({name} there\): tensor .*layers\.1\.mlp"):
        convert_checkpoint(source, tmp_path / "out", prune=left_out(0))


# A config's own words.


def written(raw, *dropped):
    def read(raw):
        return model_config(raw, where=CONFIG)

    return config_with_fewer(raw, read(raw), dropped, read=read, where=CONFIG)


def test_names_of_modules_follow_their_layers():
    said = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.0.mlp", "model.layers.2.mlp.up_proj", "lm_head"],
    }
    raw = {**TINY, "model_type": "llama", "quantization_config": said}
    found = written(raw, 1)["quantization_config"]["modules_to_not_convert"]
    assert found == ["model.layers.0.mlp", "model.layers.1.mlp.up_proj", "lm_head"]
    found = written(raw, 0)["quantization_config"]["modules_to_not_convert"]
    assert found == ["model.layers.1.mlp.up_proj", "lm_head"]
    said["modules_to_not_convert"] = ["re:.*layers.[01].mlp.*"]
    with pytest.raises(UnsupportedModelError, match="names layers by number"):
        written(raw, 1)


def test_a_pattern_is_written_out():
    raw = {**TINY, "model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window": 6}
    slides, full = "sliding_attention", "full_attention"
    assert written(raw, 0)["layer_types"] == [*[slides] * 4, full, *[slides] * 2]
    assert "layer_types" not in written(raw | {"num_hidden_layers": 4}, 0)
    assert "layer_types" not in written({**TINY, "model_type": "llama"}, 0)


def test_the_manifest_tells_the_encodings_of_those_that_are_left(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "out", prune=left_out(0), quantize="int4")
    assert read_manifest(tmp_path / "out").quantization.scheme == "int4"
    with AutoModel.from_pretrained(tmp_path / "out", device="cpu") as model:
        assert np.isfinite(model.logits(IDS)).all()
