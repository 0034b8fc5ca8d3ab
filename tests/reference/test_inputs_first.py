"""Experts that are published with their inputs first, as Llama 4's: where they lie, as those with
their rows first; each whole, in one read, and no more of them than are chosen."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import jlayer
from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint import source as in_place
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.checkpoint.source import SourceFile, Stored
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.sources import files as converting
from jlayer.encodings.registry import encoding
from jlayer.errors import CheckpointError
from jlayer.families.registry import layer_kinds
from jlayer.plan import making
from tests.reference.drawn import drawn_here, drawn_there
from tests.reference.mixture_forms import load, save
from tests.reference.test_stacked import WEIGHTS, apart, cfg_of, written
from tests.streaming.conftest import set_expert_rooms, set_tile_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 133, (1, 40))
PROMPTS = [IDS[0, :n].tolist() for n in (23, 5, 1)]
DOWN = "model.layers.1.feed_forward.experts.down_proj"
N_SPARSE, EXPERT_BYTES = 2, 4 * 3 * 14 * 24  # of the tiny model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model as it is published, and with its experts one by one, rows first."""
    whole = save(tmp_path_factory.mktemp("first") / "whole", "llama4")
    tensors = apart(cfg_of(whole), load_file(whole / WEIGHTS))
    return whole, written(whole.parent / "apart", whole, tensors)


def opened(folder, **options):
    return AutoModel.from_pretrained(folder, device="cpu", **options)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_they_run_where_they_lie(folders):
    found = []
    for folder in folders:
        with opened(folder) as model:
            found.append(model.logits(IDS))
    assert_close(*found)
    forms = [Store(folder).form_of(f"{DOWN[:-9]}0.down_proj.weight") for folder in folders]
    assert [encoding(form).by_rows for form in forms] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_16_bits_too(tmp_path, dtype):
    """The largest difference of a run in bfloat16 is a rounding of the logits themselves."""
    whole = save(tmp_path / "whole", "llama4", dtype="bfloat16")
    convert_checkpoint(whole, tmp_path / "layered")
    found = []
    for folder in (whole, tmp_path / "layered"):
        with opened(folder, dtype=dtype) as model:
            found.append(model.logits(IDS))
    most = {"float32": TOLERANCE, "bfloat16": 2.0**-7}[dtype] * np.abs(found[1]).max()
    np.testing.assert_allclose(*found, rtol=0, atol=most)


def test_an_expert_is_never_cut_and_what_is_kept_changes_no_number(folders, monkeypatch):
    set_tile_bytes(monkeypatch, 600)
    with opened(folders[0]) as model:
        tiles = [tile for of_layer in model.plan.tiling.experts for tile in of_layer]
        expected = model.logits(IDS)
    assert [tile.n_bytes for tile in tiles] == [4 * 24 * 28, 4 * 14 * 24] * N_SPARSE
    set_expert_rooms(monkeypatch, on_device=2, in_host=3, guessed=0)
    with opened(folders[0]) as model:
        for _ in range(2):
            np.testing.assert_array_equal(model.logits(IDS), expected)
        assert model.engine.totals.experts_in_host
        assert model.engine.totals.experts_on_device
    with opened(folders[1]) as model:
        assert {len(tiles) for tiles in model.plan.tiling.experts} == {8}


def test_only_what_is_chosen_moves(folders, monkeypatch):
    monkeypatch.setattr(making, "rooms", lambda counts, *_: (0,) * len(counts))
    with opened(folders[0]) as model:
        jlayer.generate(model, PROMPTS[1], temperature=0, max_new_tokens=1)
        before, n_before = model.engine.totals.put_bytes, model.engine.totals.experts_used
        options = {"temperature": 0, "max_new_tokens": 4, "eos_token_id": None}
        jlayer.generate(model, PROMPTS[2], speculate="off", **options)
        n_used = model.engine.totals.experts_used - n_before
        moved = model.engine.totals.put_bytes - before
        tiling = model.plan.tiling
        certain = sum(tiling.sizes[n] for n in tiling.certain)
        n_sparse = sum(kind.n_experts > 0 for kind in layer_kinds(model.engine.cfg))
    assert (n_sparse, n_used) == (N_SPARSE, 4 * N_SPARSE)  # one expert for each token
    assert abs(moved - 4 * certain - n_used * EXPERT_BYTES) < certain


