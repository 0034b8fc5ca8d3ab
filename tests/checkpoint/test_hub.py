"""Hub ids, against a server of our own: what is fetched, what goes on, and what is said if not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jlayer.app.cli import main
from jlayer.checkpoint import hub as hub_module
from jlayer.checkpoint.hub import Weights, is_hub_id, local_folder
from jlayer.errors import CheckpointError, DoesNotFitError, NetworkError
from tests.conftest import BUNDLED
from tests.convert.checkpoints import files_of, random_checkpoint
from tests.hub_server import COMMIT, Hub, library_turned_to

REPO = "someone/tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint in three shards, with what no one needs beside it."""
    folder = random_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    return files_of(folder)


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """The server, the library turned to it, and a cache of its own."""
    beside = {"README.md": b"no", "pytorch_model.bin": b"no", "original/consolidated.00.pth": b"no"}
    hub = Hub({REPO: {**published, **beside}})
    with library_turned_to(hub, tmp_path / "cache", monkeypatch):
        yield hub


def fetch(ref=REPO, **options):
    """The folder, and what was told."""
    told = []
    return local_folder(ref, note=told.append, **options), told


def test_only_what_is_needed_is_fetched_and_its_size_told_before(hub, published):
    folder, (told,) = fetch()
    assert hub.fetched() == set(published)
    assert {name: (Path(folder) / name).read_bytes() for name in published} == published
    assert os.path.basename(folder) == COMMIT
    # The config and the index, which say what the rest is, are there by then.
    assert f"{len(published) - 2} files to fetch" in told
    assert "free" in told
    sent = dict(hub.sent)
    assert fetch() == (folder, [])
    assert hub.sent == sent


def test_weights_that_can_only_be_converted_are_fetched_for_that_alone(hub, published):
    kept = {name: data for name, data in published.items() if "safetensors" not in name}
    hub.models[REPO] = {**kept, "pytorch_model.bin": b"weights", "pytorch_model.bin.index": b"no"}
    with pytest.raises(CheckpointError, match=f"run: jlayer convert {REPO} tiny-jlayer"):
        fetch()
    assert hub.fetched() == {"config.json"}
    fetch(weights=Weights.CONVERT)
    assert hub.fetched() == {*kept, "pytorch_model.bin"}


def test_templates_are_fetched_and_licences_where_the_model_is_to_be_converted(hub, published):
    template = "additional_chat_templates/tool_use.jinja"
    more = {template: b"{{ messages }}", "vocab.txt": b"a"}
    beside = {
        "LICENSE": b"terms",
        "additional_chat_templates/x.py": b"no",
        "original/NOTICE": b"no",
    }
    hub.models[REPO] = {**published, **more, **beside}
    folder, _ = fetch(weights=Weights.NONE)
    assert hub.fetched() == {name for name in published if "safetensors" not in name} | set(more)
    assert (Path(folder) / template).read_bytes() == more[template]
    fetch()
    assert hub.fetched() == {*published, *more}
    fetch(weights=Weights.CONVERT)
    assert hub.fetched() == {*published, *more, "LICENSE"}
    assert fetch(offline=True) == (folder, [])


def test_a_revision_is_what_is_asked_for(hub):
    fetch(f"{REPO}@v1")
    assert any("/resolve/v1/" in path for _, path in hub.asked)
    assert not any("/main/" in path for _, path in hub.asked)


def test_what_is_in_the_cache_in_part_is_completed(hub, published):
    fetch(weights=Weights.NONE)
    before = dict(hub.sent)
    assert "model-00001-of-00003.safetensors" not in before
    fetch()
    assert {name: hub.sent[name] for name in before} == before
    assert hub.fetched() == set(published)


