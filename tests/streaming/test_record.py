"""What the recorder notes is what happened: each step once, in its order, at its time, and at no
cost when nobody asked."""

import os
import threading
import time
from itertools import pairwise

import pytest

from jlayer import AutoModel
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming.record import DRAFT, LANES, Recorder, Span, Timeline


@pytest.fixture
def mixed(cuts, tiers_in_turn):
    """Tiles of a few rows, every third of them on the device, in the host and on disk."""
    cuts(3_000)
    tiers_in_turn(*Tier)


def record(model, n_sweeps):
    forward = model.engine.start(RunShape(context=20))
    forward.sweep([[5]], [0])
    recorder = Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers)
    with recorder:
        for at in range(1, n_sweeps + 1):
            forward.sweep([[5]], [at])
    forward.close()
    return recorder.timeline()


def rows_of(timeline, lane):
    """The spans of each worker of a lane, in order of time."""
    rows = {}
    for span in sorted(timeline.lane(lane), key=lambda span: span.begin):
        rows.setdefault(span.row, []).append(span)
    return rows.values()


def test_every_step_of_the_last_sweeps_is_there_in_its_order(tiny, mixed):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        timeline = record(model, 4)
        n_tiles = len(model.plan.tiles)
    assert len(timeline.starts) == 2
    runs = timeline.lane("run")
    assert [span.tile for span in sorted(runs, key=lambda span: span.begin)] == [
        *range(n_tiles),
        *range(n_tiles),
    ]
    passing = [i for i, tier in enumerate(timeline.tiers) if tier is not Tier.DEVICE]
    assert [span.tile for span in timeline.lane("free")] == 2 * passing
    assert {timeline.tiers[span.tile] for span in timeline.lane("read")} == {Tier.DISK}
    for lane in LANES:
        for row in rows_of(timeline, lane):
            for earlier, later in pairwise(row):
                assert earlier.begin <= earlier.end <= later.begin
    n_read_first = 0
    for run in runs:
        puts = [s for s in timeline.lane("put") if s.tile == run.tile and s.end <= run.begin]
        reads = [s for s in timeline.lane("read") if s.tile == run.tile and s.end <= run.begin]
        if run.begin > timeline.starts[1] and timeline.tiers[run.tile] is not Tier.DEVICE:
            assert puts
        if reads and timeline.tiers[run.tile] is Tier.DISK and puts:
            assert any(read.end <= put.begin for read in reads for put in puts)
            n_read_first += 1
    assert n_read_first >= timeline.tiers.count(Tier.DISK)
    for free in timeline.lane("free"):
        assert any(s.tile == free.tile and s.end <= free.end for s in runs)


def test_guessing_has_a_lane_between_two_sweeps(fable):
    """A model that drafts for itself, in steps that are long enough to be seen."""
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32", draft=fable) as model:
        options = {"max_new_tokens": 12, "temperature": 0, "draft_tokens": 2}
        decoding, _ = model.decoding("Once upon a time", options=options)
        with Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers) as recorder:
            passes = sum(1 for _ in decoding)
        assert 12 / 3 <= passes < 12  # they were of use
        assert model.engine.watch.on_draft is None
    timeline = recorder.timeline()
    first, second = timeline.starts
    (guessing,) = timeline.lane(DRAFT)
    assert guessing.tile is None
    runs = sorted(timeline.lane("run"), key=lambda span: span.end)
    assert runs[len(runs) // 2 - 1].end <= guessing.begin < guessing.end <= second
    assert 0 < timeline.busy(DRAFT) < 1
    assert timeline.busy(DRAFT) == pytest.approx(
        (guessing.end - guessing.begin) / (timeline.end - first)
    )


def test_a_slow_read_is_as_long_in_the_picture_as_it_was(tiny, monkeypatch):
    real = os.preadv

    def slow(fd, buffers, offset, *flags):
        if threading.current_thread().name.startswith("jlayer-reader"):
            time.sleep(0.03)
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", slow)
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        timeline = record(model, 2)
    reads = timeline.lane("read")
    assert len(reads) >= 4
    inside = [span for span in reads if span.begin > timeline.starts[0]]
    assert all(span.end - span.begin >= 0.03 for span in inside)
    seconds = timeline.end - timeline.starts[0]
    n_readers = len({span.row for span in reads})
    assert timeline.busy("read") * seconds >= 0.03 * len(inside) / n_readers


def test_each_device_has_a_bar_of_its_own(tiny):
    how = {"device": "cpu", "devices": 2, "keeps_layers": False}
    with AutoModel.from_pretrained(tiny, **how) as model:
        timeline = record(model, 2)
        n_tiles = len(model.plan.tiles)
    for lane in ("put", "run"):
        first, second = rows_of(timeline, lane)
        assert {span.row for span in first} != {span.row for span in second}
        assert [span.tile for span in first] == [span.tile for span in second]
        assert len(first) >= 2 * n_tiles
        for earlier, later in pairwise(first):
            assert earlier.end <= later.begin
    assert {span.row for span in timeline.lane("free")} == {0}
    for run in timeline.lane("run"):
        puts = [s for s in timeline.lane("put") if (s.tile, s.row) == (run.tile, run.row)]
        assert run.begin < timeline.starts[1] or any(put.end <= run.begin for put in puts)


def test_nothing_is_left_of_a_recorder_and_nothing_is_there_without_one(tiny):
    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("jlayer-timeline")]

    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        seen = []
        with model.engine.watch.also(lambda step, tile: seen.append(step)):
            assert record(model, 1).starts
        assert len(seen) > 0
        assert (model.engine.watch.on_step, model.engine.watch.on_taken) == (None, None)
        assert threads() == []
    recorder = Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers)
    with recorder:
        assert recorder.timeline() is None


def test_busy_counts_time_once_however_many_workers_shared_it():
    spans = (
        Span("read", 0, -1.0, 2.0, 0),  # begins before the picture
        Span("read", 1, 1.0, 4.0, 1),
        Span("read", 2, 6.0, 12.0, 0),  # ends after it
        Span("run", 0, 3.0, 4.0),
    )
    timeline = Timeline((), (), spans, (0.0, 5.0), 10.0)
    assert timeline.busy("read") == pytest.approx(0.8)
    assert timeline.busy("run") == pytest.approx(0.1)
    assert timeline.busy("put") == 0


def test_two_recorders_at_once_see_the_same_steps(tiny):
    """The second one silenced the first."""
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        forward = model.engine.start(RunShape(context=20))
        forward.sweep([[5]], [0])
        options = (model.engine.watch, model.plan.tiles, model.plan.tiers)
        with Recorder(*options) as outer:
            with Recorder(*options) as inner:
                forward.sweep([[5]], [1])
            forward.sweep([[5]], [2])
        forward.close()
        assert model.engine.watch.on_taken is None
    runs = [len(recorder.timeline().lane("run")) for recorder in (inner, outer)]
    assert runs == [len(model.plan.tiles), 2 * len(model.plan.tiles)]