@pytest.mark.slow
def test_a_batch_and_guesses_are_the_tokens_of_transformers(folders):
    expected = drawn_there(load(folders[0], torch.float32), PROMPTS, n_new=14)
    with opened(folders[0], context=64) as model:
        assert drawn_here(model, PROMPTS, n_new=14) == expected
        options = {"temperature": 0, "max_new_tokens": 14, "eos_token_id": None}
        guessed = jlayer.generate(model, PROMPTS, speculate="lookup", draft_tokens=5, **options)
    assert [one.token_ids for one in guessed] == expected


@pytest.mark.parametrize("strides", ["as published", "rows first", "experts last"])
def test_a_pickle_may_hold_them(folders, tmp_path, strides, monkeypatch):
    """However its tensors lie there, and however few columns are turned at a time."""
    monkeypatch.setattr(converting, "TURNED_BYTES", 1000)
    whole, alone = folders
    axes = {"as published": (0, 1, 2), "rows first": (0, 2, 1), "experts last": (1, 2, 0)}[strides]
    back = np.argsort(axes)
    tensors = {name: torch.from_numpy(array) for name, array in load_file(whole / WEIGHTS).items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 3:
            tensors[name] = tensor.permute(*axes).contiguous().permute(*back.tolist())
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(whole / "config.json", pickled)
    torch.save(tensors, pickled / "pytorch_model.bin")
    for source, target in ((pickled, "one"), (alone, "other")):
        convert_checkpoint(source, tmp_path / target)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(names) == 6
    for name in names:
        one, other = ((tmp_path / each / name).read_bytes() for each in ("one", "other"))
        assert one == other


def test_a_plan_of_the_config_alone_is_that_of_the_folder(folders, tmp_path, capsys, monkeypatch):
    """Where an expert is whole; of a converted one it is cut as all else is."""
    set_tile_bytes(monkeypatch, 600)
    convert_checkpoint(folders[0], tmp_path / "layered")
    found = []
    for ref in (folders[0] / "config.json", folders[0], tmp_path / "layered"):
        assert main(["plan", str(ref), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tile_bytes"])
    assert found[:2] == [4 * 24 * 28] * 2
    assert found[2] <= 600


def test_another_shape_is_told(folders, tmp_path):
    tensors = load_file(folders[0] / WEIGHTS)
    tensors[DOWN] = np.ascontiguousarray(tensors[DOWN].swapaxes(1, 2))
    folder = written(tmp_path / "turned", folders[0], tensors)
    with pytest.raises(CheckpointError) as caught:
        Store(folder)
    wrong = f"{DOWN} is [7, 24, 14], by config.json [7, 14, 24]: experts, columns, rows"
    assert wrong in str(caught.value)


def test_biases_of_all_experts_are_cut_as_rows_are():
    """A family with them is yet to come: three experts of four numbers."""
    file = SourceFile("x", "x", "x", 1 << 20, ())
    entry = TensorEntry("bfloat16", (3, 4), 100, 24)
    found = in_place.rows_of(Stored("b", file), entry, 8, 4, inputs_first=False)
    assert found[1] == TensorEntry("bfloat16", (4,), 116, 8)
    place, info = converting.Place("b", file, 100), converting.TensorInfo("bfloat16", (3, 4))
    place, info = converting.rows_of(place, info, 8, 4, inputs_first=False)
    assert (place.offset, place.strided, info.shape) == (116, None, (4,))
