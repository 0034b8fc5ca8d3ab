"""Tensors and patterns beside those of a published form: what a fuzzer found to be taken for what
they are not."""

import json

import pytest

from jlayer.checkpoint.encoded import form_of
from jlayer.checkpoint.source import read_published_config
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.encodings.registry import piece_name, split_piece
from jlayer.errors import CheckpointError, JlayerError, UnsupportedModelError
from tests.convert.checkpoints import edit_json, tensors_of, write_tensors
from tests.convert.quantized_kinds import CONFIG, KINDS, SINGLE, write
from tests.reference.repacked_forms import FORMS as REPACKED


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_ours_among_published_ones(tmp_path, kind):
    """A converted folder names a piece so; where the two differ it could be read as another."""
    write(tmp_path / "whole", kind)
    cfg = read_published_config(str(tmp_path / "whole"), [])[1]
    form, tensors, n_tried = form_of(cfg), tensors_of(tmp_path / "whole" / SINGLE), 0
    for published in tensors:
        matrix, piece = form.split(published) or (published, None)
        own = None if piece is None else piece_name(matrix, piece)
        if own in (None, published) or split_piece(own) != (matrix, piece):
            continue  # it has one name, or is none of ours
        renamed = {own if name == published else name: one for name, one in tensors.items()}
        write_tensors(tmp_path / "whole" / SINGLE, renamed)
        for attempt in (Store, lambda folder: convert_checkpoint(folder, tmp_path / "out")):
            if attempt is Store and kind in REPACKED:
                continue
            with pytest.raises(CheckpointError, match=f"{own} is no tensor.*expected {published}"):
                attempt(tmp_path / "whole")
        n_tried += 1
    assert n_tried or kind.startswith("4")


def test_codes_that_are_one_number(tmp_path):
    codes = f"{LAYER}self_attn.q_proj.weight_packed"
    folder = folder_of("symmetric", tmp_path, **{codes: ("I32", (), bytes(4))})
    for attempt in (Store, lambda folder: convert_checkpoint(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=codes):
            attempt(folder)


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
