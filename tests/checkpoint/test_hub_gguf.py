"""GGUF files on the hub, against a server of our own: which one is meant, and what is refused."""

import json
import os
import re

import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.hub import is_id, local_folder
from jlayer.errors import CheckpointError, NetworkError
from jlayer.gguf.parts import models_called
from tests.conftest import BUNDLED
from tests.gguf.words import of_json
from tests.gguf_files import write
from tests.hub_server import COMMIT, Hub, library_turned_to

REPO = "someone/tiny-GGUF"
NAMES = (
    "tiny-Q4_K_M.gguf",
    "tiny-Q8_0.gguf",
    "mmproj-tiny-Q8_0.gguf",
    "big/tiny-UD-Q4_K_M.gguf",
    "BF16/tiny-BF16-00001-of-00002.gguf",
    "BF16/tiny-BF16-00002-of-00002.gguf",
    "tiny.Q5_0.gguf",
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub({REPO: {"README.md": b"no", **{name: name.encode() for name in NAMES}}})
    with library_turned_to(hub, tmp_path / "cache", monkeypatch):
        yield hub


def fetch(ref, **options):
    return local_folder(ref, note=lambda line: None, **options)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Q8_0", "tiny-Q8_0.gguf"),
        ("q5_0", "tiny.Q5_0.gguf"),
        ("UD-Q4_K_M", "big/tiny-UD-Q4_K_M.gguf"),
        ("tiny-Q4_K_M.gguf", "tiny-Q4_K_M.gguf"),
        ("BF16@v1", "BF16/tiny-BF16-00001-of-00002.gguf"),
    ],
)
def test_a_file_is_chosen_by_its_name_or_how_it_ends(hub, said, name):
    path = fetch(f"{REPO}:{said}")
    assert path.endswith(os.path.join("snapshots", COMMIT, name))
    parts = {one for one in NAMES if one.startswith("BF16/")} if "BF16" in said else {name}
    assert hub.fetched() == parts
    sent = dict(hub.sent)
    assert fetch(f"{REPO}:{said}") == fetch(f"{REPO}:{said}", offline=True) == path
    assert hub.sent == sent


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        (REPO, "holds 5 GGUF models ("),
        (f"{REPO}:Q4_K_M", "holds 2 GGUF models of this name ("),
        (f"{REPO}:K_M", "no GGUF model of this name ("),
        (f"{REPO}:Q9", "no GGUF model of this name ("),
        (f"{REPO}:mmproj-tiny-Q8_0.gguf", "no GGUF model of this name ("),
    ],
)
def test_what_means_several_or_none_is_refused_with_the_list(hub, ref, words):
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        fetch(ref)
    assert "'tiny-Q4_K_M.gguf'" in str(caught.value)
    assert f"name one by its file, or by how its name ends: {REPO}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.fetched() == set()


def test_the_advice_is_a_name_that_is_taken(hub):
    with pytest.raises(CheckpointError) as caught:
        fetch(REPO)
    assert fetch(str(caught.value).rpartition(" ")[2]).endswith(".gguf")


def test_a_repository_without_such_files_is_refused(hub):
    hub.models[REPO] = {"README.md": b"no", "mmproj-tiny.gguf": b"no"}
    with pytest.raises(CheckpointError, match="holds no GGUF model; name a repository that does"):
        fetch(f"{REPO}:Q8_0")
    with pytest.raises(NetworkError, match=r"no config\.json on"):
        fetch(REPO)


def test_other_weights_are_taken_unless_a_file_is_named(hub):
    kept = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.models[REPO] = {**kept, "tiny-Q8_0.gguf": b"one"}
    assert os.path.isdir(fetch(REPO))
    assert hub.fetched() == kept.keys()
    assert fetch(f"{REPO}:Q8_0").endswith("tiny-Q8_0.gguf")


@pytest.mark.parametrize("beside", [{}, {"config.json": b"{}"}], ids=["alone", "with a config"])
def test_the_only_one_needs_no_name(hub, beside):
    hub.models[REPO] = {**beside, "tiny-Q8_0.gguf": b"one"}
    path = fetch(REPO)
    assert path.endswith("tiny-Q8_0.gguf")
    assert fetch(f"{REPO}:Q8_0", offline=True) == path
    if not beside:
        assert fetch(REPO, offline=True) == path


def test_offline_without_a_file_says_so(hub):
    with pytest.raises(NetworkError, match="offline, and no GGUF model of it is in the cache"):
        fetch(f"{REPO}:Q8_0", offline=True)
    fetch(f"{REPO}:Q8_0")
    with pytest.raises(CheckpointError, match="no GGUF model of this name"):
        fetch(f"{REPO}:Q4_K_M", offline=True)


def test_pull_and_run(hub, tmp_path, capsys):
    write(BUNDLED, tmp_path / "m.gguf", kind="Q8_0", words=of_json(BUNDLED, "gpt-2", adds_bos=True))
    hub.models[REPO] |= {"tiny-Q8_0.gguf": (tmp_path / "m.gguf").read_bytes()}
    assert main(["pull", f"{REPO}:Q8_0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["revision"]) == (1, COMMIT)
    assert found["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert main(["plan", f"{REPO}:Q8_0"]) == 2
    assert "jlayer pull someone/tiny-GGUF:Q8_0" in capsys.readouterr().err
    texts = []
    for ref in (f"{REPO}:Q8_0", tmp_path / "m.gguf"):
        with AutoModel.from_pretrained(ref, device="cpu") as model:
            texts.append(model.generate([1, 2, 3], max_new_tokens=3))
    assert list(texts[0]) == list(texts[1])


def test_names_that_are_ids():
    assert all(map(is_id, ("a/b:Q4_K_M", "a/b:x/y-Q8_0.gguf@main", "a/b")))
    assert not any(map(is_id, ("a/b:", "a/b:@main", "a:b", "a/b:Q4:Q5", "a/b: Q4")))


def test_models_of_a_folder_are_called_by_their_names():
    assert models_called(None, NAMES) == [
        "BF16/tiny-BF16-00001-of-00002.gguf",
        "big/tiny-UD-Q4_K_M.gguf",
        "tiny-Q4_K_M.gguf",
        "tiny-Q8_0.gguf",
        "tiny.Q5_0.gguf",
    ]
    assert models_called("0", NAMES) == models_called("Q8", NAMES) == []
    assert models_called("tiny", ["tiny.gguf", "big-tiny.gguf", "tinytiny.gguf"]) == [
        "big-tiny.gguf",
        "tiny.gguf",
    ]
