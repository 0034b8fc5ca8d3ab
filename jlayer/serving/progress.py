"""How far the forward passes are, how long they take, and when a text will have ended.

Told by the engine's observers, read by everybody: plain numbers, whose order of reading does not
matter.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from statistics import median

from jlayer.streaming.steps import Run

REMEMBERED = 8  # passes
RATE_S = 30.0  # tokens a second are counted over so long


@dataclass(frozen=True)
class Progress:
    """Of a job. `place`: in the queue, 1 is next. `pass_`: the number of the forward pass under way
    or to come, `layer` of `n_layers` where it is. `tokens` of at most `max_tokens`: of its longest
    sequence. `eta_s`: until it ends, if it takes all its tokens. `phase`: what is done before the
    pass can go on, such as compiling."""

    state: str
    place: int | None
    pass_: int
    layer: int
    n_layers: int
    seconds_a_pass: float | None
    riders: int
    tokens: int
    max_tokens: int
    eta_s: float | None
    phase: str | None = None

    def as_dict(self) -> dict:
        found = {name.rstrip("_"): value for name, value in asdict(self).items()}
        for name in ("seconds_a_pass", "eta_s"):
            if found[name] is not None:
                found[name] = round(found[name], 3)
        return found

    def words(self) -> str:
        """One line for a person, such as stands in the comments of a stream."""
        parts = []
        if self.place is not None:
            parts.append(f"in the queue, place {self.place}")
        elif self.state == "prompt":
            parts.append("reading the prompt")
        parts.append(f"sweep {self.pass_} layer {self.layer}/{self.n_layers}")
        if self.seconds_a_pass is not None:
            parts.append(f"{_seconds(self.seconds_a_pass)} a sweep")
        if self.phase is not None:
            parts.append(self.phase)
        parts.append(f"{self.riders} rider{'' if self.riders == 1 else 's'}")
        if self.eta_s is not None:
            parts.append(f"about {_seconds(self.eta_s)} left")
        return ", ".join(parts)


def _seconds(value):
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


class Passes:
    """The forward passes of a model, as its observer sees them."""

    def __init__(self, n_layers: int, predicted_s: float | None):
        """`predicted_s`: how long a pass takes, until one was measured."""
        self.n_layers = n_layers
        self.layer, self.number, self.riders = 0, 0, 0
        self.phase: str | None = None
        self.tokens_total = 0
        self._predicted_s = predicted_s
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._drawn: deque[tuple[float, int]] = deque()  # (when, how many tokens)
        self._began: float | None = None

    def on_step(self, step, tile) -> None:
        """Called by the executor before each step."""
        if isinstance(step, Run):
            self.layer = self.n_layers if tile.layer is None else tile.layer

    def on_compile(self, label: str | None) -> None:
        self.phase = None if label is None else f"compiling {label}"

    def begin(self, riders: int) -> None:
        self.riders, self.layer, self._began = riders, 0, time.monotonic()

    def end(self, n_tokens: int, *, compiled: bool) -> None:
        """A pass has ended, and so many tokens were drawn. `compiled`: programs were made for it,
        so its time says nothing of the next one's."""
        now = time.monotonic()
        if self._began is not None and not compiled:
            self._took.append(now - self._began)
        self._began = None
        self.number += 1
        self.tokens_total += n_tokens
        self._drawn.append((now, n_tokens))
        self._forget(now)

    def idle(self) -> None:
        self.riders, self.layer, self._began = 0, 0, None

    @property
    def seconds(self) -> float | None:
        """Of a pass: the median of the last ones, or what was predicted."""
        return median(self._took) if self._took else self._predicted_s

    @property
    def left_s(self) -> float:
        """Of the pass under way."""
        began, seconds = self._began, self.seconds
        if began is None or seconds is None:
            return 0.0
        return max(0.0, seconds - (time.monotonic() - began))

    @property
    def tokens_per_s(self) -> float:
        """Over the last half a minute, or since the first pass."""
        now = time.monotonic()
        self._forget(now)
        drawn = list(self._drawn)
        if not drawn:
            return 0.0
        seconds = max(now - drawn[0][0], self.seconds or 0.0, 1e-3)
        return sum(n for _, n in drawn) / seconds

    def _forget(self, now):
        while self._drawn and now - self._drawn[0][0] > RATE_S:
            try:
                self._drawn.popleft()
            except IndexError:  # another thread was here
                return
