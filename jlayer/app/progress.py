"""What a terminal shows while a run takes long: what is opened or compiled, then a counter of
layers with the time left, and the tile that a slow disk is read for.

Drawn under the text by `status`. Where nothing can be drawn, only a stalled disk is reported.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import TextIO

from jlayer.app.status import REFRESH_S, Status
from jlayer.app.streams import draws, is_pipe, tell
from jlayer.interrupts import check
from jlayer.sizes import counted
from jlayer.streaming.steps import Read, Run

PATIENCE_S = 1.0  # shorter phases and sweeps show nothing
STALLED = 4  # a read that takes this many times its expected time is reported


def sweep_words(number: int) -> str:
    """What a sweep of a generation computes; the first one carries the prompt."""
    return f"token {number + 1}" if number else "prompt"


@contextmanager
def opening():
    """Yields the Watch to open a model with; on a terminal its phases are shown."""
    phase = Phase()
    with Status(phase.status) if draws() else nullcontext():
        phase.begin("opening: starting JAX")
        from jlayer.streaming.watch import Watch

        check()
        yield Watch(on_phase=lambda words: phase.begin(f"opening: {words}"))


@contextmanager
def shown(
    model,
    show,
    *,
    words: Callable[[int], str] = sweep_words,
    view=None,
    text: TextIO | None = None,
):
    """Shows progress of the sweeps that run meanwhile. Yields the function that takes the text's
    pieces in place of `show` (None: no text is shown).

    `words(number)`: what a sweep is called. `view`: what else to draw than the counter. `text`: the
    stream that `show` writes to; stdout where none is given. A pipe's reader may write to the same
    terminal (`| tee`), where nobody knows: beside text that goes into one nothing is drawn.
    """
    watch = model.engine.watch
    if not draws() or (show is not None and text is None and is_pipe()):
        watch.on_stall = Stalls(model, tell)
        yield show
        return
    view = view or View(model, words=words)
    watch.on_stall, watch.on_compile = Stalls(model, view.wait), view.on_compile
    try:
        status = Status(view.status, refresh_s=view.refresh_s, text=text)
        with status, watch.also(view.on_step):
            yield None if show is None else lambda piece: status.write(show, piece)
    finally:
        watch.on_compile = None


class Stalls:
    """Reports reads that take far longer than expected from the disk's speed, each time the wait
    has doubled."""

    def __init__(self, model, tell: Callable[[str], None]):
        self._speed, self._tell = model.plan.machine.disk_speed, tell
        self._next_s = 0.0

    def __call__(self, tile, seconds):
        least = max(PATIENCE_S, STALLED * tile.n_bytes / self._speed)
        self._next_s = least if seconds < self._next_s / 2 else max(self._next_s, least)
        if seconds >= self._next_s:
            self._tell(f"waiting for the disk: {tile.name}, {seconds:.0f} s so far")
            self._next_s = 2 * seconds


class Phase:
    """What is done outside the sweeps, and since when."""

    def __init__(self):
        self.is_on = False
        self._words = self._detail = ""
        self._began = self._ended = 0.0

    def begin(self, words: str, detail: str = ""):
        """A phase that goes on under the same words, after a short pause at most, keeps its
        time."""
        now = time.perf_counter()
        goes_on = self.is_on or now - self._ended < PATIENCE_S
        if words != self._words or not goes_on:
            self._began = now
        self.is_on, self._words, self._detail = True, words, detail

    def end(self):
        self.is_on, self._ended = False, time.perf_counter()

    def line(self) -> str:
        """Empty until the phase takes long."""
        elapsed = time.perf_counter() - self._began
        if not self.is_on or elapsed < PATIENCE_S:
            return ""
        return f"{self._words}, {elapsed:.0f} s{self._detail and f': {self._detail}'}"

    def status(self) -> list[str]:
        return [line for line in (self.line(),) if line]


class View:
    """What is under the text: the phase, or the counter of layers; and what is waited for."""

    refresh_s = REFRESH_S

    def __init__(self, model, *, words: Callable[[int], str] = sweep_words):
        self._words = words
        self._n_layers = model.config.num_hidden_layers
        self._phase = Phase()
        self._n_compiled = 0
        self._sweep, self._done = -1, 0  # no sweep has begun
        self._began = 0.0
        self._waits_for = ""

    def on_compile(self, label: str | None):
        """Called before a program is compiled, and with None after it."""
        if label is None:
            self._phase.end()
            return
        self._n_compiled += 1
        self._phase.begin("compiling", f"program {self._n_compiled}, {label}")

    def on_step(self, step, tile):
        """Called by the executor before each step. A layer is done when the next one runs."""
        if isinstance(step, Read) and self._sweep < 0:
            self._phase.begin("reading the first weights")
        if not isinstance(step, Run):
            return
        self._waits_for = ""
        if self._phase.is_on:
            self._phase.end()
        if step.tile == 0:
            self._sweep += 1
            self._began = time.perf_counter()
        self._done = self._n_layers if tile.layer is None else tile.layer

    def wait(self, words: str):
        self._waits_for = words

    def status(self) -> list[str]:
        """The lines under the text: none while everything is fast."""
        line = self._phase.line() if self._phase.is_on or self._sweep < 0 else self._counter()
        return [each for each in (line, self._waits_for) if each]

    def _counter(self):
        elapsed = time.perf_counter() - self._began
        if elapsed < PATIENCE_S:
            return ""
        n_layers = counted(self._n_layers, "layer")
        words = f"{self._words(self._sweep)}: {self._done} of {n_layers}"
        if not self._done:
            return f"{words}, {elapsed:.0f} s"
        each = elapsed / self._done
        left = each * (self._n_layers - self._done)
        return f"{words}, {each:.2f} s a layer, {duration(left)} left"


class AnswerView(View):
    """The counter of a text that somebody waits for: also what a sweep takes, and what is left.

    `words()`: what the next token is. `n_sweeps_left()`: the most sweeps until the text ends, None
    where the prompt is not through yet. The line stays between two sweeps, so that it can be read.
    """

    SHOWN_S = 0.1  # text that comes faster needs no line
    KEPT = 9  # sweeps whose median is the time of one: one that compiles takes far longer

    def __init__(self, model, *, words: Callable[[], str], n_sweeps_left: Callable[[], int | None]):
        super().__init__(model, words=lambda number: words())
        self._n_sweeps_left = n_sweeps_left
        self._took = deque(maxlen=self.KEPT)
        self._was_left = None

    def on_step(self, step, tile):
        begins = isinstance(step, Run) and step.tile == 0
        if begins and self._sweep >= 0 and self._was_left is not None:
            self._took.append(time.perf_counter() - self._began)
        super().on_step(step, tile)
        if begins:
            self._was_left = self._n_sweeps_left()

    def _counter(self):
        left = self._n_sweeps_left()
        if left is None or not self._took:
            return super()._counter()
        each = median(self._took)
        if each < self.SHOWN_S:
            return super()._counter()
        seconds = max(0.0, each * left - min(each, time.perf_counter() - self._began))
        return (
            f"{self._words(self._sweep)}: layer {self._done} of {self._n_layers}, "
            f"{each:.1f} s a forward pass, at most {duration(seconds)} left"
        )


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: 9 s, 1:05, 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
