"""The frozen model that is tuned: opened, cut into tiles, and streamed in the order of a step."""

from __future__ import annotations

import os
from collections.abc import Callable

from jlayer.additions import Additions
from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.engine import device as choosing
from jlayer.engine import residents
from jlayer.engine.alike import measured_machine
from jlayer.engine.programs import Programs
from jlayer.engine.report import available_bytes
from jlayer.errors import UsageError
from jlayer.families.registry import has_state
from jlayer.plan.machine import Machine
from jlayer.plan.tiles import Weights
from jlayer.run_config import RunConfig
from jlayer.spec import ModelConfig
from jlayer.streaming.cached import page_cache_use
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor
from jlayer.streaming.watch import Totals, Watch
from jlayer.tuning.adapter import State
from jlayer.tuning.flat import Layout
from jlayer.tuning.planning import TunePlan, make_plan, trained_of
from jlayer.tuning.settings import Settings
from jlayer.tuning.step import Stepper


class Base:
    """A model whose weights stay as they are, and the `plan` of what is done with it. `adapter`:
    what is trained, of the shapes of `state`. `plan_of`: makes the plan, of the weights, the
    machine, `settings` and that.

    Raises what opening a model raises, and DoesNotFitError.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        run: RunConfig,
        settings: Settings,
        adapter: Additions,
        state: State,
        *,
        watch: Watch | None = None,
        plan_of: Callable[..., TunePlan] = make_plan,
    ):
        self.watch, self.totals = watch or Watch(), Totals()
        self.watch.phase("reading headers")
        self.store = Store(folder, follow_links=run.follow_links)
        self.cfg = self.store.cfg
        self.dtype = run.dtype or self.store.float_dtype
        self.weights = Weights(self.cfg, self.store.form_of, self.dtype)
        check_trained(self.cfg, self.dtype, settings)
        machine = self._look_at_machine(run)
        self.watch.phase("planning")
        self.plan = plan_of(self.weights, machine, settings, adapter)
        self.plan.check()
        self.programs = Programs(self.cfg, dtype=self.dtype, devices=self.devices, watch=self.watch)
        self.embedding = Embedding(self.store, self.weights)
        self.watch.phase("reading norms and biases")
        try:
            checks = Checks(self.store.expected())
            self.residents = residents.load(self.store, self.weights, checks, self.devices)
            self.executor = self._make_executor(checks)
        except BaseException:
            self.embedding.close()
            raise
        self.stepper = Stepper(
            self.programs,
            self.embedding,
            self.residents,
            self.plan.visits,
            Layout.of(trained_of(self.cfg, adapter), state),
            dropout=settings.dropout,
        )

    def _look_at_machine(self, run) -> Machine:
        self.watch.phase("starting the device")
        host_budget = run.host_memory or available_bytes() * 4 // 5
        self.devices, budget, context_bytes = choosing.choose(
            run.device,
            run.device_memory,
            pinned_bytes=min(host_budget, self.store.weight_bytes),
            host_memory=host_budget,
        )
        self.watch.phase("measuring the disk and the link")
        budgets = {"device_budget": budget, "host_budget": host_budget}
        return measured_machine(
            self.devices, self.store.files, **budgets, context_bytes=context_bytes
        )

    def _make_executor(self, checks):
        plan = self.plan
        return Executor(
            self.store,
            plan.tiles,
            plan.tiers,
            ring=plan.ring,
            ahead=plan.ahead,
            devices=self.devices,
            totals=self.totals,
            watch=self.watch,
            checks=checks,
            page_cache=page_cache_use(
                True, kept_bytes=plan.disk_bytes, free_bytes=available_bytes()
            ),
            repeats=plan.repeats,
            again=plan.again,
        )

    def close(self) -> None:
        """Ends the readers' threads and closes the files."""
        self.executor.close()
        self.stepper.close()
        self.embedding.close()


def check_trained(cfg: ModelConfig, dtype: str, settings: Settings) -> None:
    """Raises UsageError for what is not trained."""
    if dtype == "float16":
        raise UsageError(
            "dtype: small gradients vanish in float16; compute in bfloat16 or float32 (--dtype)"
        )
    if settings.length > cfg.max_position_embeddings:
        raise UsageError(
            f"length: {settings.length} tokens, the model's own limit is "
            f"{cfg.max_position_embeddings}; take at most that (--length)"
        )
    if settings.packs and has_state(cfg):
        raise UsageError(
            "packs: this model keeps a state from token to token, which texts in one lane would "
            "share; give each a lane of its own (--padded)"
        )
