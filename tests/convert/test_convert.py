"""What a conversion gives: the same weights, names and layout, and equal bytes from equal input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jlayer.checkpoint.layout import MANIFEST, SIDE_FILES, read_manifest
from jlayer.checkpoint.safetensors import read_header
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.errors import UsageError
from jlayer.spec import ALIGNMENT
from tests.convert.checkpoints import (
    CARRIED,
    edit_json,
    edit_tensors,
    files_of,
    numbers,
    read_tensors,
    tensor_of,
    tensors_of,
)
from tests.convert.conftest import KINDS


def loaded(folder, **options):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_same_weights(published, tmp_path, kind):
    torch = pytest.importorskip("torch")
    convert_checkpoint(published(kind), tmp_path / "out")
    expected, found = loaded(published(kind)), loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_dtype_a_conversion_is_a_copy_of_bytes(published, tmp_path, kind):
    convert_checkpoint(published(kind), tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(published(kind))


def test_single_and_sharded_sources_give_equal_folders(published, tmp_path):
    for kind in ("single", "sharded"):
        convert_checkpoint(published(kind), tmp_path / kind)
    assert files_of(tmp_path / "single") == files_of(tmp_path / "sharded")


def test_a_second_conversion_gives_equal_bytes(published, tmp_path):
    for name in ("first", "second"):
        convert_checkpoint(published("single"), tmp_path / name)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_a_layered_folder_is_itself_a_source(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "first")
    convert_checkpoint(tmp_path / "first", tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_the_manifest_tells_nothing_of_this_run(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "out")
    text = (tmp_path / "out" / MANIFEST).read_text()
    assert str(tmp_path) not in text
    assert str(published("single")) not in text


def test_folder_holds_these_files_and_no_others(copy_of, tmp_path):
    source = copy_of("single")
    beside = (*SIDE_FILES, *CARRIED)
    for name in beside[2:]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f'{{"what": "{name}"}}')
    for name in ("README.md", "license.py", "modeling_evil.py", "original.pth"):
        (source / name).write_text("not model data")
    for name in ("additional_chat_templates/notes.txt", "original/tokenizer.model"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("not model data")
    convert_checkpoint(source, tmp_path / "out")
    names = files_of(tmp_path / "out").keys()
    weights = {"embed.safetensors", "final.safetensors"}
    weights |= {f"layer-0000{n}.safetensors" for n in range(3)}
    assert names == {*weights, *beside, "model.safetensors.index.json", MANIFEST}
    for name in beside:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert read_manifest(tmp_path / "out").files.keys() == names - {MANIFEST}


@pytest.mark.parametrize("kind", ["single", "tied", "biased", "bfloat16"])
def test_data_starts_aligned_and_matrices_come_first(published, tmp_path, kind):
    convert_checkpoint(published(kind), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        header = read_header(path)
        assert header.data_start % ALIGNMENT == 0
        entries = list(header.tensors.values())
        dims = [len(entry.shape) for entry in entries]
        assert dims == sorted(dims, reverse=True), path
        sizes = [entry.n_bytes for entry in entries if len(entry.shape) == 2]
        assert sizes == sorted(sizes, reverse=True), path


def test_layers_of_a_regular_model_are_of_one_size(published, tmp_path):
    convert_checkpoint(published("biased"), tmp_path / "out")
    assert len({path.stat().st_size for path in (tmp_path / "out").glob("layer-*")}) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["single", "bfloat16", "float16", "tied"])
def test_a_cast_is_the_one_of_torch(published, tmp_path, kind, dtype):
    torch = pytest.importorskip("torch")
    convert_checkpoint(published(kind), tmp_path / "out", dtype=dtype)
    found = loaded(tmp_path / "out")
    for name, weight in loaded(published(kind)).items():
        expected = weight.to(getattr(torch, dtype))
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name


def test_a_cast_changes_the_configs_dtype_and_nothing_else(copy_of, tmp_path):
    source = copy_of("single")
    edit_json(source / "config.json", torch_dtype="float32", dtype=None)
    convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == before | {"torch_dtype": "bfloat16"}
    assert list(after) == list(before)


def test_a_cast_to_what_it_is_already_changes_nothing(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "plain")
    convert_checkpoint(published("single"), tmp_path / "cast", dtype="float32")
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "cast")


def test_the_fingerprint_is_the_sources_whatever_it_is_cast_to(published, tmp_path):
    found = {
        convert_checkpoint(published("single"), tmp_path / str(dtype), dtype=dtype).fingerprint
        for dtype in (None, "bfloat16", "float16")
    }
    other = convert_checkpoint(published("tied"), tmp_path / "other").fingerprint
    assert len(found) == 1
    assert other not in found


def test_mixed_dtypes_stay_as_they_are_and_transformers_loads_them(copy_of, tmp_path):
    import ml_dtypes

    source = copy_of("single")

    def halve_matrices(tensors):
        for name, tensor in tensors.items():
            if "proj" in name:
                tensors[name] = tensor_of(numbers(tensor).astype(ml_dtypes.bfloat16))

    edit_tensors(source / "model.safetensors", halve_matrices)
    summary = convert_checkpoint(source, tmp_path / "out")
    assert summary.dtypes == {"float32": 9, "bfloat16": 21}
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    assert loaded(tmp_path / "out").keys() == loaded(source).keys()


def test_a_tied_head_that_is_stored_again_is_left_out(copy_of, published, tmp_path):
    source = copy_of("tied")

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(source / "model.safetensors", store_head)
    convert_checkpoint(source, tmp_path / "again")
    convert_checkpoint(published("tied"), tmp_path / "once")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "once")


def test_computed_tables_are_left_out(copy_of, published, tmp_path):
    source = copy_of("single")

    def store_table(tensors):
        table = np.ones(5, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensor_of(table)

    edit_tensors(source / "model.safetensors", store_table)
    convert_checkpoint(source, tmp_path / "with")
    convert_checkpoint(published("single"), tmp_path / "without")
    assert files_of(tmp_path / "with") == files_of(tmp_path / "without")


def test_a_hub_cache_is_a_source(published, tmp_path):
    """Its files are links into ../../blobs."""
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, path in enumerate(published("sharded").iterdir()):
        shutil.copy(path, blobs / f"{n:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{n:064x}")
    convert_checkpoint(snapshot, tmp_path / "linked")
    convert_checkpoint(published("sharded"), tmp_path / "plain")
    assert files_of(tmp_path / "linked") == files_of(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_a_finished_target_is_left_alone(published, tmp_path):
    first = convert_checkpoint(published("single"), tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = convert_checkpoint(published("sharded"), tmp_path / "out")
    assert (first.status, again.status) == ("converted", "unchanged")
    assert again.fingerprint == first.fingerprint
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def flip_last_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def other_weights(source):
    flip_last_bit(source / "model.safetensors")


def other_tokenizer(source):
    (source / "tokenizer.json").write_text("{}")


def other_generation_config(source):
    edit_json(source / "generation_config.json", eos_token_id=3)


def other_config(source):
    edit_json(source / "config.json", rms_norm_eps=1e-6)


@pytest.mark.parametrize(
    "change", [other_weights, other_tokenizer, other_generation_config, other_config]
)
def test_a_target_that_differs_is_replaced_only_with_overwrite(copy_of, tmp_path, change):
    source, target = copy_of("single"), tmp_path / "out"
    convert_checkpoint(source, target)
    before = files_of(target)
    change(source)
    with pytest.raises(UsageError) as refusal:
        convert_checkpoint(source, target)
    assert str(source) in str(refusal.value)
    assert str(target) in str(refusal.value)
    assert files_of(target) == before
    convert_checkpoint(source, target, overwrite=True)
    convert_checkpoint(source, tmp_path / "fresh")
    assert files_of(target) == files_of(tmp_path / "fresh") != before


def test_overwriting_a_deeper_model_leaves_none_of_its_layers(published, tmp_path):
    from tests.tiny import tiny_llama

    deep = tiny_llama(tmp_path / "deep", num_hidden_layers=5)
    convert_checkpoint(deep, tmp_path / "out")
    convert_checkpoint(published("single"), tmp_path / "out", overwrite=True)
    assert verify_folder(tmp_path / "out").findings == ()


def test_other_options_are_another_target(published, tmp_path):
    convert_checkpoint(published("single"), tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        convert_checkpoint(published("single"), tmp_path / "out", dtype="bfloat16")


def test_a_finished_target_that_lost_a_file_is_made_whole(published, tmp_path):
    target = tmp_path / "out"
    convert_checkpoint(published("single"), target)
    (target / "layer-00001.safetensors").unlink()
    assert convert_checkpoint(published("single"), target).status == "converted"
    assert verify_folder(target).findings == ()


def test_what_an_interrupted_run_left_is_replaced(published, tmp_path):
    """As after a kill: finished files, one half-written, no manifest."""
    target = tmp_path / "out"
    convert_checkpoint(published("single"), target)
    expected = files_of(target)
    (target / MANIFEST).unlink()
    (target / "final.safetensors").rename(target / "final.safetensors.jlayer-tmp")
    (target / "layer-00099.safetensors").write_bytes(b"of a deeper model")
    flip_last_bit(target / "layer-00001.safetensors")
    convert_checkpoint(published("single"), target)
    assert files_of(target) == expected


def test_extra_tensors_can_be_left_out(copy_of, published, tmp_path):
    source = copy_of("single")

    def add(tensors):
        tensors["vision.weight"] = tensor_of(np.ones((2, 3), np.float32))

    edit_tensors(source / "model.safetensors", add)
    summary = convert_checkpoint(source, tmp_path / "out", allow_extra=True)
    convert_checkpoint(published("single"), tmp_path / "plain")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert "vision.weight" in summary.notes[0]


def test_nonfinite_weights_can_be_kept(copy_of, tmp_path):
    source = copy_of("single")

    def spoil(tensors):
        weights = numbers(tensors["model.norm.weight"])
        weights[:2] = np.nan, np.inf
        tensors["model.norm.weight"] = tensor_of(weights)

    edit_tensors(source / "model.safetensors", spoil)
    summary = convert_checkpoint(source, tmp_path / "out", allow_nonfinite=True)
    assert summary.nonfinite == {"model.norm.weight": 2}
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    assert convert_checkpoint(
        source, tmp_path / "half", dtype="float16", allow_nonfinite=True
    ).nonfinite == {"model.norm.weight": 2}


def test_copies_of_a_tensor_that_are_equal_are_taken_once_and_told(copy_of, published, tmp_path):
    source = copy_of("sharded")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    name, entry = next(iter(tensors_of(first).items()))
    edit_tensors(second, lambda tensors: tensors.update({name: entry}))
    summary = convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(published("sharded"), tmp_path / "plain")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert len(summary.notes) == 1
    assert all(word in summary.notes[0] for word in (name, str(first), str(second)))


def test_the_command_line_converts_and_says_so_in_json(published, tmp_path):
    command = [sys.executable, "-m", "convert", str(published("single")), str(tmp_path / "out")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["status"] == "converted"
    assert result["n_layers"] == 3
    assert result["target_bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != MANIFEST
    )
    assert "\r" not in done.stderr, "a bar, though stderr is no terminal"


def test_the_command_line_ends_with_the_errors_code_and_one_line(tmp_path):
    command = [sys.executable, "-m", "convert", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_converting_needs_no_heavy_package(published, tmp_path):
    code = (
        "import sys; from jlayer.convert import convert_checkpoint, verify_folder\n"
        f"convert_checkpoint({str(published('single'))!r}, {str(tmp_path / 'out')!r})\n"
        f"verify_folder({str(tmp_path / 'out')!r})\n"
        "print([name for name in ('jax', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
