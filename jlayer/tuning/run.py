"""A run of tuning from its data to a folder of PEFT's: steps, held-out perplexity, checkpoints.

Beside OUT there is `OUT.tuning` as long as the run is not complete: killed at any moment, the same
run goes on from its last checkpoint, to the same bytes.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import numpy as np

from jlayer.checkpoint.adapter import WEIGHTS
from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.run_config import RunConfig
from jlayer.streaming.watch import Watch
from jlayer.tuning.adapter import AdapterConfig, State, low_ranks, save_adapter
from jlayer.tuning.base import Base
from jlayer.tuning.disk import MADE, WorkFolder
from jlayer.tuning.lanes import Lanes, Steps, packed, padded
from jlayer.tuning.optimizer import AdamW, Moments, clip_factor, length_of, rates_of
from jlayer.tuning.planning import Order, TunePlan, make_plan
from jlayer.tuning.rows import chunks_of
from jlayer.tuning.saving import Checkpoints, Saved
from jlayer.tuning.settings import Settings

MOST_NATS = 700.0  # whose exponential is a number
FORM = 2  # of what a checkpoint's facts say
DEVICE = "--device"  # a fact that the plan has
ANEW = "remove the folder to begin anew with another plan"
DIGEST = 32  # letters; a fact of so many is a digest, and tells nobody anything


@dataclass(frozen=True)
class Told:
    """A step that is done. `loss`: nats a token, before the step; `rate`: the learning rate;
    `length`: of all gradients, before they were clipped; `tokens`: those that were learned from;
    `seconds`: the step took; `perplexity`: of held-out text after it, where that was due."""

    step: int
    n_steps: int
    epoch: float
    loss: float
    rate: float
    length: float
    tokens: int
    seconds: float
    put_bytes: int
    perplexity: float | None = None

    def as_dict(self) -> dict:
        return {
            "step": self.step,
            "steps": self.n_steps,
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.rate,
            "gradient_norm": self.length,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "put_bytes": self.put_bytes,
            **({} if self.perplexity is None else {"perplexity": self.perplexity}),
        }

    @classmethod
    def of(cls, found: Mapping) -> Told:
        """Of what `as_dict` gives."""
        words = {"steps": "n_steps", "learning_rate": "rate", "gradient_norm": "length"}
        return cls(**{words.get(name, name): value for name, value in found.items()})


@dataclass
class History:
    """What a run tells of itself so far: `steps` as of `Told.as_dict`, and the held-out perplexity
    before the first one."""

    steps: list[dict] = field(default_factory=list)
    before: float | None = None

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Before, and after the last step that it was measured after; None without held-out
        text."""
        found = [step["perplexity"] for step in self.steps if "perplexity" in step]
        return None if self.before is None or not found else (self.before, found[-1])


@dataclass(frozen=True)
class Work:
    """What is to be done. `begun`: the adapters at the start; `alphas`: of matrices that have
    another than `how`; `examples`, `held_out`: cut to the length already, the latter may be empty.
    `facts`: what else must be the same for a run to go on, for JSON."""

    folder: str
    out: str
    run: RunConfig
    settings: Settings
    how: AdapterConfig
    begun: State
    examples: Sequence
    held_out: Sequence
    facts: Mapping
    alphas: Mapping[str, float] = field(default_factory=dict)


