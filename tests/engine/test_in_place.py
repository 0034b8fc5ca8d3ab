"""A published folder runs as it is: it gives the tokens of its conversion, and a file that changes
meanwhile is refused."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError
from jlayer.plan import making
from jlayer.plan.shapes import RunShape
from jlayer.streaming.place import VIEW_ALIGNMENT
from jlayer.streaming.steps import Put, Read
from tests.campaigns import slow_but
from tests.convert.checkpoints import edit_tensors, join, split, tensors_of, write_tensors
from tests.tiny import tiny_llama

IDS = [5, 17, 99, 3, 64, 128, 1]
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def hub_cache(source, home):
    """The same files as a download lays them out: links into blobs/, named by their hash."""
    snapshot = home / "models--a--b" / "snapshots" / "0123abc"
    blobs = home / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def shift_data(path, *, remainder):
    """Pads the header so that data begins at this remainder of 64: numbers at odd addresses."""
    header, data = split(path)
    text = json.dumps(header).encode()
    join(path, text.ljust(len(text) + (remainder - 8 - len(text)) % 64), data)


def mix_dtypes(path):
    """An odd number of bfloat16 first, so that all float32 after it begin inside an element."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("BF16", (3,), bytes(6))}
    write_tensors(path, {**extra, **tensors_of(path)})


def made(kind, folder):
    source = folder / "source"
    if kind == "sharded":
        return tiny_llama(source, sharded=True)
    if kind == "hub-cache":
        return hub_cache(tiny_llama(source, sharded=True), folder)
    if kind == "biased":
        return tiny_llama(source, attention_bias=True, mlp_bias=True, dtype="bfloat16")
    if kind == "tied-and-stored-again":
        tiny_llama(source, tied=True)
        edit_tensors(source / SINGLE, lambda t: t.update({HEAD: t[EMBEDDING]}))
        return source
    tiny_llama(source)
    if kind.startswith("at-"):
        shift_data(source / SINGLE, remainder=int(kind[3:]))
    if kind == "mixed-dtypes":
        mix_dtypes(source / SINGLE)
    return source


