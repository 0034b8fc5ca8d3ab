"""The stream itself: what is alive when, what compiles, what an error leaves behind."""

import gc
import shutil
import threading

import jax
import numpy as np
import pytest

from convert import convert_checkpoint
from jlayer import AutoModel
from jlayer.errors import CheckpointError
from jlayer.run.executor import Executor
from jlayer.run.programs import backend_compiles
from jlayer.weights.schedule import Free, Run
from tests.tiny import tiny_llama

IDS = [5, 17, 99, 3, 64, 128, 1]


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jlayer-reader")]


def live_layers():
    """Layers on the device, by the one matrix of its shape that each has."""
    return sum(array.shape == (24, 40) for array in jax.live_arrays())


def logits_token_by_token(model):
    forward = model.forward(batch=1, longest=1, context=len(IDS))
    return np.concatenate([forward.sweep([[token]], [at]) for at, token in enumerate(IDS)], axis=1)


def replace_executor(model, n_slots):
    tiles = model.executor.tiles
    model.executor.close()
    model._executor = Executor(model._store, tiles, n_slots=n_slots, device=model.device)


@pytest.mark.parametrize("n_slots", [1, 3, 7])
def test_depth_changes_nothing(tiny, n_slots):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        expected = logits_token_by_token(model)
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        replace_executor(model, n_slots)
        found = logits_token_by_token(model)
        model.executor.close()
    assert np.array_equal(found, expected)


def test_streamed_equals_resident(tiny):
    """The same blocks over weights that were loaded whole, without slots, reader or schedule."""
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        streamed = model.logits(IDS)
        resident = {}
        for tile in model.executor.tiles:
            resident[tile.name] = {
                part.leaf: jax.numpy.array(load(model, part)) for part in tile.parts
            }

        def sweep(run):
            for tile in model.executor.tiles:
                run(tile, resident[tile.name])

        model.executor.sweep = sweep
        assert np.array_equal(model.logits(IDS), streamed)


def load(model, part):
    segment = model._store.segment_of(part.tensor)
    whole = np.fromfile(segment.file, np.uint8)[segment.offset : segment.offset + segment.n_bytes]
    width = part.shape[1:]
    return whole.view(part.dtype).reshape(-1, *width)[
        part.first_row : part.first_row + part.shape[0]
    ]


def test_cached_equals_recomputed(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        cached = logits_token_by_token(model)
        recomputed = model.logits(IDS)
    np.testing.assert_allclose(cached, recomputed, rtol=0, atol=1e-5 * np.abs(recomputed).max())


def test_an_80_layer_model_compiles_exactly_as_often_as_a_2_layer_one(tmp_path):
    counts, shapes = [], []
    for layers in (2, 80):
        source = tiny_llama(tmp_path / f"source-{layers}", num_hidden_layers=layers)
        convert_checkpoint(source, tmp_path / f"layered-{layers}")
        before = backend_compiles()
        with AutoModel.from_pretrained(tmp_path / f"layered-{layers}", device="cpu") as model:
            model.generate(IDS, max_new_tokens=6, do_sample=False)
            shapes.append(model.compiles)
        counts.append(backend_compiles() - before)
    assert counts[0] == counts[1]
    assert shapes[0] == shapes[1]
    assert set(shapes[0].values()) == {1}
    assert sum(shapes[0].values()) == counts[0]  # nothing compiles that is not reported


def test_a_sweep_compiles_nothing_that_an_earlier_one_of_its_shape_did(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        before = backend_compiles()
        model.generate(IDS[:5], max_new_tokens=9, do_sample=False)
        assert backend_compiles() == before


def test_at_most_two_layers_are_alive_and_their_bytes_stay_within_the_plan(tiny):
    gc.collect()  # another test's resident weights
    seen = []
    with AutoModel.from_pretrained(tiny, device="cpu") as model:

        def watch(step, tile):
            if isinstance(step, (Run, Free)):
                seen.append(live_layers())

        model.executor.on_step = watch
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        totals, plan = model.executor.totals(), model.plan
    assert max(seen) == 2
    assert totals.most_live_tiles == 2
    assert 0 < totals.most_live_bytes <= plan.device.slots_bytes


def test_closing_drops_every_weight(tiny):
    gc.collect()
    assert live_layers() == 0
    model = AutoModel.from_pretrained(tiny, device="cpu")
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert live_layers() == 1  # the order wraps: the next sweep's first layer is there
    model.close()
    assert live_layers() == 0


def test_a_layer_cut_off_under_the_running_model_is_named_and_leaves_no_thread(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    model = AutoModel.from_pretrained(folder, device="cpu")
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    path = folder / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"layer 1: .*layer-00001.*cut off"):
        model.generate(IDS, max_new_tokens=30, do_sample=False)
    model.close()
    assert reader_threads() == []


def test_after_an_interrupt_the_model_goes_on_as_if_nothing_had_been(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        expected = model.logits(IDS)
        steps = 0

        def interrupt(step, tile):
            nonlocal steps
            steps += 1
            if steps == 9:
                raise KeyboardInterrupt

        model.executor.on_step = interrupt
        with pytest.raises(KeyboardInterrupt):
            model.logits(IDS)
        model.executor.on_step = None
        assert np.array_equal(model.logits(IDS), expected)


def test_no_thread_outlives_the_model(tiny):
    model = AutoModel.from_pretrained(tiny, device="cpu")
    model.logits(IDS)
    assert len(reader_threads()) == 1
    del model
    gc.collect()
    assert reader_threads() == []
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        model.logits(IDS)
    assert reader_threads() == []


def test_sequences_of_different_lengths_share_sweeps_and_keep_their_own_answers(tiny):
    rows = [IDS, IDS[:2], [9, 9, 9, 100, 4, 4, 4, 4, 4, 4, 11]]
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        alone = [model.generate([row], max_new_tokens=6, do_sample=False)[0] for row in rows]
        before = model.executor.totals().sweeps
        together = model.generate(rows, max_new_tokens=6, do_sample=False)
        assert model.executor.totals().sweeps - before == 6
    assert together == alone
