"""What tests of lanes share: runs by hand, faults in the middle of a pass, what must be left."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

import jlayer

GREEDY = {"temperature": 0}
PROMPT = [7 + n for n in range(40)]


def alone(model, prompt, *, beside=0, **options):
    """The tokens of a text that is generated while nothing else, or `beside` runs, are alive."""
    assert model.engine.n_alive == beside
    return jlayer.generate(model, prompt, **options).token_ids


class Run:
    """A run that a test drives pass by pass, and may go on with after an error."""

    def __init__(self, model, prompt, **options):
        self.decoding, _ = model.decoding(prompt, options=options)
        self.scheduler, self.lanes = model.engine.scheduler, self.decoding.lanes
        self.scheduler.join(self.decoding.riding)

    def advance(self):
        """One pass or more; takes the steps."""
        self.scheduler.advance(self.lanes)
        self.take()

    def take(self):
        for lane in self.lanes:
            lane.unread.clear()

    def tokens(self):
        """Drives to the end -> the tokens of each sequence."""
        while any(lane.is_alive for lane in self.lanes):
            self.advance()
        return [lane.token_ids for lane in self.lanes]

    def close(self):
        self.decoding.close()


def within(seconds, work):
    """The result of `work()` in a thread of its own; fails if that takes longer."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still at work after {seconds} s"
    ((result, error),) = found
    if error is not None:
        raise error
    return result


@contextmanager
def watched(model, on_step):
    """Calls `on_step(number of the step since here, step, tile)` before every step."""
    numbers = iter(range(1 << 60))
    with model.engine.watch.also(lambda step, tile: on_step(next(numbers), step, tile)):
        yield


@contextmanager
def raises_at(model, number, error):
    """The step of this number raises; -> a list that is filled when it has."""
    raised = []

    def on_step(now, *_):
        if now == number:
            raised.append(number)
            raise error

    with watched(model, on_step):
        yield raised


def check_rows(model, *runs):
    """No pool row is lost, or used by more tables than list it."""
    pool = model.engine.caches.pool
    tables = [lane.table for run in runs for lane in run.lanes if lane.table is not None]
    listed = np.concatenate([np.zeros(0, np.int32), *(table.rows for table in tables)])
    assert pool.n_free + len(np.unique(listed)) == pool.n_rows
    for table in tables:
        assert len(np.unique(table.rows)) == len(table), "a row twice in one table"


@contextmanager
def limited(model, *, rows, chunk=None):
    """Passes of so many rows, in chunks of that many or `chunk`, also for runs that are admitted
    inside."""
    engine, plan_for = model.engine, model.engine.plan_for

    def limited_plan(plan):
        return replace(
            plan, load=replace(plan.load, n_rows=rows, chunk=min(chunk or rows, plan.chunk))
        )

    engine.plan_for = lambda *given, **options: limited_plan(plan_for(*given, **options))
    engine.plan = limited_plan(engine.plan)
    try:
        yield
    finally:
        del engine.plan_for


def loses_pools(model):
    """What a failure of the device in the middle of a program does: the memory that was to be
    reused is gone."""
    import jax

    for leaf in jax.tree.leaves(model.engine.caches.layers):
        leaf.delete()
    return jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")
