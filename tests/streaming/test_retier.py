"""The same tiles in other places: what is in host memory already is not read again, and the answer
is the same."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.digest import Checks
from jlayer.engine import residents
from jlayer.engine.batch import Entry, arrange
from jlayer.engine.caches import Caches
from jlayer.engine.sweep import Sweeper
from jlayer.plan.shapes import PoolSizes, RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor
from jlayer.streaming.steps import Read
from jlayer.streaming.watch import Totals, Watch
from tests.streaming.conftest import set_tile_bytes

IDS = [5, 17, 99, 3, 64, 128, 1]
RUN = RunShape(longest=len(IDS), context=len(IDS), all_logits=True)
D, H, K = Tier.DEVICE, Tier.HOST, Tier.DISK


@pytest.fixture(scope="module")
def opened(tiny):
    """A model cut into some 20 tiles, for its store, weights and programs."""
    with pytest.MonkeyPatch.context() as patch:
        set_tile_bytes(patch, 3_000)
        with AutoModel.from_pretrained(tiny, device="cpu", keeps_layers=False) as model:
            yield model


class Streamed:
    """An executor of a model's tiles, a run on it, and the reads of each tile since the last
    look."""

    def __init__(self, model, tiers):
        engine = model.engine
        self.plan = model.plan
        self.reads = Counter()
        self.totals = Totals()
        self.executor = Executor(
            engine.store,
            self.plan.tiles,
            tiers,
            ring=self.plan.ring,
            ahead=self.plan.ahead,
            devices=engine.devices,
            totals=self.totals,
            watch=Watch(on_step=self._note),
            checks=Checks({}),
        )
        self.embedding = Embedding(engine.store, engine.weights)
        self.caches = Caches(engine.programs, tables=list)
        self.caches.reserve(PoolSizes(64))
        leaves = residents.load(engine.store, engine.weights, Checks({}), engine.devices)
        self.sweeper = Sweeper(engine.programs, self.embedding, leaves, self.caches)

    def _note(self, step, tile):
        if isinstance(step, Read):
            self.reads[step.tile] += 1

    def logits(self):
        found = np.empty((len(IDS), self.sweeper.programs.cfg.vocab_size), np.float32)

        def take(output, places, row):
            found[places, row : row + output.shape[1]] = output

        rows = self.caches.pool.take(len(IDS))
        entry = Entry(IDS, np.zeros(0, np.int32), rows, 64, wanted=len(IDS))
        self.sweeper.run(self.executor, arrange([entry], pool=64), take)
        self.caches.pool.release(rows)
        return found[None]

    def close(self):
        self.executor.close()
        self.embedding.close()


@contextmanager
def streamed(model, tiers):
    found = Streamed(model, tiers)
    try:
        yield found
    finally:
        found.close()


def in_turn(model, *tiers):
    n = len(model.plan.tiles)
    return tuple(tiers[i % len(tiers)] for i in range(n))


CHANGES = [
    ((H,), (H, K)),  # makes room
    ((H, K), (H,)),  # and takes it again
    ((H, K, D), (K, D, H)),
    ((D, H), (H, D)),
    ((K,), (D, H, K)),
    ((H, H, D), (H, K, H)),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("n_sweeps", [0, 1, 2])
def test_what_stays_in_host_memory_is_not_read_again(opened, before, after, n_sweeps):
    first, then = in_turn(opened, *before), in_turn(opened, *after)
    expected = opened.logits(IDS)
    with streamed(opened, first) as own:
        for _ in range(n_sweeps):
            assert np.array_equal(own.logits(), expected)
        own.reads.clear()
        own.executor.retier(then)
        for _ in range(3):
            assert np.array_equal(own.logits(), expected)
        own.executor.settle()
        for tile, (was, is_now) in enumerate(zip(first, then, strict=True)):
            if is_now is K:
                assert own.reads[tile] >= 3
            elif n_sweeps and was is H and is_now is H:
                assert own.reads[tile] == 0
            else:
                assert own.reads[tile] == 1


def test_rooms_are_given_up_with_what_no_longer_stays(opened):
    n = len(opened.plan.tiles)
    with streamed(opened, (K,) * n) as own:
        own.logits()
        ring = own.executor.host_bytes
        own.executor.retier((H,) * n)
        own.logits()
        all_kept = own.executor.host_bytes
        assert all_kept >= ring + opened.plan.tiling.n_bytes
        own.executor.retier((H,) + (K,) * (n - 1))
        own.logits()
        one_kept = own.executor.host_bytes
        assert ring < one_kept < ring + 3 * opened.plan.tiling.tile_bytes
        own.executor.retier((K,) * n)
        assert own.executor.host_bytes == ring


def test_an_interrupt_between_leaves_what_is_in_host_memory_there(opened):
    """Half of the tiles have come when it is interrupted: those alone are not read again."""
    n = len(opened.plan.tiles)
    expected = opened.logits(IDS)
    with streamed(opened, (H,) * n) as own:
        passed = []

        def stop(tile, arrays):
            passed.append(tile)
            if len(passed) == n // 2:
                raise KeyboardInterrupt
            return arrays

        with pytest.raises(KeyboardInterrupt):
            own.executor.sweep(stop)
        own.reads.clear()
        own.executor.retier((H,) * n)
        assert np.array_equal(own.logits(), expected)
        assert all(own.reads[tile] == 0 for tile in range(n // 2))
        assert all(own.reads[tile] <= 1 for tile in range(n))
        assert own.reads[n - 1] == 1