class Tuning:
    """A run that is open, at the step that it has come to. `place`: of OUT, where the caller has
    entered it already. Raises UsageError where what is there was begun otherwise, what entering
    that raises, and what opening a model raises."""

    def __init__(self, work: Work, *, place: WorkFolder | None = None, watch: Watch | None = None):
        with ExitStack() as stack:
            self._place = place or stack.enter_context(WorkFolder(work.out))
            self._checkpoints = stack.enter_context(Checkpoints(self._place.path))
            self._open(work, watch, stack)
            self._stack = stack.pop_all()

    def _open(self, work, watch, stack):
        self._work, settings = work, work.settings
        self.steps = Steps(
            work.examples, settings.length, settings.lanes, settings.seed, settings.packs
        )
        self.n_steps = settings.steps or self.steps.n_steps(settings.epochs)
        self.history = History()
        self._facts = json.loads(json.dumps({"form": FORM, **work.facts}))
        adapter = low_ranks(work.begun, work.how, work.alphas)
        saved = None

        def plan_of(weights, machine, *words):
            # Only now has JAX what must be set before Orbax starts it.
            nonlocal saved
            saved = self._checkpoints.latest()
            return self._plan(saved, weights, machine, *words)

        given = work.folder, work.run, settings, adapter, work.begun
        self.base = Base(*given, watch=watch, plan_of=plan_of)
        stack.callback(self.base.close)
        self._layout = self.base.stepper.layout
        self._begin(saved)
        self._adam = AdamW(settings, self.base.devices.put)
        self._rates = rates_of(settings, self.n_steps)
        self._next: tuple = (None, None, None)  # a step's number, its lanes and chunks
        self._held_out = list(_by_step(work.held_out, settings)) if work.held_out else []
        self._saved = self.step

    def _plan(self, saved: Saved | None, weights, machine, *words) -> TunePlan:
        """A new plan; or that of the run that is gone on with, so that it comes to the same
        bytes."""
        if saved is None:
            return make_plan(weights, machine, *words)
        where, order = self._place.path, saved.facts["order"]
        there = {**saved.facts["run"], DEVICE: order["platform"]}
        check_same(there, {**self._facts, DEVICE: machine.platform}, where=where)
        plan = make_plan(weights, machine, *words, order=Order(**order))
        plan.check(f"{where}: goes on with the plan that it was begun with; ", ANEW)
        return plan

    def _begin(self, saved: Saved | None):
        if saved is None:
            self.step, self._flats = 0, self._layout.flat(self._work.begun)
            self._moments = Moments.of(self._flats)
            self._refuse_another()
            return
        self.step, flat = saved.step, self._layout.flat
        self._flats = flat(saved.params)
        self._moments = Moments(flat(saved.mu), flat(saved.nu), saved.step)
        told = saved.facts["history"]
        self.history = History(told["steps"], told["before"])
        if self.step < self.n_steps:
            self._refuse_another()

    def _refuse_another(self):
        """What is at OUT now is not of this run, which comes to it later."""
        if os.path.lexists(self._place.out):
            raise UsageError(
                f"{self._place.out}: is there already, and is not of the run in "
                f"{self._place.path}; move it away, and run the same command again"
            )

    @property
    def state(self) -> State:
        """The adapters as they are now."""
        return self._layout.views(self._flats)

    def go_on(self, check: Callable[[], None] = lambda: None) -> Iterator[Told]:
        """Takes the steps that are left. `check`: called at every tile; what it raises ends the
        run, which can be gone on with. Raises CheckpointError where the loss, its gradient or the
        perplexity is not finite: what was saved before stands."""
        settings = self._work.settings
        if self._held_out and self.history.before is None:
            self.history.before = self.perplexity(check)
        # A run that was stopped between a step and its perplexity goes on with that.
        while self.step < self.n_steps or self._is_unmeasured():
            if not self._is_unmeasured():
                self.history.steps.append(self._step(check).as_dict())
                self.step += 1
            if self._is_unmeasured():
                self.history.steps[-1]["perplexity"] = self.perplexity(check)
            if self.step == self.n_steps or _is_due(self.step, settings.save_every):
                self.save()
            yield Told.of(self.history.steps[-1])

    def _is_unmeasured(self):
        """Whether the perplexity after the last step is due, and not known."""
        is_last = self.step == self.n_steps
        is_due = self.step and (is_last or _is_due(self.step, self._work.settings.eval_every))
        return bool(self._held_out and is_due and "perplexity" not in self.history.steps[-1])

    def _step(self, check):
        began, before = time.perf_counter(), self.base.totals.put_bytes
        number, settings = self.step, self._work.settings
        lanes, chunks = self._of_step(number)
        following = self._of_step(number + 1)[1] if number + 1 < self.n_steps else ()
        noise = (settings.seed, number) if settings.dropout else ()
        found = self.base.stepper.run(
            *(self.base.executor, chunks, self._flats),
            following=following,
            noise=noise,
            check=check,
        )
        loss = _sum_of(found.losses, chunks)
        length, rate = length_of(found.gradients), self._rates(number)
        if not math.isfinite(loss) or not math.isfinite(length):
            raise CheckpointError(
                f"step {number + 1}: the loss or its gradient is not finite; begin anew with a "
                "lower --learning-rate, or run jlayer verify on the model"
            )
        self._flats, self._moments = self._adam.step(
            self._flats,
            found.gradients,
            self._moments,
            rate=rate,
            factor=clip_factor(length, settings.clip),
        )
        return Told(
            step=number + 1,
            n_steps=self.n_steps,
            epoch=self.steps.epoch_of(number + 1),
            loss=loss,
            rate=rate,
            length=length,
            tokens=int((lanes.weights > 0).sum()),
            seconds=time.perf_counter() - began,
            put_bytes=self.base.totals.put_bytes - before,
        )

    def _of_step(self, number):
        """(the lanes of a step, the same as chunks)."""
        if self._next[0] != number:
            lanes = self.steps.step(number)
            total = float(lanes.weights.sum(dtype=np.float64))
            self._next = number, lanes, self._chunks(lanes, 1 / total)
        return self._next[1:]

    def _chunks(self, lanes, share):
        base = self.base
        return list(chunks_of(base.cfg, lanes, base.plan.order.chunk_lanes, share=share))

    def perplexity(self, check: Callable[[], None] = lambda: None) -> float:
        """Of the held-out text, as the weights of its tokens count."""
        total = weight = 0.0
        for lanes in self._held_out:
            chunks = self._chunks(lanes, 1.0)
            found = self.base.stepper.run(
                self.base.executor, chunks, self._flats, trains=False, check=check
            )
            total += _sum_of(found.losses, chunks)
            weight += float(lanes.weights.sum(dtype=np.float64))
        mean = total / weight
        if not mean < MOST_NATS:  # nor NaN
            raise CheckpointError(
                f"the held-out text after step {self.step} has {mean:.3g} nats a token, of which "
                "there is no perplexity; begin anew with a lower --learning-rate"
            )
        return math.exp(mean)

    def save(self) -> None:
        """Writes a checkpoint, if there is none of this step."""
        if self._saved == self.step:
            return
        history = {"steps": self.history.steps, "before": self.history.before}
        self._checkpoints.save(
            Saved(
                step=self.step,
                params=self.state,
                mu=self._layout.views(self._moments.mean),
                nu=self._layout.views(self._moments.square),
                facts={
                    "run": self._facts,
                    "order": asdict(self.base.plan.order),
                    "history": history,
                },
            )
        )
        self._saved = self.step

    def finish(self, card: str, *, base: str, lead: str) -> None:
        """Writes the adapter to OUT, and removes what the run needed to go on. `base`: what the
        adapter says that it was trained for; `card`: the text of its README.md; `lead`: as of
        `save_adapter`. Raises UsageError where OUT is there, and is not this adapter."""
        work, place = self._work, self._place
        made = os.path.join(place.path, MADE)
        shutil.rmtree(made, ignore_errors=True)
        try:
            save_adapter(
                made,
                self.state,
                self.base.cfg,
                work.how,
                base=base,
                card=card,
                dropout=work.settings.dropout,
                alphas=work.alphas,
                lead=lead,
            )
            if not os.path.lexists(place.out):
                place.move_out()
            elif not _is_same(made, place.out):  # else the run was stopped right after it was moved
                self._refuse_another()
        except StorageError as error:
            raise StorageError(
                f"{error}; all steps are kept, and the same command ends the run"
            ) from None
        self._checkpoints.close()
        place.remove()

    def close(self) -> None:
        self._stack.close()


