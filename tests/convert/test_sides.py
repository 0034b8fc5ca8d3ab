"""What lies beside the weights is carried along: by convert, by export, and back again."""

import os
import shutil

import pytest

from jlayer.checkpoint.layout import is_side_file, read_manifest
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.export import export_checkpoint
from jlayer.errors import CheckpointError, UsageError
from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED
from tests.convert.checkpoints import CARRIED, files_of, random_checkpoint
from tests.convert.kills import killed

MESSAGES = [{"role": "user", "content": "Once"}]
TEMPLATES = "additional_chat_templates"


def with_templates(folder):
    """Gives a folder a usual template and two more, and a licence."""
    (folder / "chat_template.jinja").write_text("usual: {{ messages[0].content }}")
    (folder / TEMPLATES).mkdir()
    for name in ("tool_use", "rag"):
        (folder / TEMPLATES / f"{name}.jinja").write_text(f"{name}: {{{{ messages[0].content }}}}")
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return with_templates(shutil.copytree(BUNDLED, tmp_path_factory.mktemp("sides") / "source"))


@pytest.fixture(scope="module")
def layered(published):
    convert_checkpoint(published, published.parent / "layered")
    return published.parent / "layered"


def transformers_templates(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"tokenize": False, "add_generation_prompt": True}
    return {
        name: tokenizer.apply_chat_template(MESSAGES, chat_template=name, **options)
        for name in tokenizer.chat_template
    }


def our_templates(folder):
    tokenizer = Tokenizer.from_folder(folder)
    return {
        name: tokenizer.render_chat(MESSAGES, chat_template=name)
        for name in tokenizer.chat_templates
    }


def test_templates_are_converted_and_exported(published, layered, tmp_path):
    expected = transformers_templates(published)
    assert expected.keys() == {"default", "tool_use", "rag"}
    assert our_templates(published) == expected
    export_checkpoint(layered, tmp_path / "back", format="huggingface")
    export_checkpoint(layered, tmp_path / "orbax", format="orbax")
    for folder in (layered, tmp_path / "back", tmp_path / "orbax"):
        assert our_templates(folder) == expected
        assert transformers_templates(folder) == expected
        assert (folder / "LICENSE").read_text() == "terms"
    convert_checkpoint(tmp_path / "orbax", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(layered)


def test_a_template_is_sealed_by_the_manifest(layered):
    assert f"{TEMPLATES}/rag.jinja" in read_manifest(layered).files
    assert verify_folder(layered).findings == ()


def test_whatever_file_a_tokenizer_of_transformers_reads_is_carried():
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
    from transformers.utils import hub

    rows = TOKENIZER_MAPPING_NAMES.values()
    names = {name for row in rows for name in (row if isinstance(row, tuple) else [row]) if name}
    kinds = [getattr(transformers, name, None) for name in names]
    read = {name for kind in kinds for name in getattr(kind, "vocab_files_names", {}).values()}
    read |= {hub.CHAT_TEMPLATE_FILE, hub.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE}
    read |= {f"{hub.CHAT_TEMPLATE_DIR}/name of it.jinja"}
    read |= {
        getattr(transformers.utils, name)
        for name in dir(transformers.utils)
        if name in ("GENERATION_CONFIG_NAME", "CONFIG_NAME")
        or name.endswith(("PROCESSOR_NAME", "EXTRACTOR_NAME", "TOKENIZER_NAME"))
    }
    assert len(read) > 25
    assert [name for name in sorted(read - {None}) if not is_side_file(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        *("license.py", "notice.bin", "a/LICENSE", "../LICENSE", "README.md", "modeling_evil.py"),
        *("model.safetensors.index.json", "adapter_config.json", "quantize_config.json"),
        *(f"{TEMPLATES}/x.py", f"{TEMPLATES}/../x.jinja", f"{TEMPLATES}/a/b.jinja"),
        *(f"{TEMPLATES}/.jinja\n.jinja", "original/tokenizer.model", "x.jinja"),
    ],
)
def test_nothing_else_is(name):
    assert not is_side_file(name)


def test_a_hub_cache_has_its_templates_as_links(published, layered, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    blobs.mkdir(parents=True)
    for n, name in enumerate(files_of(published)):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published / name, blobs / f"{n:064x}")
        up = os.path.relpath(blobs / f"{n:064x}", (snapshot / name).parent)
        (snapshot / name).symlink_to(up)
    convert_checkpoint(snapshot, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(layered)


def test_a_folder_of_templates_that_leads_outside_is_refused(published, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")
    (source / TEMPLATES).rename(tmp_path / "elsewhere")
    (source / TEMPLATES).symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        convert_checkpoint(source, tmp_path / "out")


def test_a_template_whose_name_cannot_be_kept_is_named(published, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")
    (source / TEMPLATES / "a\nb.jinja").write_text("")
    with pytest.raises(CheckpointError, match=r"the template .*a\\nb\.jinja' cannot be kept"):
        convert_checkpoint(source, tmp_path / "out")


def test_overwriting_leaves_no_template_behind(layered, tmp_path):
    target = shutil.copytree(layered, tmp_path / "out")
    convert_checkpoint(BUNDLED, target, overwrite=True)
    assert not (target / TEMPLATES).exists()
    convert_checkpoint(BUNDLED, tmp_path / "fresh")
    assert files_of(target) == files_of(tmp_path / "fresh")


def test_a_target_with_other_files_among_its_templates_is_left_alone(published, layered, tmp_path):
    target = shutil.copytree(layered, tmp_path / "out")
    (target / TEMPLATES / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        convert_checkpoint(published, target, overwrite=True)
    assert (f"'{TEMPLATES}/notes.txt' is not part of it",) == verify_folder(target).findings


def test_a_lost_template_is_written_again(published, layered, tmp_path):
    target = shutil.copytree(layered, tmp_path / "out")
    (target / TEMPLATES / "rag.jinja").unlink()
    assert convert_checkpoint(published, target).status == "converted"
    assert files_of(target) == files_of(layered)


def test_a_conversion_killed_among_its_templates_resumes_to_the_same_bytes(tmp_path):
    source = random_checkpoint(tmp_path / "source", n_shards=1, num_hidden_layers=1)
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "rag.jinja").write_text("rag")
    convert_checkpoint(source, tmp_path / "whole")
    states = killed("convert", source, tmp_path / "whole", n_last=40)
    assert set(states) == {"none", "new"}
    assert len(states) == 40


def test_every_form_of_name_is_carried(published, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")
    for name in CARRIED:
        (source / name).write_text(name)
    convert_checkpoint(source, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back", format="huggingface")
    for folder in ("out", "back"):
        for name in CARRIED:
            assert (tmp_path / folder / name).read_text() == name
