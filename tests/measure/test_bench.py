"""The figures of `bench`: which bytes are read raw, how a share is computed, and that measuring
changes no answer."""

import math
import os
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.safetensors import read_header
from jlayer.measure import bench as bench_module
from jlayer.measure.bench import Bench
from jlayer.measure.cores import CoresMeasured
from jlayer.measure.machine import RawDisk, card, summary
from jlayer.plan import making
from jlayer.plan.machine import HostSpeeds
from jlayer.plan.tiles import Tier

IDS = [5, 17, 99, 3, 64, 128, 1]
SPEEDS = {"memory": [4e9], "arithmetic": [1e12]}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench_module, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(bench_module, "MOST_ROUNDS", 2)
    for speeds in ("memory_speeds", "arithmetic_speeds"):
        monkeypatch.setattr(bench_module, speeds, lambda *_: [1e12])


def test_raw_reads_go_through_every_byte_of_the_files_and_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr("jlayer.measure.machine.REQUEST_BYTES", 8192)
    sizes = {"a": 20000, "b": 8192, "c": 100}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    asked, real = Counter(), os.preadv

    def counting(fd, buffers, offset):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        asked[name, offset, len(buffers[0])] += 1
        return real(fd, buffers, offset)

    expected = {("a", 0, 8192), ("a", 8192, 8192), ("a", 16384, 4096), ("b", 0, 8192)}
    expected |= {("c", 0, 4096)}
    disk = RawDisk([str(tmp_path / name) for name in sizes])
    monkeypatch.setattr(os, "preadv", counting)
    while sum(asked.values()) < 2 * len(expected):
        assert disk.speed(0.01) > 0
    disk.close()
    assert set(asked) == expected
    assert max(asked.values()) - min(asked.values()) <= 1  # in turn, again and again


@pytest.mark.parametrize(
    ("speeds", "found"),
    [([100, 102], 101), ([300, 200, 104, 100, 7], 102), ([64, 32, 16, 8, 4, 2, 1], 2)],
)
def test_what_a_disk_saved_up_is_spent_before_it_counts(tmp_path, monkeypatch, speeds, found):
    (tmp_path / "a").write_bytes(bytes(4096))
    disk, rest = RawDisk([str(tmp_path / "a")]), iter(speeds)
    monkeypatch.setattr(disk, "speed", lambda seconds: next(rest))
    assert disk.steady_speed(1) == found
    disk.close()


def put_raw_speeds(monkeypatch, speeds):
    """Puts these in the place of what raw reads of the disk measure; returns the order of calls."""
    order = []

    def raw(self, seconds):
        order.append("raw")
        return float(next(speeds))

    monkeypatch.setattr(RawDisk, "steady_speed", raw)
    return order


def test_a_drifting_disk_cancels_out(tiny, monkeypatch, quick):
    """The disk's speed grows from one raw read to the next, each sweep runs at the mean of those
    around it: every share is 1."""
    order = put_raw_speeds(monkeypatch, iter(range(10**8, 10**12, 5 * 10**7)))
    now = 0.0
    monkeypatch.setattr(bench_module, "time", SimpleNamespace(perf_counter=lambda: now))

    def sweep(n_tokens):
        nonlocal now
        order.append("sweep")
        now += bench.disk_bytes / (bench.speeds["disk"][-1] + 2.5e7)  # halfway to the next

    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        bench = Bench(model)
        bench.speeds |= SPEEDS
        bench.sweep = sweep
        rows = bench.measure_sweeps()
    in_a_row = ["sweep"] * bench_module.IN_A_ROW
    assert order == ["raw", *(["sweep", *in_a_row, "raw"] * 2 * 4)]
    assert [row["tokens"] for row in rows] == [0, 1, 64, 512]
    for row in rows:
        assert row["limit"] == "disk"
        assert row["share"] == pytest.approx({"median": 1, "min": 1, "max": 1, "n": 2})


