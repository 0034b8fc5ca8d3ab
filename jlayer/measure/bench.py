"""Benchmarks a model on this machine: raw disk and link, one layer alone, whole sweeps, and the
share of its ceiling that each reaches.

Gives figures only; `app/verbs/bench` prints and explains them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from jlayer.api import Model
from jlayer.engine.alone import lanes_of_hosts
from jlayer.engine.device import link_speed
from jlayer.families.registry import layer_of, published_tensors
from jlayer.interrupts import check
from jlayer.measure.cores import CoresMeasured, measure_cores
from jlayer.measure.machine import (
    RawDisk,
    arithmetic_speeds,
    link_speeds,
    median,
    memory_speeds,
    summary,
)
from jlayer.measure.together import together
from jlayer.plan.hosting import seconds_on_host
from jlayer.plan.machine import HostSpeeds
from jlayer.plan.making import make_plan, matrix_forms, with_host
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier

# Tokens per sweep: decoding; verifying drafts, or a short prompt; a long prompt.
SIZES = (1, 64, 512)
STREAM = 0  # stands for a sweep in which all weights move and nothing is multiplied
# Rounds of all sizes: at least three, for a meaningful median, unless that takes minutes.
LEAST_ROUNDS, MOST_ROUNDS = 3, 7
ENOUGH_S, TOO_LONG_S = 8, 240
# Sweeps from disk are timed IN_A_ROW at a time; one that takes over LONG_S is timed alone.
IN_A_ROW, LONG_S = 3, 20
MEMORY_BYTES = 128 << 20  # the most bytes to read for measuring memory


class Bench:
    """The benchmark of an opened model.

    `speeds`: lists of the machine's speeds: "disk", "link", "memory" (bytes/s), "arithmetic"
    (operations/s). `cores`: of the host's cores, where they multiply or could. `lanes`: of each
    host, where there are several links or hosts, as `lanes_of_hosts` gives it. Creating it makes
    the plan of the longest sweep, which serves all sizes, and measures nothing. Raises
    DoesNotFitError.
    """

    def __init__(self, model: Model):
        self.engine = engine = model.engine
        self.sizes = tuple(n for n in SIZES if n <= engine.context_limit)
        longest = self.sizes[-1]
        context = max(longest, engine.run.context or 0)
        self._shape = RunShape(1, longest, context, sweeps=MOST_ROUNDS * IN_A_ROW)
        self.forward = engine.start(self._shape)
        self.plan = self.forward.plan
        self.sweep_bytes = self.plan.tiling.n_bytes
        self.disk_bytes = self.plan.tier_bytes(Tier.DISK)
        self.has_link = self.plan.machine.kind.has_link  # a CPU multiplies where weights are
        self.layer_weights, self.sweep_weights = _count_weights(engine.cfg)
        self.speeds: dict[str, list[float]] = {}
        self.cores: CoresMeasured | None = None
        self.lanes: list[dict] = []

    def measure_machine(self):
        """Measures links, memory, arithmetic and the host's cores, while no weights move or are on
        the devices. Links are measured together, since some may share a way to main memory; memory
        and arithmetic of several devices are those of one, so many times. Of several hosts bytes
        are those of this one, arithmetic is that of all."""
        self.forward.settle()
        devices = self.engine.devices
        n, device = len(devices.own), devices.first
        if self.engine.hosts is not None or (self.has_link and n > 1):
            self.lanes = lanes_of_hosts(self.engine, self.engine.store.files)
        if self.has_link:
            alone = n == 1
            self.speeds["link"] = link_speeds(device) if alone else _together(devices)
        n_bytes = min(MEMORY_BYTES, self.sweep_bytes)
        self.speeds["memory"] = [n * one for one in memory_speeds(device, n_bytes)]
        of_all = arithmetic_speeds(device, self.engine.dtype)
        self.speeds["arithmetic"] = [len(devices) * one for one in of_all]
        self.cores = measure_cores(self.engine, self.plan)

    @property
    def host_speeds(self) -> HostSpeeds | None:
        """The speeds of the host's cores: as measured here, else at opening."""
        return self.plan.machine.host if self.cores is None else self.cores.beside

    def fits_with(self, host_share: float) -> bool:
        """Whether the budgets hold these sweeps where the user asks for this share."""
        engine, forms = self.engine, matrix_forms(self.engine.weights)

        def plan_of(shares):
            return make_plan(
                engine.weights,
                self.plan.machine,
                self._shape,
                keeps_layers=engine.run.keeps_layers,
                draft=None if engine.draft is None else engine.draft.weights,
                shares=shares,
            )

        return with_host(plan_of, forms, host_share, None).fits

    def measure_blocks(self) -> list[dict]:
        """Times one layer alone, with its weights on the device, for each size."""
        tiles = [tile for tile in self.plan.tiles if tile.layer == 0]
        n_bytes = sum(tile.n_bytes for tile in tiles)
        for n_tokens in self.sizes:  # before any weight takes the compiler's room
            self.forward.compile(n_tokens)
        rows = []
        for n_tokens in self.sizes:
            seconds = self.forward.layer_seconds(n_tokens)
            limits = self._arithmetic(n_bytes, self.layer_weights, n_tokens)
            rows.append(_row(n_tokens, n_bytes, seconds, [limits] * len(seconds)))
        return rows

    def first_sweep(self) -> float:
        """Seconds of the first sweep, which also fills the tiers; no other figure includes it."""
        return timed(lambda: self.sweep(1))

    def measure_sweeps(self) -> list[dict]:
        """Times whole sweeps of every size in turn; if weights move at all, also one without
        arithmetic ("tokens" is 0). Each is compared with the disk's speed just before and after
        it."""
        sizes = (STREAM, *self.sizes) if self.disk_bytes or self.has_link else self.sizes
        seconds, limits = {n: [] for n in sizes}, {n: [] for n in sizes}
        disk = RawDisk(self.engine.files_of(Tier.DISK)) if self.disk_bytes else None
        began, rounds = time.perf_counter(), 0
        before = self.read_raw(disk)
        while not enough(rounds, time.perf_counter() - began):
            for n in sizes:
                seconds[n].append(self._time_sweeps(n, from_disk=disk is not None))
                after = self.read_raw(disk)
                limits[n].append(self._limits(n, (before, after)))
                before = after
            rounds += 1
        if disk:
            disk.close()
        return [
            {
                "weights": self.sweep_weights,
                **_row(n, self.sweep_bytes, seconds[n], limits[n]),
                **self._together(n, seconds[n]),
            }
            for n in sizes
        ]

    def _together(self, n_tokens, seconds):
        """The least seconds of a sweep whose passing bytes are divided at best between link and
        cores, and the share of it; nothing where the host does not multiply."""
        if n_tokens == STREAM or self.engine.host is None:
            return {}
        both = together(self.plan, self.host_speeds, n_tokens)
        if both is None:
            return {}
        share = summary([both.least_s / each for each in seconds])
        return {"together_s": both.least_s, "together_share": share}

    def _time_sweeps(self, n_tokens, *, from_disk):
        """Seconds of one sweep. From disk: the mean of some in a row, after one that is not timed.

        After a pause the first tiles are already read, and every sweep begins and ends with tiles
        that are partly read.
        """
        if not from_disk:
            return timed(lambda: self.sweep(n_tokens))
        began = time.perf_counter()
        self.sweep(n_tokens)
        is_long = time.perf_counter() - began > LONG_S
        return self.time_in_a_row(n_tokens, 1 if is_long else IN_A_ROW)

    def time_in_a_row(self, n_tokens: int, count: int) -> float:
        """Seconds of a sweep, of so many in a row."""
        return timed(lambda: [self.sweep(n_tokens) for _ in range(count)]) / count

    def read_raw(self, disk: RawDisk | None) -> float | None:
        """Measures the disk's speed for about as long as a sweep, within reason, and keeps it."""
        if disk is None:
            return None
        self.forward.settle()
        about = min(0.8, max(0.05, self.disk_bytes / self.plan.machine.disk_speed))
        speed = disk.steady_speed(about)
        self.speeds.setdefault("disk", []).append(speed)
        return speed

    def sweep(self, n_tokens: int):
        """One sweep of `n_tokens` tokens from the first position on, or STREAM."""
        if n_tokens == STREAM:
            self.forward.stream()
        else:
            self.forward.sweep([self._ids(n_tokens)], [0])

    def _ids(self, n_tokens):
        return [(7 * i) % self.engine.cfg.vocab_size for i in range(n_tokens)]

    def _limits(self, n_tokens, disk_speeds):
        """Resource -> the least seconds of a sweep that it allows."""
        limits = {}
        if self.disk_bytes:
            limits["disk"] = self.disk_bytes * len(disk_speeds) / sum(disk_speeds)
        hosted = frozenset() if n_tokens == STREAM else self.plan.hosted(n_tokens)
        of_host = sum(self.plan.tiling.sizes[index] for index in hosted)
        if self.has_link:
            limits["link"] = (self.plan.put_bytes - of_host) / median(self.speeds["link"])
        if hosted and (host := self.host_speeds) is not None:
            limits["cores"] = seconds_on_host(host, self.plan.tiling, sorted(hosted), n_tokens)
        if n_tokens != STREAM:
            limits |= self._arithmetic(self.sweep_bytes, self.sweep_weights, n_tokens)
        return limits

    def _arithmetic(self, n_bytes, n_weights, n_tokens):
        """The same for reading `n_bytes` of weights and multiplying `n_tokens` tokens by them."""
        return {
            "memory": n_bytes / median(self.speeds["memory"]),
            "arithmetic": 2 * n_tokens * n_weights / median(self.speeds["arithmetic"]),
        }


