"""The figures of a run: bytes, times, compiles; and the memory of the process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jlayer.plan.machine import Machine
from jlayer.streaming.watch import ADDED


@dataclass
class Stats:
    """The figures of one generation, as `generate --json` prints them, in bytes and seconds."""

    load_s: float = 0.0
    load_read_bytes: int = 0  # in that time: of what stays on the device
    load_cached_bytes: int = 0  # those of them that lay in the page cache
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sweeps: int = 0
    new_tokens: int = 0
    kept_tokens: int = 0  # of the prompt, whose entries an earlier run had left
    decode_sweeps: int = 0
    sweep_bytes: int = 0
    moved: dict[str, float] = field(default_factory=dict)  # see `streaming.watch.ADDED`
    compiles: dict[str, int] = field(default_factory=dict)
    reads: str = "direct"
    lanes: int = 0  # the most in one of its forward passes
    rows: int = 0  # of all its forward passes
    drafted: int = 0  # guessed tokens
    verified: int = 0  # those of them that rode in a forward pass
    accepted_by_depth: list[int] = field(default_factory=list)  # drawn as guessed, by place
    draft_s: float = 0.0  # guessing
    sweep_s: float = 0.0  # forward passes that verified guesses
    sharpness: float | None = None

    @property
    def first_token_s(self) -> float:
        """From opening the model to the first token; 0 before it."""
        return self.load_s + self.prefill_s if self.new_tokens else 0.0

    @property
    def tokens_per_sweep(self) -> float:
        """New tokens divided by decode sweeps; 0 if there was only prefill, which gives the first
        token."""
        return self.new_tokens / self.decode_sweeps if self.decode_sweeps else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of prefill and decoding."""
        seconds = self.prefill_s + self.decode_s
        return self.new_tokens / seconds if seconds else 0.0

    def as_dict(self) -> dict:
        return {
            "load_s": round(self.load_s, 4),
            "load_read_bytes": self.load_read_bytes,
            "load_cached_bytes": self.load_cached_bytes,
            "prefill_s": round(self.prefill_s, 4),
            "first_token_s": round(self.first_token_s, 4),
            "decode_s": round(self.decode_s, 4),
            "sweeps": self.sweeps,
            "decode_sweeps": self.decode_sweeps,
            "kept_tokens": self.kept_tokens,
            "tokens_per_sweep": round(self.tokens_per_sweep, 4),
            "tokens_per_s": round(self.tokens_per_s, 4),
            "sweep_bytes": self.sweep_bytes,
            **{name: round(self.moved.get(name, 0), 4) for name in ADDED},
            "compiles": dict(self.compiles),
            "reads": self.reads,
            "lanes": self.lanes,
            "rows": self.rows,
            "drafted": self.drafted,
            "verified": self.verified,
            "accepted_by_depth": list(self.accepted_by_depth),
            "draft_s": round(self.draft_s, 4),
            "sweep_s": round(self.sweep_s, 4),
            "sharpness": None if self.sharpness is None else round(self.sharpness, 4),
        }


@dataclass(frozen=True)
class Seconds:
    """Of a forward pass: guessing ahead of it, the pass itself, drawing tokens after it."""

    drafting: float
    sweep: float
    drawing: float

    @property
    def total(self) -> float:
        return self.drafting + self.sweep + self.drawing


class Account:
    """What a run has got from forward passes, its own or shared: each counts whole for every run
    that it carried."""

    def __init__(self, stats: Stats):
        self.stats = stats
        self.n_tokens = 0  # drawn so far
        self._before = 0  # drawn before the present pass

    def guess(self, drafted: int, verified: int, accepted: int) -> None:
        """Counts the guesses of a lane for a forward pass, and how many in a row were right."""
        stats = self.stats
        stats.drafted += drafted
        stats.verified += verified
        longer = accepted - len(stats.accepted_by_depth)
        stats.accepted_by_depth += [0] * longer
        for depth in range(accepted):
            stats.accepted_by_depth[depth] += 1

    def count(self, seconds: Seconds, moved: dict[str, float], *, lanes: int, rows: int) -> None:
        """Counts a forward pass once its tokens are drawn."""
        stats = self.stats
        stats.draft_s += seconds.drafting
        stats.sweep_s += seconds.sweep
        if self._before == 0:
            stats.prefill_s += seconds.total
        else:
            stats.decode_s += seconds.total
            stats.decode_sweeps += 1
        self._before = stats.new_tokens = self.n_tokens
        stats.sweeps += 1
        stats.lanes = max(stats.lanes, lanes)
        stats.rows += rows
        for name, value in moved.items():
            stats.moved[name] = stats.moved.get(name, 0) + value


class Clock:
    """Seconds since the last lap."""

    def __init__(self):
        self._began = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return seconds


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process now, as the kernel counts it."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def free_beside(peak_bytes: int) -> int:
    """Memory that stays free once this process has taken all that it may: `peak_bytes`."""
    return available_bytes() - max(0, peak_bytes - anonymous_bytes())


def available_bytes() -> int:
    """Memory that can be allocated without swapping, as the kernel estimates it."""
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def memory_of(machine: Machine, devices: Sequence, *, device_peak: int, host_peak: int) -> dict:
    """Budgets and peaks as `generate --json` prints them. `device_peak`: as accounted.

    JAX reports no allocator statistics on a CPU: there the peak is a sum of what is held.
    """
    stats = [one.memory_stats() or {} for one in devices]
    peak = max(one.get("peak_bytes_in_use", 0) for one in stats)
    measured = peak and peak + machine.context_bytes
    return {
        "device_budget_bytes": machine.device_budget,
        "device_peak_bytes": measured or device_peak,
        "device_peak_how": "measured" if measured else "accounted",
        "host_budget_bytes": machine.host_budget,
        "host_peak_bytes": host_peak,
        "host_peak_how": "measured",
    }