def check_same(there: Mapping, here: Mapping, *, where: str) -> None:
    """Whether a run was begun with what it is to go on with: names and values for JSON. Raises
    UsageError, which names all that differ."""
    found = [
        _difference(name, there.get(name), here.get(name))
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if not found:
        return
    advice = "give what it was begun with, or remove the folder to begin anew"
    if any(name in one for one in found for name in ("--steps", "--epochs")):
        advice += (
            " (the learning rate of each step hangs on how many there are: to train longer, end "
            "this run, and begin another with its OUT as --adapter)"
        )
    raise UsageError(f"{where}: was begun {', and '.join(found)}; {advice}")


def _difference(name, there, here):
    if any(isinstance(value, str) and len(value) >= DIGEST for value in (there, here)):
        how = "without" if there is None else "with" if here is None else "with another"
        return f"{how} {name}"
    return f"with {name} {_shown(there)}, not {_shown(here)}"


def _shown(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_same(one, other):
    """Whether two folders have the same weights of an adapter."""
    files = [os.path.join(folder, WEIGHTS) for folder in (one, other)]
    return all(map(os.path.isfile, files)) and filecmp.cmp(*files, shallow=False)


def _is_due(step, every):
    return every > 0 and step % every == 0


def _sum_of(losses, chunks):
    return float(
        sum(
            np.dot(found.astype(np.float64), chunk.weights.astype(np.float64))
            for found, chunk in zip(losses, chunks, strict=True)
        )
    )


def _by_step(examples, settings) -> Iterator[Lanes]:
    """Held-out texts in their order, as lanes of as many as a step has; the last ones are empty."""
    whole = (packed if settings.packs else padded)(examples, settings.length)
    n, count = len(whole.ids), settings.lanes
    for first in range(0, n, count):
        own = {name: array[first : first + count] for name, array in vars(whole).items()}
        yield Lanes(**{name: _filled(array, count) for name, array in own.items()})


def _filled(array, count):
    empty = np.zeros((count - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, empty])
