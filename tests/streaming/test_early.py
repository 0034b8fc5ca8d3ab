"""What stays in host memory is read while programs are compiled."""

import os
import threading
import time

import pytest

from jlayer import AutoModel
from jlayer.errors import StorageError
from jlayer.plan.tiles import Tier
from jlayer.streaming.incoming import Incoming
from jlayer.streaming.watch import Watch
from tests.campaigns import slow_but

pytestmark = pytest.mark.usefixtures("compiled_anew")

IDS = [5, 17, 99, 3, 64, 128, 1]
TOKENS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def reads(monkeypatch):
    """The tiles that were read so far, by number, each as often as it was read."""
    real, found = Incoming.read_tile, []

    def read(executor, tile, slot):
        views = real(executor, tile, slot)
        found.append(tile)
        return views

    monkeypatch.setattr(Incoming, "read_tile", read)
    return found


def wait_for(is_so, seconds=20):
    ends = time.monotonic() + seconds
    while not is_so() and time.monotonic() < ends:
        time.sleep(0.005)
    assert is_so()


def interrupt_compiling(model, watch, begun):
    """Generates, and is interrupted at the first program, once reading has `begun`."""

    def compiling(label):
        begun.wait(20)
        raise KeyboardInterrupt

    watch.on_compile = compiling
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, **TOKENS)


@pytest.mark.parametrize("share", slow_but([0, 1], (0,)))
def test_all_that_stays_is_read_before_the_programs_are_compiled(
    tiny, cuts, tiers_in_turn, reads, share
):
    """Once, also where the host's cores multiply a share of it, which is known after compiling."""
    cuts(3_000)
    tiers_in_turn(Tier.HOST, Tier.DISK)
    kept = []

    def compiling(label):
        if label and label.startswith("embed") and not kept:
            kept.extend(tile for tile, tier in enumerate(model.plan.tiers) if tier is Tier.HOST)
            wait_for(lambda: len(reads) == len(kept))

    watch = Watch(on_compile=compiling)
    options = {"device": "cpu", "watch": watch, "host_share": share}
    with AutoModel.from_pretrained(tiny, **options) as model:
        found = model.generate(IDS, **TOKENS)
        assert kept
        assert reads[: len(kept)] != []
        assert sorted(tile for tile in reads if tile in kept) == kept
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        assert model.generate(IDS, **TOKENS) == found


def test_an_early_read_that_fails_is_told_of_by_its_tile(tiny, tiers_in_turn, monkeypatch):
    tiers_in_turn(Tier.HOST)
    real, broken = os.preadv, [True]

    def failing(fd, buffers, offset, *flags):
        if broken[0] and "00002" in os.readlink(f"/proc/self/fd/{fd}") and len(buffers[0]) > 4096:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, *flags)

    with AutoModel.from_pretrained(tiny, device="cpu") as model:
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(StorageError, match=r"layer 2: .*at byte \d+ \(Input/output error\)"):
            model.generate(IDS, **TOKENS)
        broken[0] = False
        found = model.generate(IDS, **TOKENS)
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        assert model.generate(IDS, **TOKENS) == found


def test_before_tiles_change_places_early_reads_end(tiny, cuts, tiers_in_turn, monkeypatch):
    """They would write to rooms that are read into again."""
    cuts(3_000)
    tiers_in_turn(Tier.HOST)
    real, now, begun = Incoming.read_tile, [], threading.Event()

    def slow(executor, tile, slot):
        now.append(tile)
        begun.set()
        time.sleep(0.05)
        try:
            return real(executor, tile, slot)
        finally:
            time.sleep(0.05)
            now.remove(tile)

    monkeypatch.setattr(Incoming, "read_tile", slow)
    watch = Watch()
    with AutoModel.from_pretrained(tiny, device="cpu", watch=watch) as model:
        interrupt_compiling(model, watch, begun)
        watch.on_compile = None
        with model.engine.turn() as executor:
            assert now
            executor.retier(model.plan.tiers)
        for _ in range(20):
            assert now == []
            time.sleep(0.01)
        found = model.generate(IDS, **TOKENS)
    with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
        assert model.generate(IDS, **TOKENS) == found


def test_a_model_that_is_closed_while_it_is_read_leaves_no_thread(
    tiny, cuts, tiers_in_turn, monkeypatch
):
    cuts(3_000)
    tiers_in_turn(Tier.HOST)
    real, read, begun = Incoming.read_tile, [], threading.Event()

    def slow(executor, tile, slot):
        read.append(tile)
        begun.set()
        time.sleep(0.02)
        return real(executor, tile, slot)

    monkeypatch.setattr(Incoming, "read_tile", slow)
    watch = Watch()
    with AutoModel.from_pretrained(tiny, device="cpu", watch=watch) as model:
        interrupt_compiling(model, watch, begun)
        n_tiles = len(model.plan.tiles)
        n_read = len(read)
    assert len(read) <= n_read + 2 < n_tiles  # those under way, not all of them
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("jlayer-reader")]