def _together(devices):
    """Bytes/s of all links at once."""
    return [link_speed(devices) for _ in range(LEAST_ROUNDS)]


def _count_weights(cfg):
    """(weights of one layer, weights of a sweep including the head)."""
    layer = sum(
        math.prod(shape) for name, shape in published_tensors(cfg).items() if layer_of(name) == 0
    )
    return layer, layer * cfg.num_hidden_layers + cfg.vocab_size * cfg.hidden_size


def _row(n_tokens, n_bytes, seconds, limits):
    """A row of figures with its ceiling; `limits` has one dict for each of `seconds`."""
    ceilings = [max(each.values()) for each in limits]
    middle = {name: median([each[name] for each in limits]) for name in limits[0]}
    return {
        "tokens": n_tokens,
        "bytes": n_bytes,
        "seconds": summary(seconds),
        "bytes_per_s": n_bytes / median(seconds),
        "limits_s": middle,
        "limit": max(middle, key=middle.get),
        "share": summary([c / s for c, s in zip(ceilings, seconds, strict=True)]),
    }


def repeat(function: Callable, *, most: int = 15, seconds: float = 0.6) -> list:
    """The results of repeated calls, for about `seconds`: at least three, at most `most`."""
    results, began = [], time.perf_counter()
    while len(results) < 3 or (len(results) < most and time.perf_counter() - began < seconds):
        results.append(function())
        check()
    return results


def timed(function: Callable) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def enough(rounds: int, spent: float) -> bool:
    """Whether so many rounds of all sizes, which took so many seconds, do for a median."""
    if rounds >= LEAST_ROUNDS:
        return rounds >= MOST_ROUNDS or spent > ENOUGH_S
    return rounds > 0 and spent > TOO_LONG_S
