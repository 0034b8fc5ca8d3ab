"""Runs that go on by themselves: handles, and the thread that drives their forward passes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress

from jlayer.engine.decoding import LOOK_AGAIN_S, Decoding
from jlayer.engine.generation import Generation
from jlayer.engine.lane import Step
from jlayer.engine.scheduler import Scheduler
from jlayer.errors import JlayerError, UsageError


class Handle:
    """A text that is being continued. Any thread may use it.

    Iterate over it for its Steps, as they come; each is given once. It ends by itself, by `cancel`,
    or when nobody holds the handle any more.
    """

    def __init__(self, decoding: Decoding, scheduler: Scheduler, owner: object):
        """`owner`: held, since a model that nobody holds is closed."""
        (self._lane,) = decoding.lanes
        self._decoding, self._scheduler, self._owner = decoding, scheduler, owner

    @property
    def done(self) -> bool:
        """Whether no more steps will come."""
        return not self._lane.is_alive

    @property
    def decoding(self) -> Decoding:
        """The run behind it."""
        return self._decoding

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        is_over = False
        while not is_over:
            self._scheduler.wait_until(lambda: self._lane.unread or self.done)
            is_over = self.done
            with suppress(IndexError):  # another thread may have taken it
                return self._lane.unread.popleft()
        self._decoding.close()
        if self._lane.error:
            raise self._lane.error
        raise StopIteration

    def result(self, timeout: float | None = None) -> Generation:
        """The whole text, once it has ended; after `cancel` what there is of it. Raises
        TimeoutError after `timeout` seconds, and the error by which it has ended."""
        self._scheduler.wait_until(lambda: self.done, timeout=timeout)
        self._decoding.close()
        if self._lane.error:
            raise self._lane.error
        (generation,) = self._decoding.generations()
        return generation

    def cancel(self) -> None:
        """Ends it now. The forward pass under way ends with it, unless it carries others."""
        self._decoding.close()
        self._scheduler.notify()


class Background:
    """The runs of a model that were submitted, and a thread while there are any."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._runs: list[weakref.ref[Decoding]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, decoding: Decoding, owner: object) -> Handle:
        """Continues a run of one sequence from now on."""
        if len(decoding.lanes) > 1:
            decoding.close()
            raise UsageError("submit: takes one prompt and gives one text; submit it several times")
        handle = Handle(decoding, self._scheduler, owner)
        try:
            decoding.read_kept()
        except BaseException:
            decoding.close()
            raise
        self._scheduler.join(decoding.riding)
        with self._lock:
            self._runs.append(weakref.ref(decoding))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._drive, name="jlayer-background", daemon=True
                )
                self._thread.start()
        return handle

    def join(self) -> None:
        """Waits until the thread has ended: after the model was closed, or all runs have ended."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _drive(self):
        while self._has_more():
            try:
                self._drive_a_while()
            except JlayerError as error:
                for run in self._alive():
                    for lane in run.lanes:
                        lane.fail(error)
            except BaseException as error:
                with self._lock:  # what is submitted from now on has a thread of its own
                    self._thread, runs = None, self._alive()
                    self._runs = []
                for run in runs:
                    for lane in run.lanes:
                        lane.fail(JlayerError(f"the model's thread failed: {error!r}"))
                raise
            finally:
                self._scheduler.notify()

    def _drive_a_while(self):
        """Until a run has ended; where one waits to be admitted, a pass at a time."""
        scheduler, waits = self._scheduler, any(run.is_waiting for run in self._alive())
        n_before = scheduler.n_passes

        def is_done():
            return self._has_news() or (waits and scheduler.n_passes > n_before)

        scheduler.drive_until(is_done)
        if not is_done():  # nobody can ride: others hold the room, or their steps are unread
            with suppress(TimeoutError):
                scheduler.wait_until(is_done, timeout=LOOK_AGAIN_S)

    def _has_more(self):
        """Frees what has ended and admits what waits; whether the thread is still needed."""
        with self._lock:
            alive = self._alive()
            self._runs = [weakref.ref(run) for run in alive]
            if not alive:
                self._thread = None
                return False
        for run in alive:
            try:
                run.admit_waiting()
            except JlayerError as error:
                for lane in run.lanes:
                    lane.fail(error)
        return True

    def _alive(self):
        """The runs that go on; those that have ended give their entries back."""
        alive = []
        for ref in self._runs:
            run = ref()
            if run is None:
                continue
            if any(lane.is_alive for lane in run.lanes):
                alive.append(run)
            else:
                run.close()
        return alive

    def _has_news(self):
        """Whether a run has ended or was dropped."""
        runs = [ref() for ref in self._runs]
        return any(
            run is None or run.is_closed or not any(lane.is_alive for lane in run.lanes)
            for run in runs
        )
