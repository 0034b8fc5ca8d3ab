"""Weights under other names than the published ones, with tensors that nobody needs, tied or not:
the logits that Transformers gives of the same folder or, where it guesses at random, of the plain
one."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.errors import JlayerError
from jlayer.families.registry import published_tensors
from tests.convert.checkpoints import (
    edit_json,
    edit_tensors,
    join,
    numbers,
    read_tensors,
    split,
    tensor_of,
    tensors_of,
    write_tensors,
)
from tests.tiny import tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
IDS = np.random.default_rng(0).integers(0, 133, (1, 20))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Whether tied -> a folder of published names; read only."""
    home = tmp_path_factory.mktemp("plain")
    return {tied: tiny_llama(home / str(tied), tied=tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def logits_of(plain):
    """A folder, or whether the plain one is tied -> the logits that Transformers gives."""
    found = {}

    def logits(folder):
        folder = plain.get(folder, folder)
        if folder not in found:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
            with torch.no_grad():
                found[folder] = model(torch.tensor(IDS)).logits.numpy()
        return found[folder]

    return logits


def renamed(change):
    def edit(tensors):
        new = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(new)

    return edit


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def head_again(tensors):
    tensors[HEAD] = tensors[EMBEDDING]


def other_head(tensors):
    tensors[HEAD] = tensor_of(numbers(tensors[EMBEDDING])[::-1].copy())


def other_dtype(tensors):
    tensors[HEAD] = tensor_of(numbers(tensors[EMBEDDING]).astype(np.float16))


def bare(name):
    return name.removeprefix("model.")


# Run here, too; of the others the tensors are compared.
RUN_HERE = ("params", "another-head")
# name -> (tied, what is done to the tensors, whether Transformers reads that as we do: where not it
# makes up random numbers for whatever it does not find)
SPELLINGS = {
    "without-model": (False, renamed(bare), True),
    "without-model-tied": (True, renamed(bare), True),
    "one-layer-without-model": (False, renamed(lambda n: bare(n) if ".1." in n else n), True),
    "without-model-but-the-norm": (True, renamed(lambda n: n if n == NORM else bare(n)), True),
    "model-twice": (False, renamed("model.{}".format), True),
    "module": (False, renamed("module.{}".format), False),
    "params": (False, renamed("params.{}".format), False),
    "params-tied": (True, renamed("params.{}".format), False),
    "params-without-model": (False, renamed(lambda n: f"params.{bare(n)}"), False),
    "params-model-lm-head": (False, renamed(lambda n: f"params.model.{bare(n)}"), False),
    "peft": (False, renamed("base_model.model.{}".format), False),
    "compiled": (False, renamed("_orig_mod.{}".format), False),
    "transformer": (False, renamed(lambda n: n.replace("model.", "transformer.")), False),
    "head-alone": (True, head_alone, True),
    "head-alone-without-model": (True, lambda t: (head_alone(t), renamed(bare)(t)), True),
    "head-alone-under-params": (
        True,
        lambda t: (head_alone(t), renamed("params.{}".format)(t)),
        False,
    ),
    "head-again": (True, head_again, True),
    "head-again-without-model": (True, lambda t: (head_again(t), renamed(bare)(t)), True),
    "another-head": (True, other_head, True),
    "another-head-without-model": (True, lambda t: (other_head(t), renamed(bare)(t)), True),
    "head-of-another-dtype": (True, other_dtype, True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(plain, logits_of, tmp_path, spelling):
    tied, edit, is_shared = SPELLINGS[spelling]
    source = shutil.copytree(plain[tied], tmp_path / "source")
    edit_tensors(source / SINGLE, edit)
    convert_checkpoint(source, tmp_path / "target")
    expected = logits_of(source if is_shared else tied)
    assert_converted_is(source, tmp_path / "target", expected)
    if spelling in RUN_HERE:
        for folder in (source, tmp_path / "target"):
            with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
                found = model.logits(IDS)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


def assert_converted_is(source, target, expected):
    """The converted folder gives these logits in Transformers; in place its tensors are read."""
    again = transformers.AutoModelForCausalLM.from_pretrained(target, dtype="float32")
    with torch.no_grad():
        assert np.array_equal(again(torch.tensor(IDS)).logits.numpy(), expected)
    here, there = Store(source), Store(target)
    assert here.cfg == there.cfg
    names = published_tensors(here.cfg)
    assert {name: stored(here, name) for name in names} == {
        name: stored(there, name) for name in names
    }


def stored(store, name):
    segment = store.segment_of(name)
    raw = Path(segment.file).read_bytes()
    return raw[segment.offset : segment.offset + segment.n_bytes]


@pytest.mark.parametrize("delete", [False, True])
def test_a_head_of_its_own_survives_an_interrupted_conversion(
    plain, logits_of, tmp_path, monkeypatch, delete
):
    """The journal, too, knows that config.json is not right."""
    source = shutil.copytree(plain[True], tmp_path / "source")
    edit_tensors(source / SINGLE, other_head)
    expected = logits_of(source)
    real, calls = os.preadv, []

    def preadv(*arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", delete_source=delete)
    monkeypatch.undo()
    for status in ("converted", "unchanged"):
        summary = convert_checkpoint(source, tmp_path / "target", delete_source=delete)
        assert summary.status == status
    assert (source / SINGLE).exists() is not delete
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="float32")
    with torch.no_grad():
        assert np.array_equal(again(torch.tensor(IDS)).logits.numpy(), expected)


@pytest.mark.parametrize(
    "spelling", ["without-model", "params", "head-alone", "head-again", "another-head"]
)
def test_spelling_in_a_pickle(plain, tmp_path, spelling):
    tied, edit, _ = SPELLINGS[spelling]
    source = shutil.copytree(plain[tied], tmp_path / "source")
    edit_tensors(source / SINGLE, edit)
    convert_checkpoint(source, tmp_path / "expected")
    torch.save(
        {
            name: torch.tensor(numbers(tensor))
            for name, tensor in tensors_of(source / SINGLE).items()
        },
        source / "pytorch_model.bin",
    )
    (source / SINGLE).unlink()
    convert_checkpoint(source, tmp_path / "target")
    assert read_tensors(tmp_path / "target") == read_tensors(tmp_path / "expected")
    assert Store(tmp_path / "target").cfg == Store(tmp_path / "expected").cfg


def test_a_window_is_said_once_by_whoever_opens_the_folder(plain, logits_of, tmp_path):
    """Up to it all is as without; more is refused by length."""
    source = shutil.copytree(plain[False], tmp_path / "source")
    edit_json(source / "config.json", sliding_window=20)
    notes = [
        [note for note in notes if "a window of 20 tokens" in note]
        for notes in (Store(source).notes, convert_checkpoint(source, tmp_path / "target").notes)
    ]
    assert list(map(len, notes)) == [1, 1]
    with AutoModel.from_pretrained(tmp_path / "target", device="cpu", dtype="float32") as model:
        expected = logits_of(False)
        found = model.logits(IDS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
        with pytest.raises(JlayerError, match=r"\b20\b"):
            model.generate(IDS, max_new_tokens=1)


# Tensors that nobody needs.


UNUSED = {
    "I64": np.arange(6, dtype=np.int64),
    "I32": np.arange(6, dtype=np.int32),
    "U32": np.arange(6, dtype=np.uint32),
    "I16": np.arange(6, dtype=np.int16),
    "U16": np.arange(6, dtype=np.uint16),
    "U64": np.arange(6, dtype=np.uint64),
    "BOOL": np.array([True, False]),
    "F64": np.ones(3),
    "C64": np.ones(3, np.complex64),
    "F8_E4M3": np.ones(3, ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.ones(3, ml_dtypes.float8_e5m2),
    "U8": np.ones(3, np.uint8),
}


@pytest.mark.parametrize("dtype", UNUSED)
@pytest.mark.parametrize("name", ["extra.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_an_unused_tensor_may_be_of_any_dtype(plain, logits_of, tmp_path, dtype, name):
    """An extra one needs --allow-extra, a computed table needs nothing."""
    source = shutil.copytree(plain[False], tmp_path / "source")
    array = UNUSED[dtype]
    unused = {name: (dtype, array.shape, array.tobytes())}
    edit_tensors(source / SINGLE, lambda tensors: tensors.update(unused))
    is_extra = name.startswith("extra")
    if is_extra:
        with pytest.raises(JlayerError, match="--allow-extra"):
            convert_checkpoint(source, tmp_path / "target")
    else:
        Store(source)
    convert_checkpoint(source, tmp_path / "target", allow_extra=is_extra)
    assert read_tensors(tmp_path / "target") == read_tensors(plain[False])
    if dtype == "BOOL":
        assert np.array_equal(logits_of(source), logits_of(False))


TABLES = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
)


@pytest.mark.parametrize("name", TABLES)
def test_a_computed_table_may_be_stored_anywhere_or_only_promised(plain, tmp_path, name):
    table = tensor_of(np.ones(5, np.float32))
    for case, in_file, in_index in ((0, 1, 1), (1, None, 1), (2, 2, 1), (3, 1, None), (4, 2, 2)):
        source = sharded(plain[False], tmp_path / str(case))
        if in_file:
            shard = source / f"model-{in_file}.safetensors"
            edit_tensors(shard, lambda tensors: tensors.update({name: table}))
        if in_index:
            promise(source, name, f"model-{in_index}.safetensors")
        Store(source)
        convert_checkpoint(source, source / ".." / f"target-{case}")
        target = source.parent / f"target-{case}"
        assert read_tensors(target) == read_tensors(plain[False])


def test_an_index_entry_of_a_tied_head_that_is_nowhere(plain, tmp_path):
    source = sharded(plain[True], tmp_path / "source")
    promise(source, HEAD, "model-2.safetensors")
    Store(source)
    convert_checkpoint(source, tmp_path / "target")
    assert read_tensors(tmp_path / "target") == read_tensors(plain[True])


def test_an_index_entry_of_an_extra_tensor_that_is_nowhere(plain, tmp_path):
    source = sharded(plain[False], tmp_path / "source")
    promise(source, "ghost.weight", "model-2.safetensors")
    with pytest.raises(JlayerError, match=r"ghost.weight is in model-2.safetensors, .* nowhere"):
        convert_checkpoint(source, tmp_path / "target")
    convert_checkpoint(source, tmp_path / "target", allow_extra=True)
    assert read_tensors(tmp_path / "target") == read_tensors(plain[False])


def test_an_index_that_spells_names_otherwise_than_the_files(plain, tmp_path):
    source = sharded(plain[False], tmp_path / "source")
    for n in (1, 2):
        edit_tensors(source / f"model-{n}.safetensors", renamed("module.{}".format))
    Store(source)
    convert_checkpoint(source, tmp_path / "target")
    assert read_tensors(tmp_path / "target") == read_tensors(plain[False])


def test_metadata_that_is_null(plain, logits_of, tmp_path):
    source = shutil.copytree(plain[False], tmp_path / "source")
    header, data = split(source / SINGLE)
    join(source / SINGLE, {**header, "__metadata__": None}, data)
    assert np.array_equal(logits_of(source), logits_of(False))
    convert_checkpoint(source, tmp_path / "target")
    assert read_tensors(tmp_path / "target") == read_tensors(plain[False])


def sharded(plain, folder):
    """The same tensors in two files with an index."""
    source = shutil.copytree(plain, folder)
    tensors = tensors_of(source / SINGLE)
    (source / SINGLE).unlink()
    names = sorted(tensors)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    for n, half in halves.items():
        write_tensors(source / f"model-{n}.safetensors", {name: tensors[name] for name in half})
    weight_map = {name: f"model-{n}.safetensors" for n, half in halves.items() for name in half}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return source


def promise(source, name, shard):
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(source / INDEX, weight_map={**weight_map, name: shard})
