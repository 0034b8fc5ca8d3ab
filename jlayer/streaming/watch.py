"""What observers are told of a stream, and what is counted of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

from jlayer.interrupts import check
from jlayer.leaving import end_process


@dataclass
class Watch:
    """Callbacks for observers; each may be None.

    `on_step` (step, tile): before every step. `on_taken` (step, result): after every step, with its
    result (of a Read a Future, of a Put arrays, of a Run its output, of a Free None). `on_stall`
    (tile, seconds): again and again while a read is late. `on_phase` (words): a phase of opening
    begins. `end` (line): a device stands still, and who waits for it cannot be freed: ends the
    process, from another thread. `on_compile` (label): before a program is compiled, and (None)
    after it. `on_draft` (begin, end): tokens were guessed for the next forward pass, from and to
    these seconds of `time.perf_counter`.
    """

    on_step: Callable | None = None
    on_taken: Callable | None = None
    on_stall: Callable | None = None
    on_phase: Callable | None = None
    on_compile: Callable | None = None
    on_draft: Callable | None = None
    end: Callable[[str], None] = end_process
    n_compiling: int = 0  # programs that are compiled now

    def phase(self, words: str):
        """Announces a phase of opening; signals are handled here."""
        check()
        if self.on_phase:
            self.on_phase(words)

    @contextmanager
    def compiling(self, label: str):
        """Announces that a program is compiled inside the `with`."""
        if self.on_compile:
            self.on_compile(label)
        self.n_compiling += 1
        try:
            yield
        finally:
            self.n_compiling -= 1
            if self.on_compile:
                self.on_compile(None)

    @contextmanager
    def drafting(self):
        """Announces that tokens were guessed inside the `with`, once they are."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.on_draft:
                self.on_draft(began, time.perf_counter())

    @contextmanager
    def also(
        self,
        on_step: Callable,
        on_taken: Callable | None = None,
        on_draft: Callable | None = None,
    ):
        """Calls these too, after the present callbacks, inside the `with`."""
        before = self.on_step, self.on_taken, self.on_draft
        self.on_step = _both(self.on_step, on_step)
        self.on_taken = _both(self.on_taken, on_taken)
        self.on_draft = _both(self.on_draft, on_draft)
        try:
            yield
        finally:
            self.on_step, self.on_taken, self.on_draft = before


@dataclass
class Totals:
    """Sums of all sweeps so far, in bytes and seconds.

    `cached_bytes`: those of `read_bytes` that lay in the page cache. `bounced_bytes`: copied again
    in host memory to fix their alignment. `host_product_bytes`: of weights that the host's cores
    multiplied where they lie. `stall_s`: time that the executor waited for weights. `most_live_*`:
    the most weights on the device at a time, without those that stay there. `experts_used`: each
    counted once a layer and sweep; `experts_on_device`, `experts_in_host`: those of them that were
    kept there, and the others that were in host memory. `experts_guessed`: put before their layer
    had decided; `experts_wasted`: those of them that it did not use.
    """

    read_bytes: int = 0
    cached_bytes: int = 0
    put_bytes: int = 0
    bounced_bytes: int = 0
    host_product_bytes: int = 0
    sweeps: int = 0
    stall_s: float = 0.0
    experts_used: int = 0
    experts_on_device: int = 0
    experts_in_host: int = 0
    experts_guessed: int = 0
    experts_wasted: int = 0
    most_live_tiles: int = 0
    most_live_bytes: int = 0

    def since(self, before: Totals) -> dict[str, float]:
        """The difference to an earlier copy, of the fields in ADDED."""
        return {name: getattr(self, name) - getattr(before, name) for name in ADDED}


ADDED = (
    "read_bytes",
    "cached_bytes",
    "put_bytes",
    "bounced_bytes",
    "host_product_bytes",
    "stall_s",
    "experts_used",
    "experts_on_device",
    "experts_in_host",
    "experts_guessed",
    "experts_wasted",
)


def _both(first, second):
    """A callback that calls both, of those that are there."""
    if first is None or second is None:
        return first or second

    def both(*args):
        first(*args)
        second(*args)

    return both
