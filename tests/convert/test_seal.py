"""Side files can be mended: `seal` takes them into the manifest, and the weights stay sealed."""

import contextlib
import json
import os
import random
import shutil

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.layout import MANIFEST, read_manifest
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.target.lock import TargetLock
from jlayer.convert.target.seal import seal_folder
from jlayer.errors import CheckpointError, JlayerError, LockedError, UsageError
from tests.conftest import BUNDLED
from tests.convert.checkpoints import edit_json, files_of, random_checkpoint
from tests.convert.faults import CHANGES, counted, failing
from tests.convert.kills import killed
from tests.convert.powercut import Recorder, materialise

TEMPLATE = "additional_chat_templates/tool_use.jinja"
LAYER = "layer-00001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return shutil.copytree(BUNDLED, tmp_path_factory.mktemp("seal") / "source")


@pytest.fixture(scope="module")
def pristine(source):
    convert_checkpoint(source, source.parent / "layered")
    return source.parent / "layered"


@pytest.fixture
def layered(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "layered")


def add(folder, name, text="{{ messages[0].content }}"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def change_ending(folder):
    edit_json(folder / "generation_config.json", eos_token_id=5)


def add_template(folder):
    add(folder, TEMPLATE)


def add_licence(folder):
    add(folder, "LICENSE", "terms")


def remove_options(folder):
    (folder / "generation_config.json").unlink()


def change_tokenizer(folder):
    edit_json(folder / "tokenizer_config.json", add_bos_token=True, clean_up=False)


def change_epsilon(folder):
    edit_json(folder / "config.json", rms_norm_eps=1e-4)


MENDED = [
    (change_ending, "changed", "generation_config.json"),
    (add_template, "added", TEMPLATE),
    (add_licence, "added", "LICENSE"),
    (remove_options, "removed", "generation_config.json"),
    (change_tokenizer, "changed", "tokenizer_config.json"),
    (change_epsilon, "changed", "config.json"),
]


@pytest.mark.parametrize(("mend", "kind", "name"), MENDED)
def test_what_is_mended_is_taken_in_and_the_folder_is_sound(layered, mend, kind, name):
    before = read_manifest(layered)
    mend(layered)
    found = verify_folder(layered)
    assert found.side_files == (name,)
    assert not found.is_damaged
    assert f"run: jlayer seal {layered}" in found.advice
    done = seal_folder(layered)
    assert {"changed": done.changed, "added": done.added, "removed": done.removed} == {
        **dict.fromkeys(("changed", "added", "removed"), ()),
        kind: (name,),
    }
    assert done.status == "sealed"
    assert verify_folder(layered).findings == ()
    assert Store(layered).notes == ()
    after = read_manifest(layered)
    weights = {n: entry for n, entry in before.files.items() if entry.tensors}
    assert {n: entry for n, entry in after.files.items() if entry.tensors} == weights
    assert seal_folder(layered).status == "unchanged"


@pytest.mark.parametrize("mend", [mend for mend, *_ in MENDED[:-1]])
def test_a_sealed_folder_is_that_of_a_mended_source(source, layered, tmp_path, mend):
    """But for the config, of which the fingerprint of the source is made."""
    mend(layered)
    seal_folder(layered)
    mended = shutil.copytree(source, tmp_path / "source")
    mend(mended)
    convert_checkpoint(mended, tmp_path / "anew")
    assert files_of(layered) == files_of(tmp_path / "anew")


def test_the_way_from_options_that_are_refused_to_a_text(source, tmp_path, capsys):
    """convert warns, generate refuses, seal takes the mended file in: also without the source."""
    copy, target = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    edit_json(copy / "generation_config.json", suppress_tokens=[1])
    generate = ["generate", str(target), "-p", "Once", "-n", "2", "--device", "cpu"]
    assert main(["convert", str(copy), str(target), "--delete-source", "--yes", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "generation_config.json: suppress_tokens: found [1]" in err
    assert "jlayer generate will refuse" in json.loads(out)["notes"][-1]
    shutil.rmtree(copy)
    assert main(generate) == 3
    assert "suppress_tokens" in capsys.readouterr().err
    edit_json(target / "generation_config.json", suppress_tokens=None)
    assert main(generate) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{target / 'generation_config.json'}: changed since" in line
    assert f"run: jlayer seal {target}" in line
    assert main(["verify", str(target)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run: jlayer seal {target}" in line
    assert "convert the source again" not in line
    assert main(["seal", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: sealed; changed: generation_config.json\n"
    assert main(["verify", str(target)]) == 0
    assert main(generate) == 0


def test_seal_warns_of_options_that_are_refused(layered, capsys):
    edit_json(layered / "generation_config.json", eos_token_id=9999)
    assert main(["seal", str(layered), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["status"] == "sealed"
    assert found["changed"] == ["generation_config.json"]
    assert "eos_token_id: found id 9999" in found["notes"][0]
    assert "eos_token_id: found id 9999" in err


def test_a_tokenizer_that_text_refuses_is_said_by_convert(source, tmp_path, capsys):
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "tokenizer.json").write_text("{}")
    assert main(["convert", str(copy), str(tmp_path / "out")]) == 0
    assert "jlayer generate will refuse text: " in capsys.readouterr().err


def test_a_mended_ending_ends_where_transformers_ends(layered):
    """Tokens of the sealed folder are those of Transformers in the same folder."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [[1, 2, 3]]
    first = AutoModelForCausalLM.from_pretrained(layered).generate(
        torch.tensor(prompt), max_new_tokens=6, do_sample=False
    )
    ending = first[0, 5].item()
    edit_json(layered / "generation_config.json", eos_token_id=ending)
    seal_folder(layered)
    expected = AutoModelForCausalLM.from_pretrained(layered).generate(
        torch.tensor(prompt), max_new_tokens=6, do_sample=False
    )
    assert expected.shape[1] < first.shape[1]
    with AutoModel.from_pretrained(layered, device="cpu") as model:
        found = model.generate(np.array(prompt), max_new_tokens=6, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_an_added_template_is_used_and_named_until_it_is_sealed(layered):
    add_template(layered)
    (note,) = Store(layered).notes
    assert TEMPLATE in note
    assert f"jlayer seal {layered}" in note


def test_a_licence_stops_no_run(layered):
    add_licence(layered)
    seal_folder(layered)
    (layered / "LICENSE").write_text("other terms")
    assert Store(layered).notes == ()
    (layered / "LICENSE").unlink()
    Store(layered)
    assert verify_folder(layered).side_files == ("LICENSE",)


def test_a_missing_side_file_is_named_with_the_way_out(layered):
    (layered / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: missing.*run: jlayer seal"):
        Store(layered)


# What is refused, with the manifest as it was


def other(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def quantized_by_us(folder):
    edit_json(folder / "config.json", quantization_config={"by": "jlayer", "scheme": "int8"})


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def broken_options(folder):
    (folder / "generation_config.json").write_text("[1]")


def damaged_header(folder):
    raw = bytearray((folder / LAYER).read_bytes())
    raw[8] ^= 1
    (folder / LAYER).write_bytes(raw)


def cut_layer(folder):
    os.truncate(folder / LAYER, 5000)


def no_layer(folder):
    (folder / LAYER).unlink()


def pipe_for_a_template(folder):
    os.mkfifo(folder / "chat_template.jinja")


def unfinished(folder):
    (folder / ".jlayer-journal").write_text("{}")


REFUSED = {
    "wider": (other(intermediate_size=41), "describes other weights.*41"),
    "fewer-layers": (other(num_hidden_layers=5), r"model\.layers\.5\..*by config\.json none"),
    "more-layers": (other(num_hidden_layers=7), r"model\.layers\.6\..*has the shape none"),
    "tied": (other(tie_word_embeddings=True), r"lm_head|describes other weights"),
    "biased": (other(attention_bias=True), r"k_proj\.bias has the shape none"),
    "quantized": (quantized_by_us, "quantization_config"),
    "no-config": (no_config, r"config\.json: missing"),
    "broken-config": (broken_config, r"config\.json: not JSON"),
    "broken-options": (broken_options, r"generation_config\.json: found a JSON list"),
    "damaged-header": (damaged_header, LAYER),
    "cut-layer": (cut_layer, LAYER),
    "no-layer": (no_layer, rf"{LAYER}: missing"),
    "pipe": (pipe_for_a_template, "not a regular file"),
    "unfinished": (unfinished, "its conversion has not ended"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(layered, tmp_path, name):
    spoil, words = REFUSED[name]
    if name == "tied" and json.loads((layered / "config.json").read_text())["tie_word_embeddings"]:
        spoil = other(tie_word_embeddings=False)
    spoil(layered)
    before = (layered / MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match=words):
        seal_folder(layered)
    assert (layered / MANIFEST).read_bytes() == before
    assert not (layered / ".jlayer-lock").exists()


def test_a_tokenizer_that_text_refuses_is_said_by_seal(layered, capsys):
    (layered / "tokenizer.json").write_text('{"version": "1.0"}')
    assert main(["seal", str(layered), "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"jlayer generate will refuse text: {layered / 'tokenizer.json'}" in err
    assert "will refuse text" in json.loads(out)["notes"][0]


def test_what_an_older_conversion_lacks_can_be_copied_and_sealed(source, layered, tmp_path):
    mended = shutil.copytree(source, tmp_path / "source")
    add_template(mended)
    with pytest.raises(UsageError, match=rf"{TEMPLATE} is in only one.*taken in by jlayer seal"):
        convert_checkpoint(mended, layered)
    add_template(layered)
    seal_folder(layered)
    assert convert_checkpoint(mended, layered).status == "unchanged"


def test_a_quantized_folder_is_sealed_and_keeps_saying_so(tmp_path):
    convert_checkpoint(random_checkpoint(tmp_path / "source"), tmp_path / "q", quantize="int8")
    edit_json(tmp_path / "q" / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"quantization_config names .*None.*'int8'"):
        seal_folder(tmp_path / "q")
    quantized_by_us(tmp_path / "q")
    change_ending(tmp_path / "q")
    assert "generation_config.json" in seal_folder(tmp_path / "q").changed
    assert verify_folder(tmp_path / "q").findings == ()


def test_what_is_not_converted_is_not_sealed(source, tmp_path, capsys):
    for folder in (source, tmp_path / "nowhere"):
        assert main(["seal", str(folder)]) == 3
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()
    assert files_of(source).keys() == files_of(BUNDLED).keys()


def test_a_folder_that_a_converter_works_on_is_left_alone(layered):
    change_ending(layered)
    with TargetLock(layered, note=print), pytest.raises(LockedError):
        seal_folder(layered)


def test_a_changed_config_that_fits_no_weights_is_refused_with_a_way_out(layered):
    other(intermediate_size=41)(layered)
    with pytest.raises(CheckpointError, match=r"config\.json says .*put back the old config\.json"):
        Store(layered)
    found = verify_folder(layered)
    assert found.side_files == ("config.json",)
    assert "convert the source again" not in found.advice


def test_damage_beside_a_change_is_still_damage(layered):
    change_ending(layered)
    damaged_header(layered)
    found = verify_folder(layered)
    assert found.is_damaged
    assert "convert the source again" in found.advice
    assert f"jlayer seal {layered}" in found.advice


def test_an_index_that_was_lost_is_made_again(layered, pristine):
    (layered / "model.safetensors.index.json").unlink()
    done = seal_folder(layered)
    assert (done.status, done.restored) == ("sealed", ("model.safetensors.index.json",))
    assert files_of(layered) == files_of(pristine)


def test_foreign_files_are_named_and_left(layered, capsys):
    (layered / "notes.txt").write_text("mine")
    assert "'notes.txt'" in seal_folder(layered).notes[0]
    assert main(["verify", str(layered)]) == 3
    assert "remove 'notes.txt'" in capsys.readouterr().err
    assert (layered / "notes.txt").read_text() == "mine"


# Stopped at any moment


def mend_all(folder):
    change_ending(folder)
    add_template(folder)
    add_licence(folder)


def test_killed_at_any_point_it_leaves_the_old_manifest_or_the_new_one(layered, tmp_path):
    mend_all(layered)
    seal_folder(shutil.copytree(layered, tmp_path / "whole"))
    states = killed("seal", layered, tmp_path / "whole")
    assert set(states) == {"old", "new"}
    assert states == sorted(states, reverse=True)
    assert len(states) > 10


def test_after_a_power_cut_the_manifest_lists_what_is_on_disk(layered, tmp_path):
    recorder = Recorder(layered)
    with recorder:
        # As an editor leaves them: written, and not synced.
        os.mkdir(layered / "additional_chat_templates")
        for name in ("chat_template.jinja", TEMPLATE):
            fd = os.open(layered / name, os.O_WRONLY | os.O_CREAT)
            os.pwrite(fd, b"{{ messages[0].content }}", 0)
            os.close(fd)
        seal_folder(layered)
    new, rng = read_manifest(layered), random.Random(0)
    n_new = 0
    for at in range(len(recorder.log) + 1):
        for n in range(4):
            folder = tmp_path / f"{at}-{n}"
            materialise(recorder.disk_after(at).after_a_cut(rng), folder)
            found = read_manifest(folder)
            if found == new:
                n_new += 1
                assert set(verify_folder(folder).foreign) <= {"'.jlayer-lock'"}
                assert verify_folder(folder).side_files == ()
            shutil.rmtree(folder)
    assert n_new > 4


@pytest.mark.parametrize("code", [5, 28])
def test_any_call_that_fails_leaves_the_old_manifest_or_the_new_one(layered, tmp_path, code):
    mend_all(layered)
    old = (layered / MANIFEST).read_bytes()
    seal_folder(shutil.copytree(layered, tmp_path / "whole"))
    expected = files_of(tmp_path / "whole")
    folder = shutil.copytree(layered, tmp_path / "folder")
    n_calls = len(counted(lambda: seal_folder(folder), CHANGES))
    for nth in range(n_calls):
        (folder / MANIFEST).write_bytes(old)
        with contextlib.suppress(JlayerError), failing(nth, code, CHANGES):
            seal_folder(folder)
        assert (folder / MANIFEST).read_bytes() in (old, expected[MANIFEST])
        seal_folder(folder)
        assert files_of(folder) == expected


def test_a_quiet_seal_says_nothing_on_the_way(layered, capsys):
    """It had a progress of its own, which did not know of --quiet."""
    words = ["seal", str(layered)]
    edit_json(layered / "generation_config.json", suppress_tokens=[1])
    assert main([*words, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert "sealed" in quiet.out
    assert quiet.err == ""
    assert main(words) == 0
    assert "suppress_tokens" in capsys.readouterr().err
