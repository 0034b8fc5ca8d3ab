"""Links to elsewhere, such as another disk: refused unless asked for, followed and named then."""

import errno
import json
import os
import shutil

import pytest

import jlayer
from jlayer.app.cli import main
from jlayer.checkpoint.adapter import WEIGHTS
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.export import export_checkpoint
from jlayer.convert.target.seal import seal_folder
from jlayer.errors import CheckpointError, StorageError, UsageError
from tests.adapters import write_adapter
from tests.conftest import BUNDLED
from tests.convert.checkpoints import edit_json, files_of, random_checkpoint
from tests.convert.faults import failing

SHARD = "model-00002-of-00003.safetensors"
LAYER = "layer-00001.safetensors"
TEMPLATES = "additional_chat_templates"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    source = random_checkpoint(tmp_path_factory.mktemp("links") / "source")
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "rag.jinja").write_text("rag")
    return source


@pytest.fixture(scope="module")
def converted(plain):
    convert_checkpoint(plain, plain.parent / "layered")
    return plain.parent / "layered"


def moved(folder, names, *, to):
    """Moves files of a folder elsewhere, with links to them in their place."""
    to.mkdir()
    for name in names:
        (folder / name).rename(to / name)
        (folder / name).symlink_to(to / name)
    return folder


@pytest.fixture
def linked(plain, tmp_path):
    names = (SHARD, "config.json", "tokenizer.json", TEMPLATES)
    return moved(shutil.copytree(plain, tmp_path / "source"), names, to=tmp_path / "disk")


def test_links_are_followed_where_the_user_says_so(linked, converted, tmp_path, capsys):
    command = ["convert", str(linked), str(tmp_path / "out")]
    assert main(command) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "disk" / "config.json") in line
    assert "--follow-links" in line
    assert main([*command, "--follow-links", "--json"]) == 0
    out, err = capsys.readouterr()
    (note,) = [note for note in json.loads(out)["notes"] if "links followed" in note]
    assert note in err
    for name in (SHARD, "config.json", "tokenizer.json", f"{TEMPLATES}/rag.jinja"):
        assert f"{name} to {tmp_path / 'disk' / name}" in note
    assert files_of(tmp_path / "out") == files_of(converted)


def test_what_stays_inside_is_not_named(plain, tmp_path):
    source = shutil.copytree(plain, tmp_path / "source")
    (source / SHARD).rename(source / "moved")
    (source / SHARD).symlink_to("moved")
    assert convert_checkpoint(source, tmp_path / "out", follow_links=True).notes == ()


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing", "device"])
def test_the_end_of_a_link_is_a_regular_file_all_the_same(linked, tmp_path, kind):
    (tmp_path / "disk" / SHARD).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / "disk" / SHARD)
    elif kind == "folder":
        (tmp_path / "disk" / SHARD).mkdir()
    elif kind == "device":
        (tmp_path / "disk" / SHARD).symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match=rf"{SHARD}: (not a regular file|missing)"):
        convert_checkpoint(linked, tmp_path / "out", follow_links=True)


def test_a_file_behind_a_link_that_changes_before_a_resume_is_refused(linked, tmp_path):
    def convert():
        return convert_checkpoint(linked, tmp_path / "out", follow_links=True)

    with failing(8, errno.EIO, ("rename",)), pytest.raises(StorageError):
        convert()
    os.utime(tmp_path / "disk" / SHARD, ns=(1, 1))
    with pytest.raises(CheckpointError, match=f"{SHARD}: changed since the conversion"):
        convert()


@pytest.fixture(scope="module")
def orbax(converted):
    export_checkpoint(converted, converted.parent / "orbax", format="orbax")
    return converted.parent / "orbax"


def test_a_folder_of_an_orbax_checkpoint_may_lie_elsewhere_if_asked_for(orbax, converted, tmp_path):
    source = moved(shutil.copytree(orbax, tmp_path / "source"), ["d"], to=tmp_path / "disk")
    with pytest.raises(CheckpointError, match=r"source/d: a link that leads outside"):
        convert_checkpoint(source, tmp_path / "out")
    (note,) = convert_checkpoint(source, tmp_path / "out", follow_links=True).notes
    assert f"d to {tmp_path / 'disk' / 'd'}" in note
    assert files_of(tmp_path / "out") == files_of(converted)


def test_an_orbax_checkpoint_that_holds_itself_is_refused(orbax, tmp_path):
    source = shutil.copytree(orbax, tmp_path / "source")
    (source / "d" / "again").symlink_to(".")
    with pytest.raises(CheckpointError, match=r"d/again: a loop of links"):
        convert_checkpoint(source, tmp_path / "out")


