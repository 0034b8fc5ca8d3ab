"""Whether models fit this machine, and the seconds of a token: as a run would plan them, without
starting JAX.

A run measures the link and the cores as well; here they are assumed. The disk is measured where
that matters: once for each file system that a model would be streamed from.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jlayer.cores.native import missing
from jlayer.engine.gpu import DEFAULT_DEVICE_MEMORY, gpu_memory
from jlayer.engine.report import available_bytes
from jlayer.errors import JlayerError
from jlayer.plan.machine import DEFAULT_DISK, PLATFORMS, Machine, expected_speeds
from jlayer.plan.making import make_plan, matrix_forms, with_host
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier, Weights
from jlayer.run_config import RunConfig
from jlayer.sizes import human

# Beyond this a plan takes minutes; published models that run here have less than a fifth of it.
MOST_BYTES = 4 << 40
GIVEN, MEASURED, ASSUMED = "given", "measured", "assumed"


@dataclass(frozen=True)
class Fit:
    """How a model would run. `disk_speed_is`: one of GIVEN, MEASURED and ASSUMED; None where
    nothing is read from disk between tokens. `lacks`: what to give more of where it does not fit.
    """

    fits: bool
    context: int
    seconds_a_token: float | None
    disk_bytes_a_token: int
    disk_speed: float
    disk_speed_is: str | None
    lacks: str | None = None

    def as_dict(self) -> dict:
        return dict(vars(self))


class Bench:
    """The machine that models are planned for, and the speeds of its disks so far.

    `disk_speed`, `link_speed`: bytes/s where the user gave them.
    """

    def __init__(
        self, run: RunConfig, *, disk_speed: float | None = None, link_speed: float | None = None
    ):
        gpu = None if run.device == "cpu" or _is_cpu_wanted() else _gpu_memory()
        self.platform = run.device or ("cpu" if gpu is None else "gpu")
        self.context = run.context
        self._given, self._measured = disk_speed, {}
        room = DEFAULT_DEVICE_MEMORY if gpu is None else min(DEFAULT_DEVICE_MEMORY, gpu[1])
        self.machine = Machine(
            platform=self.platform,
            device_budget=run.device_memory or room,
            host_budget=run.host_memory or available_bytes() * 4 // 5,
            context_bytes=PLATFORMS[self.platform].context_bytes,
            disk_speed=disk_speed or DEFAULT_DISK,
            link_speed=link_speed,
            cores=len(os.sched_getaffinity(0)),
        )
        if not (self.machine.kind.has_link or missing()):
            self.machine = replace(self.machine, host=expected_speeds(self.machine))

    def fit(self, weights: Weights, files: Sequence[str]) -> Fit:
        """How a model with these weights would run. `files`: some of its weights, to measure the
        disk by."""
        context = min(self.context, weights.cfg.max_position_embeddings)
        if weights.stored_bytes > MOST_BYTES:
            lacks = f"has {human(weights.stored_bytes)}, too much for a quick plan"
            return Fit(False, context, None, 0, self.machine.disk_speed, None, lacks)
        plan, how = self._plan(weights, self.machine, context), None
        if plan.fits and plan.tier_bytes(Tier.DISK):
            speed, how = self._disk_speed(files)
            if speed != plan.machine.disk_speed:
                plan = self._plan(weights, replace(self.machine, disk_speed=speed), context)
        return Fit(
            fits=plan.fits,
            context=context,
            seconds_a_token=plan.decode_seconds if plan.fits else None,
            disk_bytes_a_token=plan.tier_bytes(Tier.DISK) if plan.fits else 0,
            disk_speed=plan.machine.disk_speed,
            disk_speed_is=how,
            lacks=None if plan.fits else _lacks(plan),
        )

    def _plan(self, weights, machine, context):
        shape, tilings = RunShape(1, context, context), {}

        def plan_of(shares):
            return make_plan(weights, machine, shape, tilings=tilings, shares=shares)

        return with_host(plan_of, matrix_forms(weights), None, machine.host)

    def _disk_speed(self, files):
        """(bytes/s, how it is known) of the disk that files lie on, measured by the first files
        that are large enough."""
        if self._given is not None:
            return self._given, GIVEN
        if not files:
            return DEFAULT_DISK, ASSUMED
        from jlayer.streaming.direct import disk_speed

        try:
            place = os.stat(files[0]).st_dev
            if place not in self._measured and (speed := disk_speed(files)) is not None:
                self._measured[place] = speed
        except (OSError, JlayerError):
            return DEFAULT_DISK, ASSUMED
        if place in self._measured:
            return self._measured[place], MEASURED
        return DEFAULT_DISK, ASSUMED

    def as_dict(self) -> dict:
        """What the figures are for."""
        return {
            "device": self.platform,
            "device_memory_bytes": self.machine.device_budget,
            "host_memory_bytes": self.machine.host_budget,
            "context": self.context,
            "link_speed": self.machine.bytes_per_s if self.machine.kind.has_link else None,
            "link_speed_is": GIVEN if self.machine.link_speed else ASSUMED,
        }

    def describe(self, fits: Sequence[Fit]) -> str:
        """What the figures are for, in a line. `fits`: of the models that it is about."""
        machine = self.machine
        parts = [f"{machine.platform}, host memory {human(machine.host_budget)}"]
        if machine.kind.has_link:
            how = GIVEN if machine.link_speed else ASSUMED
            parts.insert(1, f"device memory {human(machine.device_budget)}")
            parts.append(f"link {_rate(machine.bytes_per_s)} ({how})")
        disks = {(fit.disk_speed, fit.disk_speed_is) for fit in fits if fit.disk_speed_is}
        parts += [f"disk {_rate(speed)} ({how})" for speed, how in sorted(disks)]
        return f"a token: {', '.join(parts)}, context {self.context}"


def _lacks(plan: Plan) -> str:
    """Which budget is too small for a plan that does not fit, and what would be enough."""
    needs = (
        ("device memory", plan.device_peak_bytes, plan.device.budget_bytes),
        ("host memory", plan.host_peak_bytes, plan.host.budget_bytes),
    )
    short = [f"{-(-peak // 2**20)}MiB of {what}" for what, peak, budget in needs if peak > budget]
    return f"needs {' and '.join(short)}"


def _is_cpu_wanted():
    """Whether the environment keeps JAX from using a GPU."""
    return os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"


def _gpu_memory():
    """(total, free) bytes of the GPU; None also where the driver does not answer."""
    try:
        return gpu_memory()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _rate(speed):
    return f"{speed / 1e9:.2g} GB/s"
