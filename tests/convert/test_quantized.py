"""Conversion with quantization: the numbers, the choice of int8 or int4, and equal bytes whatever
interrupts it."""

import json
import re

import numpy as np
import pytest

from jlayer.checkpoint.layout import MANIFEST, read_manifest
from jlayer.checkpoint.safetensors import read_header
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.sources import files as read
from jlayer.convert.sources.files import FileSource
from jlayer.convert.target.journal import JOURNAL
from jlayer.convert.transform import quantize
from jlayer.convert.transform.packed import dequantize
from jlayer.encodings.int4 import INT4
from jlayer.encodings.int8 import INT8
from jlayer.encodings.registry import SCHEMES
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.registry import published_tensors
from tests.conftest import BUNDLED
from tests.convert.checkpoints import (
    edit_tensors,
    files_of,
    numbers,
    random_checkpoint,
    read_tensors,
    tensor_of,
)
from tests.tiny import tiny_llama

V_PROJ = "model.layers.1.self_attn.v_proj.weight"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A source whose widths are no multiples of any group, in some shards."""
    folder = tmp_path_factory.mktemp("plain") / "source"
    return tiny_llama(folder, dtype="bfloat16", sharded=True, hidden_size=54, intermediate_size=141)


def stored(folder, tensor):
    """A quantized tensor's pieces, as numpy arrays."""
    found = read_tensors(folder)
    kinds = {"I8": np.int8, "U8": np.uint8}
    pieces = {}
    for piece in ("q", "scale"):
        word, shape, data = found[f"{tensor}.{piece}"]
        if word == "BF16":
            pieces[piece] = numbers((word, shape, data))
        else:
            pieces[piece] = np.frombuffer(data, kinds[word]).reshape(shape)
    return pieces


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_matrix_is_quantized_from_its_published_numbers_and_the_rest_is_copied(
    plain, tmp_path, scheme
):
    done = convert_checkpoint(plain, tmp_path / "out", quantize=scheme)
    assert verify_folder(tmp_path / "out").findings == ()
    source, target = read_tensors(plain), read_tensors(tmp_path / "out")
    at_int8 = done.quantization["at_int8"]
    for name, tensor in source.items():
        if len(tensor[1]) == 1:
            assert target[name] == tensor
            continue
        within = "layers" in name and name not in at_int8
        form = SCHEMES[scheme] if within else INT8
        expected = quantize.quantize(numbers(tensor), form)
        for piece, found in stored(tmp_path / "out", name).items():
            assert found.tobytes() == expected[piece].tobytes(), (name, piece)
    assert len(target) == sum(1 if len(shape) == 1 else 2 for _, shape, _ in source.values())


def test_files_are_valid_safetensors_and_transformers_refuses_what_it_cannot_read(plain, tmp_path):
    import safetensors.numpy
    from transformers import AutoModelForCausalLM

    convert_checkpoint(plain, tmp_path / "out", quantize="int4")
    for path in (tmp_path / "out").glob("*.safetensors"):
        safetensors.numpy.load_file(path)
        assert read_header(path).data_start % 4096 == 0
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_do_not_depend_on_chunks_threads_or_on_an_earlier_conversion(
    plain, tmp_path, monkeypatch, scheme
):
    convert_checkpoint(plain, tmp_path / "expected", quantize=scheme)
    expected = files_of(tmp_path / "expected")
    convert_checkpoint(plain, tmp_path / "layered")
    convert_checkpoint(tmp_path / "layered", tmp_path / "again", quantize=scheme)
    assert files_of(tmp_path / "again") == expected
    monkeypatch.setattr(read, "CHUNK_BYTES", 998)
    monkeypatch.setattr(quantize, "BLOCK_WEIGHTS", 120)
    monkeypatch.setattr(quantize, "sample_errors", lambda *_: {})  # its sample is a chunk
    choice = read_manifest(tmp_path / "expected").quantization
    monkeypatch.setattr("jlayer.convert.job.choose_quantization", lambda *_: choice)
    convert_checkpoint(plain, tmp_path / "small", quantize=scheme)
    assert files_of(tmp_path / "small") == expected


