"""Folders of every quantized form that were converted: they convert again to the same, and are
exported to what they were made of, scales of one number with the axes that they had."""

import pytest

from jlayer.checkpoint.layout import read_manifest
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.encodings.published import FORMS
from jlayer.errors import CheckpointError, UnsupportedModelError
from tests import gguf_files
from tests.convert.checkpoints import edit_tensors, read_tensors
from tests.convert.quantized_kinds import BITSANDBYTES, KINDS, SINGLE, write
from tests.gguf.forms import save

STATISTICS = [kind for kind, options in BITSANDBYTES.items() if not options.get("is_8bit")]
K_PROJ = "model.layers.0.self_attn.k_proj.weight"  # of 64 rows and 128 inputs: a square of a grid


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind -> (a published folder, the same converted)."""
    home, found = tmp_path_factory.mktemp("again"), {}

    def of(kind):
        if kind not in found:
            found[kind] = home / kind / "source", home / kind / "layered"
            found[kind][0].parent.mkdir()
            write(found[kind][0], kind)
            convert_checkpoint(*found[kind])
        return found[kind]

    return of


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STATISTICS])
def test_a_converted_folder_converts_again_to_the_same(made, tmp_path, kind):
    _, layered = made(kind)
    convert_checkpoint(layered, tmp_path / "again")
    one, other = read_manifest(layered), read_manifest(tmp_path / "again")
    assert one.files == other.files
    assert one.quantization == other.quantization


@pytest.mark.parametrize("kind", STATISTICS)
def test_without_the_statistics_of_its_codes_it_does_not(made, tmp_path, kind):
    """Those of nf4 and fp4 look alike."""
    _, layered = made(kind)
    with pytest.raises(UnsupportedModelError, match="lacks the statistics of the published one; c"):
        convert_checkpoint(layered, tmp_path / "again")


def test_one_of_a_gguf_file_does_not(tmp_path):
    gguf_files.write(save("llama", tmp_path / "model"), tmp_path / "m.gguf", kind="Q8_0")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "layered")
    with pytest.raises(UnsupportedModelError, match=r"from a GGUF file; convert that file again"):
        convert_checkpoint(tmp_path / "layered", tmp_path / "again")


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_tensors_that_were_published(made, tmp_path, kind):
    source, layered = made(kind)
    if not FORMS[Store(layered).cfg.quantized.method].is_exported:
        with pytest.raises(UnsupportedModelError, match="keep the published folder"):
            export_checkpoint(layered, tmp_path / "out", format="huggingface")
        return
    export_checkpoint(layered, tmp_path / "out", format="huggingface")
    assert read_tensors(tmp_path / "out") == read_tensors(source)


@pytest.mark.parametrize("axes", [(), (1,), (1, 1), (1, 1, 1)])
def test_the_scale_of_one_square_is_taken_with_any_axes(made, tmp_path, axes):
    source, layered = tmp_path / "source", tmp_path / "layered"
    write(source, "fp8")

    def edit(tensors):
        word, _, data = tensors[f"{K_PROJ}_scale_inv"]
        tensors[f"{K_PROJ}_scale_inv"] = (word, axes, data)

    edit_tensors(source / SINGLE, edit)
    convert_checkpoint(source, layered)
    for folder in (source, layered):
        assert Store(folder).form_of(K_PROJ) == "fp8_128x128"
    assert read_manifest(layered).files == read_manifest(made("fp8")[1]).files


def test_more_scales_than_squares_are_refused(tmp_path):
    write(tmp_path / "source", "fp8")

    def edit(tensors):
        word, _, data = tensors[f"{K_PROJ}_scale_inv"]
        tensors[f"{K_PROJ}_scale_inv"] = (word, (1, 2), 2 * data)

    edit_tensors(tmp_path / "source" / SINGLE, edit)
    words = rf"{K_PROJ}_scale_inv in .* is \[1, 2\], by config.json \[1, 1\]"
    with pytest.raises(CheckpointError, match=words):
        Store(tmp_path / "source")