def run(folder):
    """A prompt's logits, the tokens after it, and the bytes that were copied to fix alignment."""
    with AutoModel.from_pretrained(folder, device="cpu", keeps_layers=False) as model:
        tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
        return model.logits(IDS), tokens, model.engine.totals.bounced_bytes


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Runs the conversion of a source, once for each kind of weights."""
    home, known = tmp_path_factory.mktemp("converted"), {}

    def answers(source, weights):
        if weights not in known:
            convert_checkpoint(source, home / weights)
            known[weights] = run(home / weights)
        return known[weights]

    return answers


SAME_WEIGHTS = ["single", "sharded", "hub-cache", "mixed-dtypes", "at-1", "at-8"]


KINDS = [*SAME_WEIGHTS, "biased", "tied-and-stored-again"]
QUICK = ("sharded", "mixed-dtypes", "at-1", "tied-and-stored-again")


@pytest.mark.parametrize("kind", slow_but(KINDS, QUICK))
def test_in_place_is_token_for_token_as_converted(tmp_path, converted, kind):
    source = made(kind, tmp_path)
    logits, tokens, bounced = converted(source, "plain" if kind in SAME_WEIGHTS else kind)
    found = run(source)
    assert np.array_equal(found[0], logits)
    assert found[1] == tokens
    assert found[2] > bounced


def test_in_tiles_too(tmp_path, converted, monkeypatch):
    source = made("at-8", tmp_path)
    monkeypatch.setattr(making, "TILE_BYTES", (3_000,))
    logits, tokens, _ = converted(source, "in tiles")
    found = run(source)
    assert np.array_equal(found[0], logits)
    assert found[1] == tokens


@pytest.mark.parametrize("kind", ["sharded", "at-1", "mixed-dtypes", "biased"])
@pytest.mark.parametrize("tile_bytes", [None, 1000])
def test_jax_takes_every_part_where_it_was_read_without_a_copy(
    tmp_path, monkeypatch, kind, tile_bytes
):
    monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    source, expected, reads, seen = made(kind, tmp_path), {}, {}, []
    for path in source.glob("*.safetensors"):
        expected |= tensors_of(path)

    def on_taken(step, taken):
        if isinstance(step, Read):
            reads[step.tile] = taken
        if isinstance(step, Put):
            seen.append(step.tile)
            views = reads[step.tile].result()
            for part in tiles[step.tile].parts:
                address = views[part.leaf].ctypes.data
                assert address % VIEW_ALIGNMENT == 0
                assert taken[part.leaf].unsafe_buffer_pointer() == address
                begin = part.first_row * (part.n_bytes // part.shape[0])
                published = expected[part.tensor][2][begin : begin + part.n_bytes]
                assert views[part.leaf].tobytes() == published

    with AutoModel.from_pretrained(source, device="cpu", keeps_layers=False) as model:
        model.engine.watch.on_taken = on_taken
        forward = model.engine.start(RunShape())
        tiles = forward.plan.tiles
        forward.stream()
        forward.close()
    assert set(seen) == set(range(len(tiles)))


def test_generate_runs_a_published_folder_and_says_what_was_moved(tmp_path, capsys):
    source = made("at-8", tmp_path)
    words = ["--prompt-ids", "5,17", "-n", "4", "--device", "cpu", "--json"]
    assert main(["generate", str(source), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    convert_checkpoint(source, tmp_path / "layered")
    assert main(["generate", str(tmp_path / "layered"), *words]) == 0
    converted = json.loads(capsys.readouterr().out)
    assert found["token_ids"] == converted["token_ids"]
    assert found["stats"]["bounced_bytes"] > converted["stats"]["bounced_bytes"]


def test_notes_of_the_folder_are_told(tmp_path, capsys):
    source = made("sharded", tmp_path)
    single = made("single", tmp_path / "other")
    shutil.copy(single / SINGLE, source / SINGLE)
    assert main(["generate", str(source), "--prompt-ids", "5", "-n", "1", "--device", "cpu"]) == 0
    assert f"{SINGLE} is taken" in capsys.readouterr().err


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def replace(path):
    copy = path.with_suffix(".new")
    shutil.copy2(path, copy)
    copy.rename(path)


def rewrite(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("change", [touch, replace, rewrite])
@pytest.mark.parametrize("shard", ["00001", "00004"], ids=["embedding", "layer"])
def test_a_file_that_changes_between_opening_and_the_first_sweep(tmp_path, change, shard):
    source = made("sharded", tmp_path)
    (path,) = source.glob(f"*-{shard}-of-*")
    with AutoModel.from_pretrained(source, device="cpu") as model:
        change(path)
        if change is replace and shard == "00001":
            model.generate(IDS, max_new_tokens=1)  # what is open is still what was checked
        else:
            with pytest.raises(CheckpointError, match=f"{path.name}: changed since"):
                model.generate(IDS, max_new_tokens=1)


@pytest.mark.parametrize("change", [touch, rewrite])
def test_a_file_that_changes_between_two_sweeps(tmp_path, change):
    source = made("sharded", tmp_path)
    (path,) = source.glob("*-00004-of-*")
    with AutoModel.from_pretrained(source, device="cpu", keeps_layers=False) as model:
        model.generate(IDS, max_new_tokens=2)
        change(path)
        with pytest.raises(CheckpointError, match=f"{path.name}: changed since"):
            model.generate(IDS, max_new_tokens=2)


def test_the_fingerprint_tells_models_apart_without_reading_them(tmp_path):
    one, other = tiny_llama(tmp_path / "one"), tiny_llama(tmp_path / "other", seed=1)
    assert Store(one).fingerprint == Store(one).fingerprint
    assert Store(one).fingerprint != Store(other).fingerprint
    cached = hub_cache(one, tmp_path)
    moved = shutil.copytree(tmp_path / "models--a--b", tmp_path / "moved", symlinks=True)
    assert Store(cached).fingerprint == Store(moved / "snapshots" / "0123abc").fingerprint


def test_blobs_may_lie_in_a_store_that_the_whole_cache_shares(tmp_path):
    """As huggingface_hub lays them out: blobs/HASH is a link, too, and its file not ours alone."""
    snapshot = hub_cache(tiny_llama(tmp_path / "source"), tmp_path)
    blobs, store = tmp_path / "models--a--b" / "blobs", tmp_path / "blobs" / "0f"
    store.mkdir(parents=True)
    for blob in blobs.iterdir():
        shutil.move(blob, store / blob.name)
        blob.symlink_to(f"../../blobs/0f/{blob.name}")
    assert Store(snapshot).fingerprint
    done = convert_checkpoint(snapshot, tmp_path / "layered", delete_source=True)
    assert done.removed == ()
    assert len(list(store.iterdir())) == len(list(snapshot.iterdir()))
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / "source" / SINGLE)
    with pytest.raises(CheckpointError, match="outside the folder"):
        Store(snapshot)