def test_a_file_that_is_cut_off_goes_on_where_it_was(hub, published, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    shard = "model-00002-of-00003.safetensors"
    hub.cuts[shard] = 5000
    folder, _ = fetch()
    assert hub.sent[shard] == len(published[shard])  # no byte of it twice
    assert (Path(folder) / shard).read_bytes() == published[shard]


def test_after_a_failure_nothing_that_is_whole_is_fetched_again(hub, published):
    shard = "model-00002-of-00003.safetensors"
    hub.denies[f"/{shard}"] = (503, {}, 1000)
    with pytest.raises(NetworkError, match=r"fails .503.; try again later; what is fetched stays"):
        fetch()
    hub.denies.clear()
    fetch()
    assert all(hub.sent[name] == len(data) for name, data in published.items())


@pytest.mark.parametrize(
    ("denied", "said"),
    [
        ((401, {"X-Error-Code": "GatedRepo"}), "gated: ask for access"),
        ((403, {"X-Error-Code": "GatedRepo"}), "gated: ask for access"),
        ((401, {}), "denies access to config.json (401); set HF_TOKEN"),
        ((403, {}), "denies access to config.json (403); set HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "no such folder here, and no such model"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), "no revision 'main'"),
        ((404, {"X-Error-Code": "EntryNotFound"}), "no config.json"),
        ((429, {"Retry-After": "1"}), "limits how often it is asked (429)"),
        ((500, {}), "fails (500)"),
        ((503, {}), "fails (503)"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_no_of_the_hub_is_one_line_and_code_5(hub, capsys, denied, said):
    hub.denies["/resolve/"] = (*denied, 1000)
    hub.denies["/api/"] = (*denied, 1000)
    for words in (
        ["generate", REPO, "-p", "x", "--device", "cpu"],
        ["plan", REPO],
        ["convert", REPO, "/tmp/never-made"],
    ):
        assert main(words) == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert line.startswith(f"jlayer: {REPO}: ")


def test_a_token_opens_what_is_gated(hub, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(NetworkError, match="gated"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch()


def test_names_that_do_not_exist(hub):
    with pytest.raises(NetworkError, match="no such folder here, and no such model"):
        fetch("someone/else")
    with pytest.raises(NetworkError, match="no revision 'v9'"):
        fetch(f"{REPO}@v9")


def test_shards_that_the_index_names_and_the_hub_lacks_are_listed(hub):
    for n in (1, 3):
        del hub.models[REPO][f"model-{n:05d}-of-00003.safetensors"]
    with pytest.raises(CheckpointError, match=r"2 weight files .*00001-of-00003.*00003-of-00003"):
        fetch()


def test_an_index_that_names_files_elsewhere_is_refused_before_any_is_fetched(hub):
    index = {"weight_map": {"a": "../../x.safetensors"}}
    hub.models[REPO]["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(CheckpointError, match=r"'../../x.safetensors'"):
        fetch()


def test_no_room_is_said_before_the_first_byte_of_weights(hub, monkeypatch):
    real = hub_module.shutil.disk_usage
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: real(path)._replace(free=999))
    with pytest.raises(DoesNotFitError, match=r"need [\d,]+ bytes, have 999 free"):
        fetch()
    assert not any("of-00003" in name for name in hub.fetched())


def test_offline_takes_the_cache_or_says_what_it_lacks(hub, monkeypatch):
    with pytest.raises(NetworkError, match=r"offline, and config.json is not in the cache"):
        fetch(offline=True)
    folder, _ = fetch()
    asked = len(hub.asked)
    assert fetch(offline=True) == (folder, [])
    assert len(hub.asked) == asked
    os.unlink(os.path.join(folder, "model-00002-of-00003.safetensors"))
    with pytest.raises(NetworkError, match=r"not in the cache are model-00002-of-00003"):
        fetch(offline=True)


def test_without_a_network_a_whole_copy_in_the_cache_is_taken_and_said_so(hub, monkeypatch):
    endpoint = "http://127.0.0.1:9"  # nobody listens there
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(NetworkError, match="cannot be reached"):
        fetch()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    folder, _ = fetch()
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert fetch()[0] == folder
    assert "taken as it is in the cache" in fetch()[1][0]


def test_plan_fetches_the_config_alone_and_says_what_the_rest_is(hub, capsys):
    assert main(["plan", REPO, "--device", "cpu"]) == 0
    assert hub.fetched() == {"config.json"}
    assert "to fetch" in capsys.readouterr().err


def test_what_a_conversion_has_removed_from_the_cache_is_not_fetched_again(hub, tmp_path, capsys):
    words = ["convert", REPO, str(tmp_path / "layered"), "--delete-source", "--yes", "--json"]
    assert main(words) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert len(removed) == 3
    sent = dict(hub.sent)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unchanged"
    assert hub.sent == sent


def test_a_path_that_exists_wins_over_an_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(REPO)
    (tmp_path / REPO).mkdir(parents=True)
    assert not is_hub_id(REPO)
    assert fetch() == (REPO, [])
    assert hub.asked == []


@pytest.mark.parametrize("ref", ["nowhere", "a/b/c", "/a/b", "./a", "../a/b", "a/b@", "a b/c"])
def test_what_looks_like_neither_is_said_so(ref):
    with pytest.raises(CheckpointError, match=r"no such file or folder, and no hub id .owner/name"):
        local_folder(ref)


def test_convert_and_run_an_id_from_a_fresh_process(hub, tmp_path):
    """The environment alone, as a user sets it: endpoint, cache, and no offline mode."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def jlayer(*words, **more):
        return subprocess.Popen(
            [sys.executable, "-m", "jlayer", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**env, **more},
            cwd=tmp_path,
        )

    hub.models["someone/fable"] = files_of(BUNDLED)
    done = jlayer("convert", "someone/fable", "layered", "--json")
    _, err = done.communicate()
    assert done.returncode == 0, err
    asked = len(hub.asked)
    run = ["--prompt-ids", "5,6", "-n", "3", "--device", "cpu", "--temperature", "0", "--json"]
    converted = jlayer("generate", "layered", *run)
    in_place = jlayer("generate", "someone/fable", *run, "--offline")  # at the same time
    answers = [json.loads(one.communicate()[0])["token_ids"] for one in (converted, in_place)]
    assert len(hub.asked) == asked
    assert answers[0] == answers[1]
    refused = jlayer("plan", "someone/else", "--json", HF_HUB_OFFLINE="1")
    out, err = refused.communicate()
    assert refused.returncode == 5
    assert json.loads(out)["exit_code"] == 5
    assert len(err.splitlines()) == 1
