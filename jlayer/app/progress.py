"""What is shown while a sweep takes long: layers, rate, time left, and what a disk is waited for.

On a terminal, under the text, by rich; elsewhere nothing but a line for a disk that stalls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

from jlayer.streaming.schedule import Run

# Of a sweep: nothing is shown before it lasted so long.
PATIENCE_S = 1.0
# A read that takes so many times what it should is stalled, not slow.
STALLED = 4


def sweep_words(number: int) -> str:
    """What a sweep of a generation does; the first carries the prompt."""
    return f"token {number + 1}" if number else "prompt"


@contextmanager
def shown(model, show, *, words: Callable[[int], str] = sweep_words):
    """Yields what takes the text's pieces instead of `show` (None: no text is shown); meanwhile
    slow sweeps show how far they are, and which one it is in `words`."""
    if not sys.stderr.isatty():
        model.watch.on_stall = Stalls(model, tell)
        yield show
        return
    from rich.live import Live

    # Text on the same terminal is kept above the counter; where sweeps are fast there is none after
    # the prompt, and the text is better left to the terminal.
    on_terminal = show is not None and sys.stdout.isatty()
    slow = model.plan.sweep_seconds >= PATIENCE_S / 2
    view = View(model, words=words, writes=on_terminal and slow)
    model.watch.on_stall = Stalls(model, view.wait)
    with Live(
        view,
        console=view.console,
        refresh_per_second=5,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else it would take what goes to a file
    ) as live:
        view.live = live

        def ends_counting(piece):
            live.stop()
            show(piece)

        try:
            with model.watch.also(view.on_step):
                yield view.write if view.writes else ends_counting if on_terminal else show
        finally:
            view.end()


def tell(words: str):
    print(f"jlayer: {words}", file=sys.stderr)


class Stalls:
    """Tells of reads that take far longer than the disk's speed explains: after a while, and again
    each time that has doubled."""

    def __init__(self, model, tell):
        self._speed, self._tell = model.plan.machine.disk_speed, tell
        self._next_s = 0.0

    def __call__(self, tile, seconds):
        least = max(PATIENCE_S, STALLED * tile.n_bytes / self._speed)
        self._next_s = least if seconds < self._next_s / 2 else max(self._next_s, least)
        if seconds >= self._next_s:
            self._tell(f"waiting for the disk: {tile.name}, {seconds:.0f} s so far")
            self._next_s = 2 * seconds


class View:
    """The end of the text that is not a whole line yet, and under it a counter of layers.

    `writes`: whether it shows text at all.
    """

    def __init__(self, model, *, words: Callable[[int], str], writes: bool):
        from rich.console import Console

        self._words, self.writes = words, writes
        self.console = Console(stderr=not writes)
        self.live = None
        self._layers = model.config.num_hidden_layers
        self._tail = ""
        self._sweep = self._done = 0
        self._began = time.perf_counter()
        self._waits_for = None

    def on_step(self, step, tile):
        """Told by the executor. A layer counts when the last of its weights is run."""
        if not isinstance(step, Run):
            return
        self._waits_for = None
        if step.tile == 0 and self._done:
            self._sweep, self._done = self._sweep + 1, 0
            self._began = time.perf_counter()
        if tile.layer is not None and tile.stage in ("block", "down") and tile.ends_stage:
            self._done = tile.layer + 1

    def wait(self, words: str):
        self._waits_for = words

    def write(self, piece: str):
        """Adds to the text: whole lines stay where they are, the rest is shown again and again."""
        *lines, self._tail = (self._tail + piece).split("\n")
        for line in lines:
            self._print(line, end="\n")
        self.live.refresh()

    def end(self):
        """What is left of the text stays on the screen too."""
        self.live.stop()
        if self._tail:
            self._print(self._tail, end="")

    def _print(self, text, end):
        self.console.print(text, end=end, soft_wrap=True, markup=False, highlight=False)

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        shown = [Text(self._tail)] if self._tail else []
        if counter := self.counter():
            shown.append(Text(counter, style="dim", no_wrap=True, overflow="crop"))
        return Group(*shown)

    def counter(self) -> str:
        """Layers, rate and time left of a sweep that takes long, or what it waits for; else
        nothing."""
        elapsed = time.perf_counter() - self._began
        if elapsed < PATIENCE_S:
            return ""
        from tqdm import tqdm

        counted = tqdm.format_meter(
            self._done,
            self._layers,
            elapsed,
            ncols=min(self.console.width, 100) - 1,
            prefix=self._words(self._sweep),
            unit="layer",
        )
        return f"{counted}\n{self._waits_for}" if self._waits_for else counted
