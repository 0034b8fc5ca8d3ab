"""Compiles programs, several at a time, and counts what XLA compiles.

Models that are open at once, and are alike, share their programs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

import jax

from jlayer.interrupts import deferred
from jlayer.streaming.devices import LAUNCHES, Devices
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


@dataclass(frozen=True, eq=False)
class _Program:
    """`count`: how many XLA compiled for it."""

    run: Callable
    count: int

    @cached_property
    def in_turn(self) -> Callable:
        """Runs it, launched on all of its devices before another program is."""
        function = self.run

        def run(*given):
            with LAUNCHES:
                return function(*given)

        return run


# The programs of all models that are open.
all_programs: WeakValueDictionary[Hashable, _Program] = WeakValueDictionary()


class Compiler:
    """Compiled programs for some devices, by label and key.

    `of`: what the programs depend on besides label, key, arguments and devices; those of two
    compilers for which it is equal are the same. `at_a_time`: how many are compiled at a time.
    `compiles`: how many were, by label. `temporary_bytes`: of the program with the most so far, as
    XLA reports.
    """

    def __init__(
        self, devices: Devices, watch: Watch, *, of: Hashable, at_a_time: int | None = None
    ):
        self._devices, self._watch, self._of = devices, watch, of
        self.compiles: dict[str, int] = {}
        self.temporary_bytes = 0
        self._programs: dict[tuple, _Program] = {}
        self._waiting: dict[tuple, tuple[Future, object, tuple]] = {}  # and what is compiled
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
            return self._called(self._programs[name])
        if name in self._waiting:
            return None
        shared = self._shared_name(name, args, reuses, results)
        if (program := all_programs.get(shared)) is not None:
            return self._keep(name, shared, program)
        with deferred(), self._watch.compiling(label):
            lowered = self._lower(function, args, reuses, results)
            if self._pool is None:
                return self._keep(name, shared, compiled(lowered))
            self._waiting[name] = (self._pool.submit(compiled, lowered), lowered, shared)
        return None

    def _shared_name(self, name, args, reuses, results):
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        results = tuple(jax.tree.leaves(results)), jax.tree.structure(results)
        return self._of, self._devices.all, name, tree, shapes, reuses, results

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
                for name, (future, lowered, shared) in self._waiting.items():
                    with deferred(), self._watch.compiling(name[0]):
                        try:
                            self._keep(name, shared, future.result())
                        except jax.errors.JaxRuntimeError as error:
                            if OUT_OF_MEMORY not in str(error):
                                raise
                            alone.append((name, lowered, shared))
                for name, lowered, shared in alone:
                    with deferred(), self._watch.compiling(name[0]):
                        self._keep(name, shared, compiled(lowered))
            finally:
                self._pool = None
                for future, *_ in self._waiting.values():
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

    def _keep(self, name, shared, program):
        temporary = program.run.memory_analysis().temp_size_in_bytes
        self.temporary_bytes = max(self.temporary_bytes, temporary)
        self.compiles[name[0]] = self.compiles.get(name[0], 0) + program.count
        self._programs[name] = all_programs[shared] = program
        return self._called(program)

    def _called(self, program):
        return program.run if len(self._devices) == 1 else program.in_turn


def _at_a_time(device):
    """For a CPU one: XLA has threads of its own for it."""
    return 1 if device.platform == "cpu" else min(AT_A_TIME, len(os.sched_getaffinity(0)))


def compiled(lowered) -> _Program:
    before = _compiled_here()
    return _Program(lowered.compile(), _compiled_here() - before)