def test_the_ceiling_is_the_longest_of_what_a_sweep_passes_through(tiny, monkeypatch, quick):
    put_raw_speeds(monkeypatch, iter([1e6, 3e6] * 99))
    published = {}
    for path in tiny.glob("*.safetensors"):
        published |= read_header(path).tensors
    passing = {
        name: entry
        for name, entry in published.items()
        if "embed_tokens" not in name and name != "model.norm.weight"
    }
    n_weights = sum(math.prod(entry.shape) for entry in passing.values())
    n_bytes = sum(entry.n_bytes for name, entry in passing.items() if "norm" not in name)
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        bench = Bench(model)
        bench.speeds |= SPEEDS | {"link": [1e9]}
        bench.has_link = True
        bench.sweep = lambda n_tokens: None
        rows = {row["tokens"]: row for row in bench.measure_sweeps()}
    assert rows[64]["limits_s"] == pytest.approx(
        {
            "disk": n_bytes / 2e6,
            "link": n_bytes / 1e9,
            "memory": n_bytes / 4e9,
            "arithmetic": 2 * 64 * n_weights / 1e12,
        }
    )
    assert rows[64]["limit"] == "disk"
    assert set(rows[0]["limits_s"]) == {"disk", "link"}
    assert not any("together_s" in row for row in rows.values())  # no cores multiply


@pytest.mark.parametrize("share", [0, 0.6, 1])
def test_a_sweep_is_compared_with_cores_and_link_together(tiny, monkeypatch, quick, share):
    """With a link that is made up: all that passes, over both speeds."""
    now = 0.0
    monkeypatch.setattr(bench_module, "time", SimpleNamespace(perf_counter=lambda: now))

    def sweep(n_tokens):
        nonlocal now
        now += 2.0

    with AutoModel.from_pretrained(tiny, device="cpu", dtype="float32", host_share=share) as model:
        bench = Bench(model)
        speeds = HostSpeeds((("float32", ((1, 3e3), (64, 1e3))),), 2e3)
        bench.cores = CoresMeasured("float32", 2, speeds, speeds)
        bench.speeds |= SPEEDS | {"link": [1e9]}
        bench.has_link = True
        bench.sweep = sweep
        rows = {row["tokens"]: row for row in bench.measure_sweeps()}
        n_bytes = bench.plan.put_bytes
    hosted = bench.plan.host_product_bytes
    if not share:  # they were measured to advise a share
        assert not any("together_s" in row or "cores" in row["limits_s"] for row in rows.values())
        return
    assert "together_s" not in rows[0]  # nothing is multiplied
    for n_tokens, speed in ((1, 5e3), (64, 3e3), (512, 2125)):
        least = n_bytes / speed
        assert rows[n_tokens]["together_s"] == pytest.approx(least)
        assert rows[n_tokens]["together_share"]["median"] == pytest.approx(least / 2)
    assert rows[1]["limits_s"]["cores"] == pytest.approx(hosted / 3e3)  # as it was measured here


def test_the_share_that_is_advised_can_be_had(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        bench = Bench(model)
        assert bench.fits_with(0.5)
        small = replace(bench.plan.machine, host_budget=1 << 20)
        bench.plan = replace(bench.plan, machine=small)
        assert not bench.fits_with(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("tile_bytes", [None, 3_000], ids=["whole", "tiled"])
def test_measuring_changes_no_answer_and_leaves_no_thread(tiny, monkeypatch, quick, tile_bytes):
    monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    monkeypatch.setattr(bench_module, "SIZES", (1, 9))  # so that fewer programs are compiled
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        before = set(threading.enumerate())
        bench = Bench(model)
        bench.measure_machine()
        blocks = bench.measure_blocks()
        bench.first_sweep()
        bench.measure_sweeps()
        left = {t.name.rstrip("_0123456789") for t in set(threading.enumerate()) - before}
        executors = {"jlayer-reader", "jlayer-reader-moves", "jlayer-guard"}
        assert left <= executors
        found = model.logits(IDS)
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        assert np.array_equal(found, model.logits(IDS))
    assert [row["tokens"] for row in blocks] == [1, 9]
    assert len({row["bytes"] for row in blocks}) == 1


def test_nothing_is_read_raw_where_nothing_comes_from_disk(tiny, quick):
    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        bench = Bench(model)
        bench.speeds |= SPEEDS
        assert model.engine.files_of(Tier.DISK) == []
        assert [row["tokens"] for row in bench.measure_sweeps()] == [1, 64, 512]
        assert "disk" not in bench.speeds


def test_the_card_names_the_file_system_of_the_model(tmp_path):
    found = card(str(tmp_path))
    assert " on " in found["file_system"]
    assert found["memory_bytes"] > 2**30
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
