"""The stream itself: what is alive when, what compiles, what an error leaves behind."""

import errno
import gc
import os
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.checkpoint import safetensors as header
from jlayer.convert import convert_checkpoint
from jlayer.engine import alike, engine
from jlayer.engine.compiles import backend_compiles
from jlayer.errors import CheckpointError, DoesNotFitError, StorageError
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming import incoming
from jlayer.streaming.direct import n_readers
from jlayer.streaming.executor import Executor
from jlayer.streaming.steps import Free, Put, Run
from tests.campaigns import slow_but
from tests.tiny import stored_arrays, tiny_llama

IDS = [5, 17, 99, 3, 64, 128, 1]


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jlayer-reader")]


def live_layers():
    """Layers on the device, by the one matrix of its shape that each has."""
    return sum(array.shape == (24, 40) for array in jax.live_arrays())


def logits_token_by_token(model):
    forward = model.engine.start(RunShape(context=len(IDS)))
    found = [forward.sweep([[token]], [at]) for at, token in enumerate(IDS)]
    forward.close()
    return np.concatenate(found, axis=1)


TILINGS = [None, 10_000, 3_000, 500, 1]


@pytest.fixture(scope="module")
def whole(tiny):
    """What the model says when it is cut as is best: eight greedy tokens, and the logits."""
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        return model.generate(IDS, max_new_tokens=8, do_sample=False), model.logits(IDS)


@pytest.fixture(scope="module", params=slow_but(TILINGS, (None, 3_000, 500)))
def tiling(request):
    """(tile_bytes, what is compiled for it): where the tiles lie changes no program."""
    return request.param, []


@pytest.mark.parametrize("keeps_layers", [True, False], ids=["kept", "from-disk"])
def test_tiled_equals_whole_wherever_it_lies(tiny, whole, cuts, tiling, keeps_layers):
    expected, exact = whole
    tile_bytes, programs = tiling
    cuts(tile_bytes)
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=keeps_layers) as model:
        programs.append(model.engine.programs)
        model.engine.programs = programs[0]
        assert model.generate(IDS, max_new_tokens=8, do_sample=False) == expected
        found = model.logits(IDS)
        if tile_bytes:
            assert len(model.plan.tiles) > 12
        reads = model.engine.totals.read_bytes
        model.logits(IDS)
        assert (model.engine.totals.read_bytes > reads) == (not keeps_layers)
    # Rows of a product are the same sums; only the library's order within one may differ.
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_biases_travel_with_their_rows(tmp_path, cuts):
    source = tiny_llama(tmp_path / "source", attention_bias=True, mlp_bias=True)
    convert_checkpoint(source, tmp_path / "layered")
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu") as model:
        expected = model.logits(IDS)
    cuts(700)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu") as model:
        found = model.logits(IDS)
        assert len(model.plan.tiles) > 50
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


D, H, K = Tier.DEVICE, Tier.HOST, Tier.DISK


MIXES = [(D, H, K), (K, D, H), (H, K, D), (D, D, H), (H, H, K)]


@pytest.mark.parametrize("tiers", slow_but(MIXES, MIXES[:2]))
def test_every_mix_of_tiers_gives_the_same_tokens(tiny, whole, cuts, tiers_in_turn, tiers):
    expected, _ = whole
    cuts(3_000)
    tiers_in_turn(*tiers)
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        assert model.generate(IDS, max_new_tokens=8, do_sample=False) == expected
        assert model.plan.tiers[:6] == (*tiers, *tiers)


