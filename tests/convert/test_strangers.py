"""Tensors and patterns beside those of a published form: what a fuzzer found to be taken for what
they are not."""

import json

import pytest

from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.errors import CheckpointError, JlayerError, UnsupportedModelError
from tests.convert.checkpoints import edit_json, tensors_of, write_tensors
from tests.convert.quantized_kinds import CONFIG, SINGLE, write


def folder_of(kind, tmp_path, **added):
    """A folder of a kind, with further tensors (None: without them)."""
    folder = tmp_path / "source"
    write(folder, kind)
    tensors = tensors_of(folder / SINGLE) | added
    write_tensors(folder / SINGLE, {name: one for name, one in tensors.items() if one is not None})
    return folder


LAYER = "model.layers.0."


@pytest.mark.parametrize(
    "one", [("U8", (7, 64, 3, 16), bytes(7 * 64 * 3 * 16)), ("F32", (1,), bytes(4))]
)
def test_a_piece_that_the_encoding_of_experts_does_not_have(tmp_path, one):
    stranger = f"{LAYER}mlp.experts.down_proj.zero"
    folder = folder_of("gpt-oss", tmp_path, **{stranger: one})
    for attempt in (Store, lambda folder: convert_checkpoint(folder, tmp_path / "out")):
        with pytest.raises(JlayerError, match=stranger):
            attempt(folder)


def test_a_name_of_ours_among_published_ones(tmp_path):
    """A converted folder names a piece so; in words, as here, it would be read as bytes."""
    published, own = f"{LAYER}self_attn.q_proj.weight_zero_point", f"{LAYER}self_attn.q_proj.weight"
    write(tmp_path / "whole", "packed")
    zeros = tensors_of(tmp_path / "whole" / SINGLE)[published]
    folder = folder_of("packed", tmp_path, **{published: None, f"{own}.zero": zeros})
    with pytest.raises(CheckpointError, match=rf"zero is no tensor of .*, expected {published}"):
        convert_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "key"), [("eetq", "modules_to_not_convert"), ("hqq", "skip_modules")]
)
def test_a_pattern_that_is_none(tmp_path, kind, key):
    folder = folder_of(kind, tmp_path)
    said = json.loads((folder / CONFIG).read_text())["quantization_config"]
    edit_json(folder / CONFIG, quantization_config={**said, key: ["re:("]})
    with pytest.raises(CheckpointError, match=f"{key} has 're:\\('.*expected a regular expression"):
        convert_checkpoint(folder, tmp_path / "out")


def test_numbers_of_half_a_byte_beside_the_weights(tmp_path):
    """As many bytes are kept as there are, and no export takes them for something else."""
    shape = f"{LAYER}self_attn.o_proj.weight_shape"
    folder = folder_of("mxfp4", tmp_path, **{shape: ("F4", (32,), bytes(range(16)))})
    convert_checkpoint(folder, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="float4_e2m1fn"):
        export_checkpoint(tmp_path / "out", tmp_path / "back", format="huggingface")