def test_nothing_outside_the_source_is_ever_removed(linked, tmp_path):
    with pytest.raises(UsageError, match="delete_source and follow_links"):
        convert_checkpoint(linked, tmp_path / "out", follow_links=True, delete_source=True)
    assert (tmp_path / "disk" / SHARD).exists()


def test_the_next_command_refuses_links_again(linked, tmp_path):
    convert_checkpoint(linked, tmp_path / "out", follow_links=True)
    with pytest.raises(CheckpointError, match="leads outside"):
        convert_checkpoint(linked, tmp_path / "other")


# In place


@pytest.fixture
def linked_model(tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    names = ("model.safetensors", "config.json", "tokenizer.json")
    return moved(folder, names, to=tmp_path / "disk")


@pytest.mark.parametrize("verb", ["generate", "eval", "bench"])
def test_a_folder_that_runs_in_place_may_have_links_if_asked_for(
    linked_model, tmp_path, capsys, monkeypatch, verb
):
    monkeypatch.setattr("jlayer.app.verbs.bench.measure", lambda *_, **__: {"a": 1})
    text = tmp_path / "text"
    text.write_text("Once upon a time")
    words = {
        "generate": ["generate", str(linked_model), "-p", "Once", "-n", "2"],
        "eval": ["eval", "perplexity", str(linked_model), "--text", str(text)],
        "bench": ["bench", str(linked_model)],
    }[verb]
    words += ["--device", "cpu", "--json"]
    assert main(words) == 3
    assert "leads outside the folder" in (refused := capsys.readouterr().err)
    assert refused.endswith("or allow it with --follow-links\n")
    assert main([*words, "--follow-links"]) == 0
    assert f"model.safetensors to {tmp_path / 'disk'}/model.safetensors" in capsys.readouterr().err
    assert main(words) == 3  # the next one refuses them again


def test_python_says_what_python_can_do_and_names_the_links(linked_model, tmp_path):
    with pytest.raises(CheckpointError, match="or allow it with follow_links=True"):
        jlayer.AutoModel.from_pretrained(linked_model, device="cpu")
    with jlayer.AutoModel.from_pretrained(
        linked_model, device="cpu", dtype="float32", follow_links=True
    ) as model:
        (note,) = [note for note in model.notes if "links followed" in note]
        assert f"config.json to {tmp_path / 'disk'}/config.json" in note
        found = model.logits([[5, 6, 7]])
    with jlayer.AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
        assert (model.logits([[5, 6, 7]]) == found).all()
    with pytest.raises(UsageError, match="follow_links: found 'yes', expected a bool"):
        jlayer.AutoModel.from_pretrained(linked_model, device="cpu", follow_links="yes")


def test_links_of_adapters_are_followed_where_that_is_allowed(tiny, tmp_path):
    folders = [write_adapter(tmp_path / name, tiny) for name in ("own", "other")]
    for folder in folders:
        (folder / WEIGHTS).rename(tmp_path / f"{folder.name}.outside")
        (folder / WEIGHTS).symlink_to(tmp_path / f"{folder.name}.outside")
    given = {"adapter": folders[0], "adapters": [("other", folders[1])]}
    with pytest.raises(CheckpointError, match="or allow it with follow_links=True"):
        Store(tiny, **given)
    store = Store(tiny, **given, follow_links=True)
    for folder in folders:
        assert f"{folder}: links followed outside the folder: {WEIGHTS} to {tmp_path}" in str(
            store.notes
        )
    assert main(["plan", str(tiny), "--device", "cpu", "--adapter", str(folders[0])]) == 0


def test_a_plan_needs_no_leave_to_read_a_config(linked_model):
    assert main(["plan", str(linked_model), "--device", "cpu"]) == 0


def test_layers_of_a_converted_folder_may_lie_elsewhere(converted, tmp_path):
    """They are held against the manifest, wherever they lie."""
    folder = shutil.copytree(converted, tmp_path / "layered")
    moved(folder, (LAYER, "generation_config.json"), to=tmp_path / "disk")
    Store(folder)
    assert verify_folder(folder).findings == ()
    export_checkpoint(folder, tmp_path / "back", format="huggingface")
    export_checkpoint(converted, tmp_path / "expected", format="huggingface")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "expected")
    edit_json(folder / "generation_config.json", eos_token_id=3)
    assert seal_folder(folder).changed == ("generation_config.json",)
    assert verify_folder(folder).findings == ()
    (tmp_path / "disk" / LAYER).write_bytes(b"")
    assert verify_folder(folder).is_damaged