@pytest.mark.slow
def test_every_budget_down_to_the_smallest_gives_the_same_tokens(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
        smallest = make_smallest(model)
    for extra in (0, 1, 1000, 20_000, 10**6):
        options = {"device": "cpu", "device_memory": smallest + extra}
        with AutoModel.from_pretrained(tiny, **options) as model:
            assert model.generate(IDS, max_new_tokens=6, do_sample=False) == expected
            assert model.engine.device_peak_bytes <= smallest + extra
    model = AutoModel.from_pretrained(tiny, device="cpu", device_memory=smallest)
    with pytest.raises(DoesNotFitError, match="slots"), model:
        model.generate(IDS, max_new_tokens=100, do_sample=False)


def make_smallest(model):
    """The least device memory that this generation is accepted with."""
    machine = replace(model.plan.machine, device_budget=1)
    run = RunShape(longest=len(IDS), context=len(IDS) + 6)
    return make_plan(model.engine.weights, machine, run).device_peak_bytes


def test_streamed_equals_resident(tiny):
    """The same blocks over weights that were loaded whole, without slots, readers or schedule."""
    arrays = stored_arrays(tiny)

    def resident(part):
        rows = arrays[part.tensor][part.first_row : part.first_row + part.shape[0]]
        return jax.numpy.array(rows)

    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        streamed = model.logits(IDS)
        forward = model.engine.start(RunShape(longest=len(IDS), context=len(IDS), all_logits=True))
        forward.compile(len(IDS), all_logits=True)
        passing = forward.enter([IDS], [0], all_logits=True)
        logits = []
        for tile in model.plan.tiles:
            weights = {part.leaf: resident(part) for part in tile.parts}
            (output,) = forward.advance(tile, weights, passing)
            if tile.kind is None:
                logits.append(np.asarray(output))
        forward.close()
    found = np.concatenate(logits, axis=-1)[None, : len(IDS)]
    assert np.array_equal(found, streamed)


def test_cached_equals_recomputed(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        cached = logits_token_by_token(model)
        recomputed = model.logits(IDS)
    np.testing.assert_allclose(cached, recomputed, rtol=0, atol=1e-5 * np.abs(recomputed).max())


def test_an_80_layer_model_compiles_exactly_as_often_as_a_2_layer_one(tmp_path, compiled_anew):
    counts, shapes = [], []
    for layers in (2, 80):
        source = tiny_llama(tmp_path / f"source-{layers}", num_hidden_layers=layers)
        convert_checkpoint(source, tmp_path / f"layered-{layers}")
        before = backend_compiles()
        with AutoModel.from_pretrained(tmp_path / f"layered-{layers}", device="cpu") as model:
            model.generate(IDS, max_new_tokens=6, do_sample=False)
            shapes.append(model.engine.compiles)
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

        model.engine.watch.on_step = watch
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        totals, plan = replace(model.engine.totals), model.plan
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
    model = AutoModel.from_pretrained(folder, device="cpu", keeps_layers=False)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    path = folder / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    # What was read before is used before: then its file is found changed, not cut off.
    with pytest.raises(CheckpointError, match=r"layer-00001.*(cut off|changed since)"):
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

        model.engine.watch.on_step = interrupt
        with pytest.raises(KeyboardInterrupt):
            model.logits(IDS)
        model.engine.watch.on_step = None
        assert np.array_equal(model.logits(IDS), expected)


def test_inside_a_sweep_nothing_is_opened_parsed_compiled_or_collected(tiny, monkeypatch):
    """Counted: opens, header parses, backend compiles and cyclic collections while a sweep runs."""
    counts = Counter()
    inside = False

    def audit(event, arguments):
        if inside and event == "open":
            counts["open"] += 1

    sys.addaudithook(audit)
    gc.callbacks.append(lambda phase, info: counts.update(["gc"] * inside))
    parse = header.parse_header

    def counting(*arguments, **options):
        counts.update(["header"] * inside)
        return parse(*arguments, **options)

    monkeypatch.setattr(header, "parse_header", counting)
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        forward = model.engine.start(RunShape(context=40))
        forward.sweep([[5]], [0])
        compiled = backend_compiles()
        thresholds = gc.get_threshold()
        gc.set_threshold(5, 1, 1)  # would collect all the time
        steps = []  # what had been counted when each step was taken

        def watch(step, tile):
            nonlocal inside
            inside = True
            steps.append(dict(counts))

        model.engine.watch.on_step = watch
        for at in range(1, 30):
            steps.clear()
            forward.sweep([[at]], [at])
            inside = False
            assert steps[0] == steps[-1]
        gc.set_threshold(*thresholds)
        assert backend_compiles() == compiled
    gc.callbacks.pop()
    assert counts["gc"] > 0  # between sweeps the collector does run


def test_no_thread_outlives_the_model(tiny):
    model = AutoModel.from_pretrained(tiny, device="cpu")
    model.logits(IDS)
    assert 1 <= len(reader_threads()) <= n_readers()
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
        before = model.engine.totals.sweeps
        together = model.generate(rows, max_new_tokens=6, do_sample=False)
        assert model.engine.totals.sweeps - before == 6
    assert together == alone


def test_an_error_of_the_disk_names_the_layer_and_the_byte(tiny, monkeypatch):
    real = os.preadv
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)

        def failing(fd, buffers, offset, *flags):
            if "00002" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(StorageError, match=r"layer 2: .*at byte \d+ \(Input/output error\)"):
            model.generate(IDS, max_new_tokens=9, do_sample=False)
    assert StorageError.exit_code == 6


def test_a_disk_that_stalls_is_told_of_and_the_run_goes_on(tiny, monkeypatch):
    real, waits = os.preadv, iter([0.25])

    def slow(fd, buffers, offset, *flags):
        if threading.current_thread().name.startswith("jlayer-reader"):
            time.sleep(next(waits, 0))
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(incoming, "PATIENCE_S", 0.05)
    told = []
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        expected = model.generate(IDS, max_new_tokens=3, do_sample=False)
        model.engine.watch.on_stall = lambda tile, seconds: told.append((tile.name, seconds))
        monkeypatch.setattr(os, "preadv", slow)
        assert model.generate(IDS, max_new_tokens=3, do_sample=False) == expected
    assert told
    assert told[0][0].startswith(("layer", "head"))


def test_a_short_read_is_read_on(tiny, monkeypatch):
    real, cut_short = os.preadv, []

    def short(fd, buffers, offset, *flags):
        asked = len(buffers[0])
        count = real(fd, [buffers[0][: max(4096, asked // 8192 * 4096)]], offset, *flags)
        cut_short.append(count < asked)
        return count

    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        expected = model.logits(IDS)
        monkeypatch.setattr(os, "preadv", short)
        assert np.array_equal(model.logits(IDS), expected)
    assert any(cut_short)


def test_a_file_system_without_direct_reads_is_read_through_the_cache_and_said_so(
    tiny, monkeypatch
):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        expected = model.logits(IDS)
    real = os.open

    def refusing(path, flags, *arguments):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    found = jlayer.generate(tiny, IDS, max_new_tokens=2, temperature=0, device="cpu")
    assert found.stats["reads"] == "buffered"
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        assert np.array_equal(model.logits(IDS), expected)


def test_a_failure_of_the_device_is_an_error_of_its_tile(tiny, monkeypatch):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        model.logits(IDS)
        real, fails = jax.device_put, False

        def watch(step, tile):
            nonlocal fails
            fails = isinstance(step, Put) and tile.layer == 1

        def failing(*given):
            if fails:
                raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
            return real(*given)

        model.engine.watch.on_step = watch
        monkeypatch.setattr(jax, "device_put", failing)
        with pytest.raises(StorageError, match=r"layer 1: the device failed .*gone"):
            model.logits(IDS)


@pytest.fixture
def executors(monkeypatch):
    """The tiles of every executor that an engine makes, in order."""
    made = []

    def noting(store, tiles, *given, **options):
        made.append(tiles)
        return Executor(store, tiles, *given, **options)

    monkeypatch.setattr(engine, "Executor", noting)
    return made


def test_a_larger_run_makes_room_and_a_smaller_one_goes_on_as_it_is(tiny, monkeypatch, executors):
    """What is kept makes way for a longer context; what streams is not rebuilt without need."""
    monkeypatch.setattr(alike, "anonymous_bytes", lambda: 100 << 20)
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        expected = model.generate(IDS, max_new_tokens=190, do_sample=False)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert len(executors) == 1
        needed = model.engine.plan_for(RunShape(longest=7, context=197))
        assert needed.tier_bytes(Tier.HOST) == needed.tiling.n_bytes
    # Too little for all tiles, even with the fewest rows a chunk; enough beside a short context.
    budget = needed.host_peak_bytes - 200_000
    with AutoModel.from_pretrained(tiny, device="cpu", host_memory=budget) as model:
        short = model.generate(IDS, max_new_tokens=2, do_sample=False)
        kept = model.plan.tier_bytes(Tier.HOST)
        found = model.generate(IDS, max_new_tokens=190, do_sample=False)
        assert 0 <= model.plan.tier_bytes(Tier.HOST) < kept
        assert model.plan.host_peak_bytes <= budget
    assert found == expected
    assert short == expected[: len(short)]
