"""The desk takes orders from any thread, and owns the one thread that drives forward passes.

Whoever waits begins with the next pass, if the budgets have room beside those that run; people go
before batches, and where there is no room for a person, batch texts give theirs back and go on
later. What a pass gives is handed to the jobs at once, and nobody's reading holds up anybody.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from jlayer.api import Model
from jlayer.engine.decoding import LOOK_AGAIN_S, Decoding
from jlayer.engine.ids import Row
from jlayer.errors import JlayerError
from jlayer.serving.foresight import Estimate, Foresight
from jlayer.serving.job import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, Order
from jlayer.serving.progress import Passes, Progress
from jlayer.serving.queue import Limits, Queue
from jlayer.serving.starts import Start
from jlayer.serving.status import Status, status_of

MOST_RIDERS = 512  # texts in a forward pass: rows of one chunk
# Of a pass's seconds, the most that it waits for the disk to have what is to begin with it: who
# misses a pass waits for all of it.
START_SHARE = 0.02
ANSWER_S = 10.0  # for the answer of a last try to be on disk, before the next one begins


class Stopping(JlayerError):
    """No order is taken any more, and those that ran have ended."""


class Desk:
    """See the module. `limits`: of the queue. `keeps`: how many ended texts keep their cache
    entries for a prompt that goes on from them."""

    def __init__(self, model: Model, *, limits: Limits | None = None, keeps: int = 4):
        self.model = model
        self._engine = engine = model.engine
        engine.kept.most = keeps
        self._passes = Passes(model.config.num_hidden_layers, engine.plan.sweep_seconds)
        self._foresight = Foresight(engine)
        self._queue = Queue(limits or Limits())
        self._running: list[Job] = []
        self._starting: list[Job] = []  # they have room, and wait until that is on disk
        self._leaving: list[Job] = []  # cancelled while they ran
        self._last_try: tuple[Start, float] | None = None  # of the last one that ended, and when
        self._changed = threading.Condition(threading.RLock())
        self._is_stopping, self._room_may_have_grown, self._has_arrivals = False, True, False
        self._thread = threading.Thread(target=self._run, name="jlayer-desk", daemon=True)
        self.failure: BaseException | None = None
        self.n_requests = self.n_cancelled = 0
        self._began = time.monotonic()

    # What any thread may call; none of it waits for a forward pass.

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes orders, and those that it took go on."""
        return self._thread.is_alive() and not self._is_stopping

    def submit(self, order: Order, listener: Callable[[Job], None] | None = None) -> Job:
        """Takes an order; it begins as soon as there is room.

        Raises QueueFull, Stopping, UsageError (ids, lengths) and DoesNotFitError, with the sum
        (where there would be no room for it even alone).
        """
        engine, options, n_prompt = self._engine, order.options, len(order.ids)
        self._check_alive()
        engine.check_ids(list(order.ids), begin=options.bos_token_id)
        engine.check_length(n_prompt)
        limit = options.new_tokens_limit(n_prompt, context=engine.context_limit)
        if options.lengths_are_published:
            limit = self._foresight.most(order, limit)
            options = replace(options, max_new_tokens=limit, max_length=None, length_from=None)
            order = replace(order, options=options)
        else:
            self._foresight.check(order, limit)
        if options.seed is None and not options.is_greedy:
            order = replace(order, options=options.seeded())
        job = Job(
            order, limit=limit, cancel=self._cancel, progress=self._progress, listener=listener
        )
        job.seed = None if options.is_greedy else order.options.seed
        with self._changed:
            self._check_alive()
            if order.is_counted:
                self._queue.check(job, self._wait_s())
            self._queue.add(job)
            self._has_arrivals = True
            self.n_requests += 1
            self._changed.notify_all()
        return job

    def status(self) -> Status:
        with self._changed:
            queued = self._queue.count(is_batch=False), self._queue.count(is_batch=True)
        return status_of(self.model, self._passes, queued=queued, desk=self, since=self._began)

    def estimate(self, n_prompt: int, n_new: int, n: int = 1) -> Estimate:
        """What a request of these tokens would take, if it came now."""
        with self._changed:
            n_before, wait_s = len(self._queue), self._wait_s() if len(self._queue) else 0.0
        return self._foresight.estimate(
            n_prompt, n_new, n, seconds=self._passes.seconds, n_before=n_before, wait_s=wait_s
        )

    def stop(self, timeout_s: float = 5.0) -> None:
        """Takes no more orders, ends those that run or wait with Stopping, and waits for the
        thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            for job in self._with_room():
                if job.decoding is not None:
                    job.decoding.close()  # so that the pass under way ends within a tile
        self._engine.scheduler.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _check_alive(self):
        if self.failure is not None:
            raise Stopping(f"the engine has failed and runs no more: {self.failure}")
        if self._is_stopping or not self._thread.is_alive():
            raise Stopping("the server is stopping and takes no more requests")

    def _cancel(self, job):
        with self._changed:
            if job.is_over:
                return
            self.n_cancelled += 1
            if self._queue.remove(job) and job.decoding is None:
                job.end(CANCELLED)
                return
            if job.decoding is not None:
                job.decoding.close()  # a pass that carries nobody else ends within a tile
            self._leaving.append(job)
            self._changed.notify_all()
        self._engine.scheduler.notify()

    def _progress(self, job) -> Progress:
        passes = self._passes
        with self._changed:
            place = self._queue.place(job, self._counts())
            eta_s = self._eta_s(job, place)
        tokens = max(len(each.token_ids) for each in job.sequences)
        state = job.state
        if state == RUNNING and not tokens:
            state = "prompt"
        return Progress(
            state=state if not job.is_over else "done",
            place=place,
            pass_=passes.number + 1,
            layer=passes.layer,
            n_layers=passes.n_layers,
            seconds_a_pass=passes.seconds,
            riders=passes.riders,
            tokens=tokens,
            max_tokens=job.limit,
            eta_s=None if job.is_over else eta_s,
            phase=passes.phase,
        )

    def _counts(self):
        return Counter(job.client for job in self._with_room() if not job.is_batch)

    def _with_room(self):
        return [*self._running, *self._starting]

    def _left_s(self, job):
        """Until a job that runs, or begins now, ends; None where no pass was timed."""
        seconds = self._passes.seconds
        if seconds is None:
            return None
        return self._foresight.passes_left(job) * seconds

    def _eta_s(self, job, place):
        left = self._left_s(job)
        if left is None or job.is_over:
            return None
        if place is not None:
            left += self._wait_s(place)
        elif self._passes.left_s:  # of the pass under way, only what is left of it counts
            left += self._passes.left_s - self._passes.seconds
        return max(0.0, left)

    def _wait_s(self, place: int = 1):
        """Until so many of those that run have ended."""
        ends = sorted(self._left_s(job) or 0.0 for job in self._running)
        return ends[min(place, len(ends)) - 1] if ends else 0.0

    # The thread.

    def _run(self):
        try:
            with self._engine.watch.also(self._passes.on_step):
                self._engine.watch.on_compile = self._passes.on_compile
                while self._wait_for_work():
                    self._begin_those_that_fit()
                    self._join_those_noted()
                    self._one_pass()
                    self._hand_out()
            self._end_all(Stopping("the server stops; ask again when it is back"))
        except BaseException as error:
            self.failure = error
            self._end_all(Stopping(f"the engine has failed: {error!r}"))
            raise

    def _wait_for_work(self):
        """Whether there is something to do, once there is; False when it is to stop."""
        with self._changed:
            while not (self._is_stopping or self._with_room() or self._leaving or len(self._queue)):
                self._passes.idle()
                self._changed.wait()
            return not self._is_stopping

    def _end_all(self, error):
        with self._changed:
            jobs = [*self._with_room(), *self._queue.order({}), *self._leaving]
            self._running, self._starting, self._leaving = [], [], []
            for job in jobs:
                self._queue.remove(job)
        for job in jobs:
            with suppress(Exception):
                if job.decoding is not None:
                    job.decoding.close()
            job.end(FAILED, error)
        self._engine.kept.clear()

    def _begin_those_that_fit(self):
        while True:
            with self._changed:
                self._has_arrivals, begun = False, self._with_room()
                order = self._queue.order(self._counts())
                job = next((each for each in order if self._may_begin(each, begun)), None)
                if job is None or not (self._room_may_have_grown or job.decoding is None):
                    return
                n_riders = sum(each.order.options.n_lanes for each in begun)
                is_full = begun and n_riders + job.order.options.n_lanes > MOST_RIDERS
            if is_full:
                if job.is_batch or not self._suspend_a_batch_text():
                    return
            elif not self._begin(job):
                return

    def _may_begin(self, job, begun):
        """Of last tries one runs at a time: if that one brings the process down, no other one is
        blamed for it. Nor one that has ended, but whose answer the disk does not have yet."""
        start = job.order.start
        if start is None or not start.is_last:
            return True
        if any(each.order.is_last_try for each in begun):
            return False
        if self._last_try is None:
            return True
        before, ended = self._last_try
        is_answered = before.name == start.name or not before.is_open()
        return is_answered or time.monotonic() > ended + ANSWER_S

    def _begin(self, job):
        """Whether it has begun, or is over; False where it waits for room."""
        try:
            decoding = job.decoding
            if decoding is None:
                decoding = self._decoding(job)
            else:
                decoding.admit_waiting()
            while decoding.is_waiting and not job.is_batch and self._suspend_a_batch_text():
                decoding.admit_waiting()
        except JlayerError as error:
            with self._changed:
                self._queue.remove(job)
            if job.decoding is not None:  # it was to go on
                job.decoding.close()
            job.end(FAILED, error)
            return True
        with self._changed:
            if job.is_over or decoding.is_closed:  # cancelled meanwhile
                decoding.close()
                return True
            job.decoding = decoding
            if decoding.is_waiting:
                self._room_may_have_grown = False
                return False
            self._queue.remove(job)
            self._starting.append(job)
        if not job.is_noted:
            job.order.start.note(lambda error: self._on_noted(job, error))
        return True

    def _on_noted(self, job, error):
        """In a thread of whoever writes it down."""
        with self._changed:
            job.is_noted, job.start_error = True, error
            self._changed.notify_all()
        self._engine.scheduler.notify()

    def _join_those_noted(self):
        """Who has room, and a start on disk, rides from now on. Where nobody could ride else, waits
        for the first one; if not, for a small part of a pass."""
        with self._changed:
            are_noted = [job.is_noted for job in self._starting]
            could_go = bool(self._running) or any(are_noted)
            seconds = START_SHARE * (self._passes.seconds or 0.0) if could_go else None
            self._changed.wait_for(lambda: self._is_waited_enough(could_go), seconds)
            noted = [job for job in self._starting if job.is_noted]
            self._starting = [job for job in self._starting if not job.is_noted]
            good = [job for job in noted if job.start_error is None]
            self._running += good
            for job in good:
                job.state = RUNNING
        for job in noted:
            error = job.start_error or self._error_of_kept(job)
            if error is None:
                self._engine.scheduler.join(job.decoding.riding)
            else:
                self._leave(job, FAILED, error)

    def _error_of_kept(self, job):
        """Reads what is kept of a job's prompt; what is wrong with that, if anything."""
        try:
            job.decoding.read_kept()
        except JlayerError as error:
            return error
        return None

    def _decoding(self, job):
        order = job.order
        return Decoding(
            self._engine,
            [Row(list(order.ids), list(order.ids), pooling=order.pooling)],
            order.options,
            text=None if order.pooling else self.model.text,
            most_unread=None,
            waits=True,
            constraint=order.constraint,
            shown=order.shown,
        )

    def _is_waited_enough(self, could_go):
        are_noted = [job.is_noted for job in self._starting]
        is_enough = all(are_noted) or (any(are_noted) and not could_go)
        return is_enough or self._has_leavers() or self._has_arrivals

    def _suspend_a_batch_text(self):
        """Gives the room of the batch text that began last to a person; whether there was one."""
        with self._changed:
            batch = [job for job in self._with_room() if job.is_batch]
            if not batch:
                return False
            job = batch[-1]
            (self._running if job in self._running else self._starting).remove(job)
            job.state, job.n_suspended = QUEUED, job.n_suspended + 1
            self._queue.add_first(job)
        job.decoding.suspend()
        self._room_may_have_grown = True
        return True

    def _one_pass(self):
        scheduler, n_before = self._engine.scheduler, self._engine.scheduler.n_passes
        riders = sum(lane.is_alive for job in self._running for lane in job.decoding.riding)
        if not riders:  # such as texts of no token
            with self._changed:
                is_idle = len(self._queue) and not self._with_room() and not self._has_leavers()
                if is_idle and not self._has_arrivals:  # a last try waits for another's answer
                    self._changed.wait(LOOK_AGAIN_S)
            return
        compiles = sum(self._engine.compiles.values())
        self._passes.begin(riders)
        try:
            scheduler.drive_until(lambda: scheduler.n_passes > n_before or self._has_leavers())
        except JlayerError as error:
            for job in list(self._running):
                self._leave(job, FAILED, error)
            return
        if scheduler.n_passes == n_before and not self._has_leavers():
            with suppress(TimeoutError):
                scheduler.wait_until(lambda: False, timeout=LOOK_AGAIN_S)
        is_compiled = sum(self._engine.compiles.values()) > compiles
        n_tokens = sum(
            len(step.token_ids)
            for job in self._running
            for lane in job.decoding.lanes
            for step in list(lane.unread)
        )
        self._passes.end(n_tokens, compiled=is_compiled)

    def _has_leavers(self):
        return bool(self._leaving) or self._is_stopping

    def _hand_out(self):
        """Gives the jobs what the pass has given, and ends those that are over."""
        with self._changed:
            leaving, self._leaving = self._leaving, []
        for job in leaving:
            self._leave(job, CANCELLED)
        for job in list(self._running):
            has_news = False
            if job.prompt_logprobs is None:  # told before the texts that follow
                job.prompt_logprobs = job.decoding.prompt_logprobs
                has_news = job.prompt_logprobs is not None
            for lane, text in zip(job.decoding.lanes, job.sequences, strict=True):
                while lane.unread:
                    text.steps.append(lane.unread.popleft())
                    has_news = True
                text.finish_reason = lane.finish_reason
            error = next((lane.error for lane in job.decoding.lanes if lane.error), None)
            if error is not None:
                self._leave(job, FAILED, error)
            elif all(lane.finish_reason for lane in job.decoding.lanes):
                self._leave(job, DONE)
            elif has_news:
                job.tell()

    def _leave(self, job, state, error=None):
        decoding = job.decoding
        with self._changed:
            self._queue.remove(job)
            for begun in (self._running, self._starting):
                if job in begun:
                    begun.remove(job)
        if decoding is not None:
            job.stats = decoding.stats.as_dict()
            decoding.keep() if state == DONE and job.order.keeps else decoding.close()
        self._room_may_have_grown = True
        if job.order.is_last_try:
            self._last_try = (job.order.start, time.monotonic())
        job.end(state, error)
