"""Compiles programs, several at a time, and counts what XLA compiles."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax

from jlayer.interrupts import deferred
from jlayer.streaming.devices import Devices
from jlayer.streaming.watch import Watch

# Programs for a GPU that are compiled at a time, each on a core: a program takes 0.1 to 1 s.
AT_A_TIME = 4
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"

_counted, _total, _lock = threading.local(), 0, threading.Lock()


def _count_compiles(event, duration, **_):
    global _total
    if event.endswith("backend_compile_duration"):
        _counted.here = _compiled_here() + 1
        with _lock:
            _total += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def backend_compiles() -> int:
    """The number of programs that XLA has compiled in this process so far, ours or not."""
    return _total


def _compiled_here():
    """The same of this thread."""
    return getattr(_counted, "here", 0)


class Compiler:
    """Compiled programs for some devices, by label and key.

    `at_a_time`: how many are compiled at a time. `compiles`: how many were, by label.
    `temporary_bytes`: of the program with the most so far, as XLA reports.
    """

    def __init__(self, devices: Devices, watch: Watch, *, at_a_time: int | None = None):
        self._devices, self._watch = devices, watch
        self.compiles: dict[str, int] = {}
        self.temporary_bytes = 0
        self._programs: dict[tuple, Callable] = {}
        self._waiting: dict[tuple, tuple[Future, object]] = {}  # and what is compiled
        self._pool: ThreadPoolExecutor | None = None
        self._at_a_time = at_a_time or _at_a_time(devices.first)

    def get(
        self, label: str, key, function: Callable, args, *, reuses: bool, results=None
    ) -> Callable | None:
        """The compiled program of this label and key. With two arguments, if it `reuses`, it takes
        the memory of the second for its results. `results`: their sharding, where some are not on
        every device. Inside `together`, None where it is not compiled yet."""
        name = label, key
        if name in self._programs:
            return self._programs[name]
        if name not in self._waiting:
            with deferred(), self._watch.compiling(label):
                lowered = self._lower(function, args, reuses, results)
                if self._pool is None:
                    self._keep(name, *compiled(lowered))
                else:
                    self._waiting[name] = (self._pool.submit(compiled, lowered), lowered)
        return self._programs.get(name)

    @contextmanager
    def together(self):
        """Compiles what is asked for inside the `with` in several threads; it is there after it.
        Raises what the first of them raises that fails.

        XLA tries a program's kernels on the device while it compiles. Where memory is short, there
        is room for those of one program, but not of several: these are compiled once more, alone.
        """
        if self._at_a_time == 1:
            yield
            return
        with ThreadPoolExecutor(self._at_a_time, thread_name_prefix="jlayer-compiler") as pool:
            self._pool = pool
            try:
                yield
                alone = []
                for name, (future, lowered) in self._waiting.items():
                    with deferred(), self._watch.compiling(name[0]):
                        try:
                            self._keep(name, *future.result())
                        except jax.errors.JaxRuntimeError as error:
                            if OUT_OF_MEMORY not in str(error):
                                raise
                            alone.append((name, lowered))
                for name, lowered in alone:
                    with deferred(), self._watch.compiling(name[0]):
                        self._keep(name, *compiled(lowered))
            finally:
                self._pool = None
                for future, _ in self._waiting.values():
                    future.cancel()
                self._waiting.clear()

    def _lower(self, function, args, reuses, results):
        everywhere = self._devices.everywhere
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding or everywhere
            ),
            args,
        )
        consumed = (1,) if reuses and len(args) == 2 else ()
        results = results or everywhere
        function = self._devices.on_each(function, args, results)
        return jax.jit(function, donate_argnums=consumed, out_shardings=results).lower(*placed)

    def _keep(self, name, program, count):
        temporary = program.memory_analysis().temp_size_in_bytes
        self.temporary_bytes = max(self.temporary_bytes, temporary)
        self.compiles[name[0]] = self.compiles.get(name[0], 0) + count
        self._programs[name] = program


def _at_a_time(device):
    """For a CPU one: XLA has threads of its own for it."""
    return 1 if device.platform == "cpu" else min(AT_A_TIME, len(os.sched_getaffinity(0)))


def compiled(lowered):
    """(the program, how many XLA compiled for it)"""
    before = _compiled_here()
    return lowered.compile(), _compiled_here() - before
