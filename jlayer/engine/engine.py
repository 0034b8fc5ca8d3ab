"""The engine of an opened model: the only owner of its executor, programs, norms and caches.

A run is admitted if it fits the budgets together with all live runs. There is one forward pass at a
time, from any thread; lanes of the scheduler share it. Between two passes the tiles and tiers may
change; that does not affect a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from jlayer.checkpoint.digest import Checks
from jlayer.cores.native import missing
from jlayer.engine import residents
from jlayer.engine.alike import hosts_of, machine_for, opened, refuse_follower, told_of
from jlayer.engine.assistant import NO_OTHER_DRAFT, is_same_folder
from jlayer.engine.caches import Caches
from jlayer.engine.deciding import end_others, follows, is_one_of_several, leave, step
from jlayer.engine.draft import draft_for
from jlayer.engine.fork import check_process, is_forked
from jlayer.engine.forward import Forward
from jlayer.engine.helping import Helping
from jlayer.engine.hosting import Host, cores_beside
from jlayer.engine.ids import check_ids
from jlayer.engine.kept import Kept
from jlayer.engine.ledger import Ledger, Ticket
from jlayer.engine.messages import packed_shape
from jlayer.engine.programs import Programs
from jlayer.engine.prompt_cache import PromptCache
from jlayer.engine.report import Clock, anonymous_bytes, free_beside, memory_of
from jlayer.engine.scheduler import Scheduler
from jlayer.engine.speculation import Speculation
from jlayer.engine.speeds import host_speeds
from jlayer.engine.sweep import Sweeper
from jlayer.errors import DoesNotFitError, StorageError, UsageError
from jlayer.families.registry import windows_of
from jlayer.plan.low_rank import check_host_share
from jlayer.plan.making import fitting, make_plan, matrix_forms, pays, refit, with_host
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import RunShape, pool_sizes
from jlayer.plan.tiles import Tier, Weights
from jlayer.run_config import RunConfig
from jlayer.streaming.cached import page_cache_use
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor
from jlayer.streaming.watch import Totals, Watch

CLOSED = "this model is closed; open it again with AutoModel.from_pretrained"
# A forward pass over fewer bytes of host memory is not divided: it would not make up for measuring.
LEAST_HOSTED_BYTES = 256 << 20
NEARLY = 1.02  # keep the current tiles while a pass takes at most so much longer than the best


class Engine:
    """A folder of weights, opened for streaming within the budgets of `run`.

    Raises CheckpointError, UnsupportedModelError, UsageError, DoesNotFitError or StorageError.
    """

    def __init__(self, folder: str | os.PathLike, run: RunConfig, watch: Watch | None = None):
        check_process()
        clock = Clock()
        self.run, self._opened_draft = run, run.draft
        self.watch, self.totals = watch or Watch(), Totals()
        self.watch.phase("reading headers")
        self.hosts = hosts_of(run)
        self.store = opened(folder, run, self.hosts)
        self.cfg, self.dtype = self.store.cfg, run.dtype or self.store.float_dtype
        self.draft = draft_for(self.store, run, self.dtype)
        self.weights = Weights(self.cfg, self.store.form_of, self.dtype)
        self._check_context()
        self.devices, self._machine = machine_for(run, self.store, self.hosts, self.watch)
        self.watch.phase("planning")
        self.programs = Programs(self.cfg, dtype=self.dtype, devices=self.devices, watch=self.watch)
        self._ledger = Ledger(on_empty=self.drop_entries)
        self.kept = Kept(self._ledger)
        self.caches = Caches(self.programs, tables=lambda: self._ledger.tables)
        self.prompt_cache = PromptCache.of(self)
        self._closed = False
        self._executor: Executor | None = None
        self.host, self.helping = None, Helping()
        self.notes = self.devices.notes  # for the user; none is an error
        self.plan = self._first_plan(RunShape(context=run.context or 1))
        self.plan.check()
        # This is the smallest run, so no plan of another run is much faster.
        self._shortest_s = self.plan.cautious_seconds
        self.embedding = Embedding(self.store, self.weights)
        self.watch.phase("reading norms and biases")
        try:
            self._page_cache = page_cache_use(
                run.keeps_layers,
                kept_bytes=self.store.weight_bytes - self.plan.tier_bytes(Tier.DISK),
                free_bytes=free_beside(self.plan.host_peak_bytes),
            )
            self._checks = self._make_checks()
            self._residents = residents.load(self.store, self.weights, self._checks, self.devices)
            if not follows():
                self._load_draft()
        except BaseException:
            self.embedding.close()
            raise
        self.sweeper = Sweeper(
            self.programs,
            self.embedding,
            self._residents,
            self.caches,
            host=self.host,
            hosted=lambda n_rows: self.helping.hosted(self.plan, n_rows),
        )
        self.speculation = Speculation(self, self.draft)
        self.scheduler = Scheduler(self, self.speculation)
        self.host_peak_bytes, self.device_peak_bytes = anonymous_bytes(), 0
        self.load_s = clock.lap()

    def _load_draft(self):
        if self.draft is not None:
            self.watch.phase("loading the draft model")
            self.draft.load(self.devices.first, most_ids=self.cfg.vocab_size, watch=self.watch)

    def use_draft(self, folder: str | None) -> None:
        """Has the draft model in a folder guess from now on, in place of the present one; None:
        that which the model was opened with, if any. Does nothing where that is so already.

        Raises UsageError (runs are alive, or it has other tokens), UnsupportedModelError,
        DoesNotFitError where there is no room for it, then nothing has changed; CheckpointError or
        StorageError, then there is none.
        """
        folder = folder or self._opened_draft
        if is_same_folder(folder, self.run.draft):
            return
        with self.turn():
            if len(self._ledger.alive) > len(self.kept) or is_one_of_several():
                raise UsageError(NO_OTHER_DRAFT.format(folder=folder))
            run, self.draft, before = replace(self.run, draft=folder), None, self.draft
            try:
                self.draft = draft_for(self.store, run, self.dtype)
                self.kept.clear()
                plan = self.plan_for(RunShape(context=run.context or 1))
                plan.check()
            except BaseException:
                self.draft = before
                raise
            if before is not None:
                before.close()
            self.run, self._shortest_s = run, plan.cautious_seconds
            self._stream_as(plan)
            try:
                self._load_draft()
            except BaseException:
                self.draft, self.run = None, replace(run, draft=None)
                raise
            finally:
                self.speculation.take_draft(self.draft)

    def drop_entries(self) -> None:
        """Frees the pools; no run may be alive."""
        with step("drop"):
            self.caches.drop()
        if self.draft is not None:
            self.draft.drop()

    def _first_plan(self, shape):
        """The plan of a small run; measures the host's cores first if they could help with it."""
        if self.hosts is not None or not check_host_share(self.cfg, self.run.host_share):
            return self.plan_for(shape)
        if self.run.host_share is None:
            alone = self.plan_for(shape)
            if not alone.fits or alone.put_bytes < LEAST_HOSTED_BYTES:
                return alone
            if why := missing():
                self.notes += (f"the host's cores do not help to multiply: {why}",)
                return alone
        elif why := missing():
            self.notes += (f"the host's share is multiplied by numpy, which is slow: {why}",)
        self.host = Host(cores_beside(self._machine), self.devices)
        self.watch.phase("measuring the cores")
        forms = matrix_forms(self.weights)
        measured = host_speeds(self.host.cores, forms, self.devices, dtype=self.dtype)
        self._machine = replace(self._machine, host=measured)
        return self.plan_for(shape)

    def _make_checks(self):
        """The checks of streamed tensors. An embedding that is not streamed is read and checked
        once, during the first forward pass, which waits for the result."""
        expected = self.store.expected()
        for name in [] if self.cfg.tie_word_embeddings else self.embedding.tensors:
            if name in expected:
                table = Checks({name: expected.pop(name)})
                self.embedding.begin_whole(name, partial(table.add, name), self._page_cache)
        return Checks(expected)

    def plan_for(self, shape: RunShape, *, alone: bool = False) -> Plan:
        """The plan of a run together with all live runs, or `alone`, with as many guesses as fit;
        it may not fit.

        Keeps the current tiles and tiers if they are nearly as fast as the best plan.
        """
        return fitting(partial(self._plan_for, alone=alone), shape)

    def shortage(self, shape: RunShape) -> str | None:
        """What a run lacks by itself, with all the guesses that it asks for; None: it fits."""
        try:
            with self._ledger.turn():
                self._plan_for(shape, alone=True).check()
        except DoesNotFitError as error:
            return str(error)
        return None

    def _plan_for(self, shape, *, alone=False, held=None):
        held = self._ledger.alive if held is None else held
        least_pool = self.caches.sizes
        if alone:
            held, least_pool = (), None
        tilings, same = {}, None
        if self._executor is not None:  # another thread may be making another one
            same = refit(
                self.plan,
                self.weights,
                shape,
                held=held,
                least_pool=least_pool,
                draft=self._draft_weights,
            )
            if same.fits and same.cautious_seconds <= NEARLY * self._shortest_s:
                return same
            tilings[same.tiling.cut_as] = same.tiling

        def plan_of(shares):
            return make_plan(
                self.weights,
                self._machine,
                shape,
                held=held,
                least_pool=least_pool,
                keeps_layers=self.run.keeps_layers,
                tilings=tilings,
                draft=self._draft_weights,
                shares=shares,
            )

        forms = matrix_forms(self.weights)
        best = with_host(plan_of, forms, self.run.host_share, self._machine.host)
        if same is not None and same.fits and not (best.fits and pays(same, best, shape.sweeps)):
            return same
        return best

    @property
    def _draft_weights(self):
        return None if self.draft is None else self.draft.weights

    def start(self, shape: RunShape, *, adapter: str | None = None) -> Forward:
        """Admits a run whose tokens are given. Raises what `admit` raises, and UsageError where
        there is no such `adapter`."""
        number = self.store.adapter_number(adapter)
        return Forward(self, self.admit(shape), adapter=number)

    def admit(self, shape: RunShape, *, instead_of: Ticket | None = None) -> Ticket:
        """Admits a run and makes room for it, that of kept texts if need be. `instead_of`: a run
        that it replaces. Raises DoesNotFitError where the budgets do not hold it beside live runs,
        UsageError where the model is closed, process 0 decides, or this is inside a pass."""
        self.scheduler.check_caller()  # first: a process may be forked while a lock is held
        refuse_follower()
        with self._ledger.turn():
            if self._closed:
                raise UsageError(CLOSED)
            with self._ledger.without(instead_of):
                plan, held = self._fitting_plan(shape), self._ledger.alive
            with step("admit", lambda: self._what_is_admitted(shape, held, plan)):
                self._make_room(plan)
            shape = replace(shape, nodes=plan.shapes.nodes)
            ticket = Ticket(self._ledger, shape, plan, self.caches.pool)
            self._ledger.enter(ticket)
            return ticket

    def _what_is_admitted(self, shape, held, plan):
        shapes = packed_shape(shape), [packed_shape(each) for each in held]
        return [*shapes, self._executor is not None, told_of(plan)]

    def admit_as_told(
        self, shape: RunShape, held: Sequence[RunShape], is_streaming: bool, digest: str
    ) -> None:
        """Makes room for a run that process 0 has admitted beside those of `held`, by the same
        plan. `is_streaming`: whether it had an executor; `digest`: of its plan. Raises
        StorageError where another plan is made here."""
        with self.turn() if is_streaming else self._ledger.turn():
            plan = fitting(partial(self._plan_for, held=held), shape)
            if told_of(plan) != digest:
                raise StorageError(
                    "hosts: this one plans a run in another way than process 0; give all the same "
                    "command and model, and report it"
                )
            self._make_room(plan)

    def _make_room(self, plan):
        self._stream_as(plan)
        self.caches.reserve(pool_sizes(plan.load, windows_of(self.cfg)), plan.cache)

    def _fitting_plan(self, shape):
        while True:
            plan = self.plan_for(shape)
            if plan.fits or not self.kept.drop_oldest():
                plan.check()
                return plan

    @contextmanager
    def turn(self) -> Iterator[Executor]:
        """One thread at a time has the executor. Raises UsageError where the model is closed."""
        check_process()
        with self._ledger.turn():
            if self._closed:
                raise UsageError(CLOSED)
            if self._executor is None:  # another one could not be made: what streamed before
                self._executor = self._make_executor(self.plan)
            yield self._executor

    def _stream_as(self, plan):
        """Makes the executor follow `plan`: with other tiers if the tiles are the same, else a new
        executor."""
        old = self._executor
        if self.host is not None:
            self.host.forget()
        if old is not None and plan.tiles is old.tiles:
            if plan.streamed != self.plan.streamed:
                old.retier(*plan.streamed)
            self.plan = plan
            return
        if old is not None:
            old.close()
        self._executor = None
        self._executor = self._make_executor(plan)
        self.plan = plan

    def _make_executor(self, plan):
        return Executor(
            self.store,
            plan.tiles,
            plan.tiers,
            ring=plan.ring,
            ahead=plan.ahead,
            devices=self.devices,
            totals=self.totals,
            watch=self.watch,
            checks=self._checks,
            attending=plan.attending,
            page_cache=self._page_cache,
            experts=plan.experts,
            end=self._end_stalled,
        )

    def _end_stalled(self, line):
        leave(line)
        self.watch.end(line)

    def _check_context(self):
        limit, context = self.cfg.max_position_embeddings, self.run.context
        if context and context > limit:
            raise UsageError(f"context: {context} tokens, the model's own limit is {limit}")

    def check_ids(self, ids: list[int], *, begin: int | None = None) -> None:
        """Raises UsageError unless `ids` is a non-empty list of ids of the vocabulary. `begin`: the
        model's beginning token, if it has one."""
        check_ids(ids, vocab_size=self.cfg.vocab_size, begin=begin)

    def check_length(self, n_prompt: int) -> None:
        """Raises UsageError if a prompt is longer than the context."""
        if n_prompt > self.context_limit:
            raise UsageError(
                f"prompt: {n_prompt} tokens, longer than the context of {self.context_limit}; "
                "shorten it"
            )

    @property
    def context_limit(self) -> int:
        """The most positions of a sequence: the option `context` if given, else the model's
        limit."""
        return self.run.context or self.cfg.max_position_embeddings

    @property
    def compiles(self) -> dict[str, int]:
        """Label of a program -> how often XLA compiled it so far."""
        drafts = {} if self.draft is None else self.draft.compiles
        return self.programs.compiles | drafts

    @property
    def reads_directly(self) -> bool:
        """Whether reads pass by the page cache."""
        return self._executor is None or self._executor.reads_directly

    @property
    def n_alive(self) -> int:
        """The number of live runs."""
        return len(self._ledger.alive)

    @property
    def device_name(self) -> str:
        """Platform, number and kind of the device, as the driver names it."""
        return str(self.devices)

    def files_of(self, tier: Tier) -> list[str]:
        """Paths of the files with the tiles of a tier."""
        pairs = zip(self.plan.tiles, self.plan.tiers, strict=True)
        tiles = [tile for tile, its_tier in pairs if its_tier is tier]
        tensors = [part.tensor for tile in tiles for part in tile.parts]
        return list(dict.fromkeys(self.store.segment_of(name).file for name in tensors))

    def note_peaks(self) -> None:
        """Updates the peaks of memory after a forward pass."""
        self.host_peak_bytes = max(self.host_peak_bytes, anonymous_bytes())
        dealt = self.totals.most_live_bytes + self.plan.tier_bytes(Tier.DEVICE)
        held = (
            -(-dealt // len(self.devices.own))
            + self.caches.n_bytes
            + self.sweeper.most_activation_bytes
            + self._residents.n_bytes
            + self.programs.temporary_bytes
            + (0 if self.draft is None else self.draft.n_bytes + self.draft.temporary_bytes)
        )
        self.device_peak_bytes = max(self.device_peak_bytes, held)

    def memory(self) -> dict:
        """Budgets and peaks as `generate --json` prints them."""
        return memory_of(
            *(self._machine, self.devices.own),
            device_peak=self.device_peak_bytes,
            host_peak=self.host_peak_bytes,
        )

    def close(self) -> None:
        """Ends the readers' threads and closes the files. A forward pass that is under way in
        another thread ends at its next step, with an error that says so."""
        if is_forked():  # threads and files are those of the other process
            return
        self._closed = True
        executor = self._executor
        if executor is not None and self.hosts is None:  # the others would wait for the rest of it
            executor.refuse(UsageError(CLOSED))
        with self._ledger.turn():
            end_others()
            if self._executor is not None:
                self._executor.close()
                self._executor = None
            self.embedding.close()
            self.caches.close()
            self.sweeper.chooser.close()
            if self.host is not None:
                self.host.close()
