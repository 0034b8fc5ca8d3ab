"""Real files: trained checkpoints, and the index of a 70B in 162 shards."""

import json

import pytest

from jlayer.checkpoint import safetensors
from jlayer.checkpoint.layout import encode_header
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.sources.open import open_source
from jlayer.errors import CheckpointError
from jlayer.families.registry import published_tensors
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.convert.checkpoints import files_of, read_tensors

pytestmark = needs_shared_data
CHECKPOINTS = ["aidreams260K", "fable-1m", "fable-3m", "stories260K"]
LARGE = "llama-3-70b-derivative-reflection"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trained_checkpoints_convert_and_verify(tmp_path, name):
    source = SHARED_DATA / "checkpoints" / name
    convert_checkpoint(source, tmp_path / "out")
    assert verify_folder(tmp_path / "out").findings == ()
    assert read_tensors(tmp_path / "out") == read_tensors(source)
    assert not {"SOURCE.md", "golden.json"} & files_of(tmp_path / "out").keys()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """723 tensors in 162 shards, 282 GB of holes."""
    folder = tmp_path_factory.mktemp("70b")
    index = (SHARED_DATA / "indexes" / f"{LARGE}.index.json").read_bytes()
    (folder / "model.safetensors.index.json").write_bytes(index)
    config = (SHARED_DATA / "configs" / f"{LARGE}.json").read_bytes()
    (folder / "config.json").write_bytes(config)
    shapes, shards = published_tensors(read_config(folder)), {}
    for tensor, shard in json.loads(index)["weight_map"].items():
        shards.setdefault(shard, {})[tensor] = shapes[tensor]
    for shard, held in shards.items():
        header, entries = encode_header(held, dict.fromkeys(held, "float32"))
        with open(folder / shard, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(entry.n_bytes for entry in entries.values()))
    return folder


def test_a_70b_in_162_shards_is_checked_by_its_headers(large, monkeypatch):
    read, parsed = safetensors.parse_header, []

    def counted(raw, *, file_bytes, where):
        parsed.append(len(raw))
        return read(raw, file_bytes=file_bytes, where=where)

    monkeypatch.setattr(safetensors, "parse_header", counted)
    source = open_source(str(large))
    assert len(source.tensors.tensors) == 723
    assert len(parsed) == 162  # each once


def test_its_missing_shards_are_listed_at_once(large, tmp_path):
    names = sorted(path.name for path in large.glob("*.safetensors"))
    for path in large.iterdir():
        if path.name not in names[10:20]:
            (tmp_path / path.name).hardlink_to(path)
    with pytest.raises(CheckpointError) as caught:
        open_source(str(tmp_path))
    assert all(name in str(caught.value) for name in names[10:20])
    assert "10 of 162" in str(caught.value)