def test_odd_sizes_keep_every_tensor_aligned_to_its_own_size(tmp_path):
    """An odd number of bytes before a tensor of two-byte numbers: scales go first there."""
    config = {"hidden_size": 25, "intermediate_size": 41, "vocab_size": 131}
    source = tiny_llama(tmp_path / "source", dtype="bfloat16", num_attention_heads=5, **config,
                        num_key_value_heads=1)  # fmt: skip
    convert_checkpoint(source, tmp_path / "out", quantize="int8")
    assert verify_folder(tmp_path / "out").findings == ()
    for path in (tmp_path / "out").glob("*.safetensors"):
        for entry in read_header(path).tensors.values():
            assert entry.offset % (2 if entry.dtype == "bfloat16" else 1) == 0
    expected = quantize.quantize(numbers(read_tensors(source)[UP_PROJ]), INT8)
    for piece, found in stored(tmp_path / "out", UP_PROJ).items():
        assert found.tobytes() == expected[piece].tobytes()


def test_a_matrix_whose_error_stands_out_stays_at_int8(tmp_path):
    """Weights below int4's smallest scale leave an error many times that of any other matrix."""
    source = tmp_path / "source"
    tiny_llama(source, dtype="bfloat16", hidden_size=96, intermediate_size=600)
    before = convert_checkpoint(source, tmp_path / "before", quantize="int4")
    assert "model.layers.1.self_attn.o_proj.weight" not in before.quantization["at_int8"]

    def shrink(tensors):
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = tensor_of(numbers(tensors[name]) * np.asarray(1e-5, "bfloat16"))

    edit_tensors(source / "model.safetensors", shrink)
    after = convert_checkpoint(source, tmp_path / "after", quantize="int4")
    assert "model.layers.1.self_attn.o_proj.weight" in after.quantization["at_int8"]
    assert after.block_bits <= 4.5
    assert json.loads((tmp_path / "after" / MANIFEST).read_text())["quantization"]["at_int8"] == [
        name for name in published_tensors_of(source) if name in after.quantization["at_int8"]
    ]


def published_tensors_of(folder):
    from jlayer.config import read_config

    return published_tensors(read_config(folder))


class Stop(Exception):
    pass


@pytest.mark.parametrize("delete_source", [False, True], ids=["kept", "shed"])
def test_what_was_stopped_resumes_to_the_same_bytes_and_the_same_choice(
    tmp_path, monkeypatch, delete_source
):
    """With its source half gone, the choice cannot be made again: the journal has it."""
    source = random_checkpoint(tmp_path / "source", n_shards=4, hidden_size=64)
    again = random_checkpoint(tmp_path / "again", n_shards=4, hidden_size=64)
    convert_checkpoint(again, tmp_path / "expected", quantize="int4", allow_nonfinite=True)
    options = {"quantize": "int4", "delete_source": delete_source}
    real, calls = quantize.Quantizer.quantize, []

    def stopping(self, rows, scheme):
        calls.append(scheme)
        if len(calls) == 16:
            raise Stop
        return real(self, rows, scheme)

    monkeypatch.setattr(quantize.Quantizer, "quantize", stopping)
    with pytest.raises(Stop):
        convert_checkpoint(source, tmp_path / "out", **options)
    assert (tmp_path / "out" / JOURNAL).exists()
    with pytest.raises(UsageError, match="began with quantize int4, not as published"):
        convert_checkpoint(source, tmp_path / "out", delete_source=delete_source)
    done = convert_checkpoint(source, tmp_path / "out", **options)
    assert done.n_resumed >= 1
    found, expected = files_of(tmp_path / "out"), files_of(tmp_path / "expected")
    assert found == expected
    if delete_source:
        assert list(source.glob("*.safetensors")) == []
        assert convert_checkpoint(source, tmp_path / "out", **options).status == "unchanged"
        with pytest.raises(CheckpointError):
            convert_checkpoint(source, tmp_path / "out", quantize="int8", delete_source=True)


