"""One engine, any number of runs: whatever is alive together fits the budgets, and no run notices
another."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel, DoesNotFitError, UsageError
from jlayer.convert import convert_checkpoint
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape, pool_rows
from jlayer.plan.tiles import Tier
from jlayer.spec import Leaf
from tests.tiny import tiny_llama

IDS = [1, 5, 9, 33, 7]
PROMPTS = [[1, 5, 9], [2, 8, 4, 11, 40], [7]]
OPTIONS = {"max_new_tokens": 8, "temperature": 0.8, "seed": 3}


@pytest.fixture(autouse=True)
def baseline(monkeypatch):
    """Plans of two openings are compared here, and this process grows between them."""
    monkeypatch.setattr("jlayer.engine.alike.anonymous_bytes", lambda: 100 << 20)


def opened(folder, **options):
    return AutoModel.from_pretrained(
        folder, **({"dtype": "float32", "device": "cpu", "host_memory": "4GiB"} | options)
    )


def alone(folder, prompt, **options):
    with opened(folder) as model:
        return jlayer.generate(model, prompt, **(OPTIONS | options)).token_ids


def host_that_drops_layers(folder, small, big):
    """A host budget in which a big run fits beside a small one, but not with all the layers that
    the small one keeps in host memory."""
    with opened(folder) as model:
        engine = model.engine
    tilings = {}

    def kept(shape, host, held=()):
        machine = replace(engine.plan.machine, host_budget=host)
        plan = make_plan(engine.weights, machine, shape, held=held, tilings=tilings)
        return plan.tier_bytes(Tier.HOST) if plan.fits else None

    for host in range(200 << 20, 2 << 30, 1 << 20):
        if kept(big, host, held=(small,)) is not None:
            assert kept(big, host) < kept(small, host)
            return host
    raise AssertionError("no budget fits")


@pytest.fixture(scope="module")
def expected(tiny):
    return [alone(tiny, prompt) for prompt in PROMPTS]


def test_interleaved_streams_are_what_each_is_alone(tiny, expected):
    with opened(tiny) as model:
        streams = [jlayer.stream(model, prompt, **OPTIONS) for prompt in PROMPTS]
        found = [[] for _ in streams]
        for _ in range(OPTIONS["max_new_tokens"]):
            for tokens, stream in zip(found, streams, strict=True):
                tokens += next(stream).token_ids
        assert all(next(stream, None) is None for stream in streams)
    assert found == expected


def test_a_plan_that_changes_under_a_stream_does_not_end_it(fable):
    """Its executor was closed under it. Logits of a whole prompt leave no room for host layers."""
    long = [3 + i % 100 for i in range(400)]
    shape = RunShape(1, len(long), len(long), all_logits=True, single_array=True)
    want_tokens = alone(fable, IDS)
    with opened(
        fable, host_memory=host_that_drops_layers(fable, RunShape(1, 8, 64), shape)
    ) as model:
        with opened(fable) as free:
            want = free.logits(long)
        tokens, kept = [], set()
        for step in jlayer.stream(model, IDS, **OPTIONS):
            tokens += step.token_ids
            kept.add(model.plan.tier_bytes(Tier.HOST))
            np.testing.assert_allclose(model.logits(long), want, rtol=0, atol=1e-4)
            kept.add(model.plan.tier_bytes(Tier.HOST))
    assert tokens == want_tokens
    assert len(kept) > 1, "the plan never changed: the budget proves nothing"


@pytest.mark.slow
def test_all_live_caches_are_within_the_budget(fable):
    """24 live streams were 10 MB on the device where 2.7 were promised: only one was counted.

    Each that joins makes new programs, so the budget holds few of them."""
    budget = 4 << 20
    with opened(fable, device_memory=budget, dtype="bfloat16") as model:
        streams = []

        def fills():
            for _ in range(200):
                stream = jlayer.stream(model, IDS, max_new_tokens=400, temperature=0)
                next(stream)
                streams.append(stream)

        with pytest.raises(DoesNotFitError, match=r"beside \d+ other runs that are alive"):
            fills()
        held = model.engine.memory()["device_peak_bytes"]
        assert 2 <= len(streams) < 200
        assert model.engine.n_alive == len(streams)
        assert held <= budget
        assert model.plan.device_peak_bytes <= budget
        caches = model.plan.device.cache_bytes
        assert caches >= len(streams) * caches // (len(streams) + 1)
        # Whoever was admitted goes on, and a run that ends makes room for another.
        for stream in streams:
            next(stream)
        streams.pop().close()
        next(jlayer.stream(model, IDS, max_new_tokens=400, temperature=0))


@pytest.mark.usefixtures("all_shapes")
def test_the_plan_counts_every_live_cache_once(tiny):
    with opened(tiny) as model:
        row = model.engine.plan_for(RunShape(context=64)).device.cache_bytes // 64
        runs = [model.engine.start(RunShape(1, 4, 200)) for _ in range(3)]
        promised = [run.plan.device.cache_bytes for run in runs]
        assert promised == [row * pool_rows(200 * n) for n in (1, 2, 3)]
        for run in runs:
            run.sweep([IDS[:4]], [0])
        assert model.engine.caches.n_bytes == promised[-1]
        runs[0].close()
        # The memory is there until the last run has left; the next run uses what is free of it.
        assert model.engine.plan_for(RunShape(1, 4, 200)).device.cache_bytes == promised[-1]
        for run in runs[1:]:
            run.close()
        assert model.engine.caches.n_bytes == 0


def fails_in_the_body(stream):
    for step in stream:
        raise ZeroDivisionError(step)


@pytest.mark.parametrize("ending", ["exhausted", "closed", "dropped", "exception", "never begun"])
def test_a_run_leaves_nothing_behind_however_it_ends(tiny, ending):
    with opened(tiny) as model:
        stream = jlayer.stream(model, IDS, **OPTIONS)
        if ending == "exhausted":
            list(stream)
        elif ending == "closed":
            next(stream)
            assert model.engine.n_alive == 1
            stream.close()
        elif ending == "dropped":
            next(stream)
            del stream
        elif ending == "exception":
            with pytest.raises(ZeroDivisionError):
                fails_in_the_body(stream)
            del stream
        else:
            decoding, _ = model.decoding(IDS, options={"max_new_tokens": 4})
            assert model.engine.n_alive == 1
            del decoding
        gc.collect()
        assert model.engine.n_alive == 0


@pytest.mark.usefixtures("all_shapes")
def test_a_run_reports_the_plan_that_it_was_admitted_by(tiny):
    with opened(tiny) as model:
        first, _ = model.decoding(IDS, options={"max_new_tokens": 3, "temperature": 0})
        steps = iter(first)
        next(steps)
        second, _ = model.decoding([IDS] * 4, options={"max_new_tokens": 300, "temperature": 0})
        list(steps)
        (one,), four = first.generations(), second.generations()
        assert one.plan == first.plan.as_dict() != four[0].plan == second.plan.as_dict()
        assert one.plan["device"]["cache_bytes"] < four[0].plan["device"]["cache_bytes"]


def test_a_run_counts_what_its_own_forward_passes_moved(tiny):
    with opened(tiny, keeps_layers=False) as model:
        want = jlayer.generate(model, IDS, **OPTIONS).stats
        first, _ = model.decoding(IDS, options=OPTIONS)
        second, _ = model.decoding(PROMPTS[1], options=OPTIONS | {"max_new_tokens": 3})
        steps = iter(first)
        for _ in second:
            next(steps)
        list(steps)
        (one,), (other,) = first.generations(), second.generations()
    assert one.stats["put_bytes"] == want["put_bytes"]
    assert other.stats["put_bytes"] * 8 == want["put_bytes"] * 3


@pytest.mark.usefixtures("all_shapes")
def test_host_layers_come_back_once_a_long_batch_is_over(fable):
    """Its plan was kept for small runs until the model was opened again."""
    small = RunShape(1, 8, 64, sweeps=50)
    big = RunShape(8, 512, 512, all_logits=True, single_array=True, sweeps=50)
    with opened(fable, host_memory=host_that_drops_layers(fable, small, big)) as model:

        def in_host(shape):
            run = model.engine.start(shape)
            run.sweep([IDS] * shape.batch, [0] * shape.batch)
            found = model.plan.tier_bytes(Tier.HOST)
            run.close()
            return found

        before = in_host(small)
        assert in_host(big) < before
        assert in_host(small) == before


def test_the_same_tiles_in_other_places_read_only_what_is_new(fable):
    with opened(fable, device_memory="4GiB") as model:
        run = model.engine.start(RunShape(1, 4, 64))
        want = run.sweep([IDS[:4]], [0])
        n_host = sum(tier is Tier.HOST for tier in model.plan.tiers)
        assert n_host == len(model.plan.tiles)
        with model.engine.turn() as executor:
            reads = model.engine.totals.read_bytes
            executor.retier((Tier.HOST,) * (n_host - 1) + (Tier.DISK,))
        np.testing.assert_array_equal(run.sweep([IDS[:4]], [0]), want)
        last = model.plan.tiles[-1].n_bytes
        assert 0 < model.engine.totals.read_bytes - reads < 3 * last + (64 << 10)


def test_a_closed_model_says_so_to_a_live_stream(tiny):
    model = opened(tiny)
    stream = jlayer.stream(model, IDS, **OPTIONS)
    next(stream)
    model.close()
    with pytest.raises(UsageError, match="closed"):
        next(stream)
    with pytest.raises(UsageError, match="closed"):
        jlayer.generate(model, IDS, **OPTIONS)
    with pytest.raises(UsageError, match="closed"):
        model.logits(IDS)
    model.close()


def test_a_model_closed_by_another_thread_ends_its_streams_with_a_word(tiny):
    model, errors, started = opened(tiny), [], threading.Event()

    def reads():
        try:
            for _ in jlayer.stream(model, IDS, max_new_tokens=400, temperature=0):
                started.set()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=reads) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    model.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors
    assert all(type(error) is UsageError and "closed" in str(error) for error in errors), errors


def test_threads_take_turns(tiny, expected):
    found = {}
    with opened(tiny) as model:

        def generates(number):
            for _ in range(3):
                found.setdefault(number, []).append(
                    jlayer.generate(model, PROMPTS[number], **OPTIONS).token_ids
                )

        threads = [threading.Thread(target=generates, args=(n,)) for n in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert model.engine.n_alive == 0
    assert found == {number: [want] * 3 for number, want in enumerate(expected)}


def test_an_executor_that_cannot_be_made_leaves_the_live_runs_as_they_were(fable, monkeypatch):
    """Pinning more memory may be refused by the driver; the runs before it go on."""
    big = RunShape(1, 400, 400, all_logits=True, single_array=True)
    want = alone(fable, IDS)
    with opened(fable) as model:
        streams = jlayer.stream(model, IDS, **OPTIONS)
        tokens = list(next(streams).token_ids)
        monkeypatch.setattr("jlayer.plan.making.OTHER_TILES_S", -1e9)
        monkeypatch.setattr("jlayer.engine.engine.NEARLY", 0.0)
        monkeypatch.setattr("jlayer.plan.making.TILE_BYTES", (100_000,))
        with monkeypatch.context() as broken:
            broken.setattr(
                "jlayer.engine.engine.Executor",
                lambda *_, **__: (_ for _ in ()).throw(DoesNotFitError("the driver refused")),
            )
            with pytest.raises(DoesNotFitError, match="the driver refused"):
                model.engine.start(big)
        assert model.engine.n_alive == 1
        for step in streams:
            tokens += step.token_ids
    assert tokens == want


def test_opening_a_quantized_model_takes_time_in_proportion_to_its_layers(tmp_path, monkeypatch):
    """80 layers took 15 s: every tensor's encoding was derived from the shapes of all tensors."""
    counts = {}
    shape_of = Leaf.shape
    for n_layers in (4, 16):
        source = tiny_llama(tmp_path / f"source-{n_layers}", num_hidden_layers=n_layers)
        folder = tmp_path / f"layered-{n_layers}"
        convert_checkpoint(source, folder, quantize="int4")
        calls = []

        def counted(leaf, cfg, calls=calls):
            calls.append(leaf)
            return shape_of(leaf, cfg)

        monkeypatch.setattr(Leaf, "shape", counted)
        opened(folder).close()
        monkeypatch.setattr(Leaf, "shape", shape_of)
        counts[n_layers] = len(calls)
    assert counts[16] <= 4.5 * counts[4], counts
