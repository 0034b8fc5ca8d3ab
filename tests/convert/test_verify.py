"""`verify` finds whatever is wrong with a converted folder, all of it at once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.errors import CheckpointError
from tests.convert.checkpoints import edit_json, edit_manifest, split

LAYER = "layer-00001.safetensors"


@pytest.fixture(scope="module")
def pristine(published, tmp_path_factory):
    home = tmp_path_factory.mktemp("verify")
    source = shutil.copytree(published("single"), home / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    convert_checkpoint(source, home / "layered")
    return home / "layered"


@pytest.fixture
def layered(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "layered")


def flip_bit(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


def forge_manifest(folder, name, **changes):
    """Changes what the manifest says of a file."""
    edit_manifest(folder, lambda manifest: manifest["files"][name].update(changes))


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


DAMAGES = {}


def damage(*words):
    def enter(function):
        DAMAGES[function.__name__.replace("_", "-")] = (function, words)
        return function

    return enter


@damage(LAYER, "SHA-256")
def bit_flipped_in_the_data(folder):
    flip_bit(folder / LAYER)


@damage(LAYER, "SHA-256")
def bit_flipped_in_the_headers_padding(folder):
    header_end = (folder / LAYER).read_bytes().index(b"}}")
    raw = bytearray((folder / LAYER).read_bytes())
    raw[header_end + 10] = ord("\t")
    (folder / LAYER).write_bytes(raw)


@damage(LAYER, "header")
def bit_flipped_in_the_header(folder):
    flip_bit(folder / LAYER, 8)


@damage("tokenizer.json", "SHA-256")
def bit_flipped_in_the_tokenizer(folder):
    flip_bit(folder / "tokenizer.json", 3)


@damage(LAYER, " bytes, expected ")
def file_cut_off(folder):
    os.truncate(folder / LAYER, (folder / LAYER).stat().st_size - 1)


@damage(LAYER, " bytes, expected ")
def file_too_long(folder):
    with open(folder / LAYER, "ab") as file:
        file.write(b"\0")


@damage(LAYER, "missing")
def file_missing(folder):
    (folder / LAYER).unlink()


@damage("notes.txt", "not part")
def foreign_file(folder):
    (folder / "notes.txt").write_text("mine")


@damage("final.safetensors.jlayer-tmp", "not part")
def temporary_file(folder):
    (folder / "final.safetensors.jlayer-tmp").write_text("")


@damage(LAYER, "layer-00002.safetensors", "other tensors")
def layers_swapped(folder):
    (folder / LAYER).rename(folder / "aside")
    (folder / "layer-00002.safetensors").rename(folder / LAYER)
    (folder / "aside").rename(folder / "layer-00002.safetensors")


@damage(LAYER, "not a regular file")
def fifo_instead_of_a_layer(folder):
    (folder / LAYER).unlink()
    os.mkfifo(folder / LAYER)


@damage("config.json", "layer-00003.safetensors")
def config_of_a_deeper_model(folder):
    edit_json(folder / "config.json", num_hidden_layers=4)


@damage("other tensors or shapes", "embed.safetensors")
def config_of_a_larger_vocabulary(folder):
    edit_json(folder / "config.json", vocab_size=134)


@damage("model.safetensors.index.json", "agree")
def index_that_agrees_with_its_digest_alone(folder):
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map={"lm_head.weight": LAYER})
    forge_manifest(folder, index.name, sha256=digest_of(index), bytes=index.stat().st_size)


@damage(LAYER, "laid out")
def tensors_in_another_order(folder):
    """Sound safetensors, and the manifest says the same; but not this format."""
    header, data = split(folder / LAYER)
    first, second = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def swap(entries):
        entries[first], entries[second] = entries[second], entries[first]

    swap(header)
    text = json.dumps(header).encode().ljust(4096 - 8)
    (folder / LAYER).write_bytes(len(text).to_bytes(8, "little") + text + data)
    edit_manifest(folder, lambda manifest: swap(manifest["files"][LAYER]["tensors"]))
    forge_manifest(folder, LAYER, sha256=digest_of(folder / LAYER))


@pytest.mark.parametrize("name", DAMAGES)
def test_finds(layered, name):
    spoil, words = DAMAGES[name]
    spoil(layered)
    findings = "; ".join(verify_folder(layered).findings)
    for word in words:
        assert word in findings


def test_a_sound_folder_has_no_findings(pristine):
    verdict = verify_folder(pristine)
    assert verdict.findings == ()
    assert verdict.n_layers == 3
    files = list(pristine.iterdir())
    assert verdict.n_files == len(files)
    sizes = {path.name: path.stat().st_size for path in files}
    assert verdict.folder_bytes == sum(sizes.values()) - sizes["manifest.json"]


def test_all_findings_come_at_once(layered):
    flip_bit(layered / "embed.safetensors")
    (layered / LAYER).unlink()
    (layered / "notes.txt").write_text("mine")
    assert len(verify_folder(layered).findings) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format"),
        ({"format_version": 2}, "version"),
        ({"quantization": {"scheme": "int9"}}, "int9"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64, "tensors": {}}}}, "'../x'"),
        ({"files": {"config.json": {"bytes": -1, "sha256": "0" * 64, "tensors": {}}}}, "bytes"),
        ({"files": {"config.json": {"bytes": 1, "sha256": "0", "tensors": {}}}}, "sha256"),
        ({"files": []}, "damaged"),
        ({"source": {"fingerprint": 7}}, "damaged"),
        ({"family": None}, "damaged"),
    ],
)
def test_a_manifest_that_is_none(layered, change, words):
    edit_manifest(layered, lambda manifest: manifest.update(change))
    with pytest.raises(CheckpointError, match=words):
        verify_folder(layered)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_what_everything_is_held_against_is_missing(layered, name):
    (layered / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify_folder(layered)


def test_a_layered_folder_in_a_hub_cache_is_sound(pristine, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(pristine, tmp_path / "models--a--b" / "blobs")
    snapshot.mkdir(parents=True)
    for path in pristine.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert verify_folder(snapshot).findings == ()


def test_the_command_line_says_all_in_one_line_with_code_3(layered):
    flip_bit(layered / "embed.safetensors")
    (layered / LAYER).unlink()
    command = [sys.executable, "-m", "jlayer.app.cli", "verify", str(layered)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "embed.safetensors" in done.stderr
    assert LAYER in done.stderr
    assert done.stdout == ""


def test_any_bit_of_the_manifest_that_flips_is_found(layered):
    """Every bit of every kind of place in it: names, numbers, digests, spaces, the seal."""
    path = layered / "manifest.json"
    raw = path.read_bytes()
    for at in range(0, 8 * len(raw), 37):
        flipped = bytearray(raw)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            found = verify_folder(layered).findings
        except CheckpointError:
            continue
        assert found, at


def test_a_manifest_that_says_the_same_in_other_bytes_is_found(layered):
    path = layered / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        verify_folder(layered)


def test_an_unfinished_folder_is_told_how_to_be_finished(layered):
    (layered / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="resume"):
        verify_folder(layered)


def test_a_folder_that_was_never_converted_has_nothing_to_resume(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no converted folder; convert it first$"):
        verify_folder(tmp_path)