def test_a_finished_folder_is_known_again_and_other_options_are_refused(plain, tmp_path):
    convert_checkpoint(plain, tmp_path / "out", quantize="int4")
    assert convert_checkpoint(plain, tmp_path / "out", quantize="int4").status == "unchanged"
    for options in ({}, {"quantize": "int8"}):
        with pytest.raises(UsageError, match="quantized as int4 there"):
            convert_checkpoint(plain, tmp_path / "out", **options)
    with pytest.raises(UnsupportedModelError, match=r"quantized already.*int4"):
        convert_checkpoint(tmp_path / "out", tmp_path / "more")
    with pytest.raises(UsageError, match=r"int5.*did you mean"):
        convert_checkpoint(plain, tmp_path / "other", quantize="int5")


def test_numbers_that_are_none_cannot_be_quantized_even_where_they_are_allowed(tmp_path):
    source = tmp_path / "source"
    tiny_llama(source, dtype="bfloat16")

    def spoil(tensors):
        found = numbers(tensors[UP_PROJ])
        found[30, 3] = np.nan
        tensors[UP_PROJ] = tensor_of(found)

    edit_tensors(source / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=re.escape(UP_PROJ) + ".*cannot be quantized"):
        convert_checkpoint(source, tmp_path / "out", quantize="int8", allow_nonfinite=True)


def test_a_weight_that_int4_does_not_reach_is_refused_by_name(tmp_path, monkeypatch):
    source = tmp_path / "source"
    tiny_llama(source, dtype="bfloat16")

    def enlarge(tensors):
        found = numbers(tensors[UP_PROJ])
        found[30, 3] = 100
        tensors[UP_PROJ] = tensor_of(found)

    edit_tensors(source / "model.safetensors", enlarge)
    # Where a sample of the rows shows it, the matrix stays at int8; else it is met on the way.
    monkeypatch.setattr("jlayer.convert.job.sample_errors", lambda *_: None)
    with pytest.raises(CheckpointError, match=re.escape(UP_PROJ) + ".*beyond 45.*choose int8"):
        convert_checkpoint(source, tmp_path / "out", quantize="int4")


def test_the_choice_is_made_from_the_first_rows_alone(monkeypatch):
    """A chunk of each matrix is asked for, however large it is."""
    from jlayer.convert.sources.open import open_source

    checked = open_source(str(BUNDLED))
    asked, real = [], FileSource.chunks

    def counting(self, name):
        for chunk in real(self, name):
            asked.append(len(chunk))
            yield chunk

    monkeypatch.setattr(FileSource, "chunks", counting)
    monkeypatch.setattr(read, "CHUNK_BYTES", 10_000)
    errors = quantize.sample_errors(checked.tensors, {UP_PROJ: (512, 192), V_PROJ: (64, 192)})
    assert asked == [10_000, 10_000]
    assert all(0.005 < error < 0.007 for error in errors.values())
    checked.tensors.close()


def test_a_quantized_folder_says_what_became_of_each_weight(tmp_path):
    """End to end on trained weights: the error that the format was chosen for."""
    convert_checkpoint(BUNDLED, tmp_path / "out", quantize="int4")
    published = numbers(read_tensors(BUNDLED)[UP_PROJ]).astype(np.float32)
    pieces = stored(tmp_path / "out", UP_PROJ)
    found = dequantize(INT4, pieces["q"], pieces["scale"], width=published.shape[1])
    assert np.square(found - published).sum() < 0.0062 * np.square(published).sum()
    assert np.abs(found - published).max() < 0.5 * np.abs(published).max()
