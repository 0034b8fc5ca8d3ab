"""How many guesses ride in a forward pass: as many as give the most tokens a second, by what passes
of so many rows were seen to take."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from jlayer.drafting.scores import Calibration
from jlayer.drafting.width import Pace, best_width, goes_on
from jlayer.engine.deciding import step
from jlayer.engine.lane import Lane
from jlayer.engine.pace import filled_share, predicted_seconds
from jlayer.engine.programs import Programs
from jlayer.engine.riders import Rider
from jlayer.engine.seats import Seat
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import CHUNK_ROWS, pack, power_of_two, rows_for

# Tokens of a pass that each doubling of a tree adds, before anything is known: as published for
# drafts of 1B to 70B, and for texts that repeat something.
GAIN_OF_DOUBLING = {"draft": 0.8, "lookup": 0.25}
COMPILE_S = 3.0  # programs for passes of another size


class Widths:
    """What the width of trees depends on, and what is learnt of it."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._calibration = Calibration()
        self._pace: Pace | None = None
        self._paced = None  # the tiling that the pace is of
        self._compiled: set[int] = set()  # rows of passes that programs are there for

    def prepare(self, plan: Plan) -> None:
        """Measures what was not measured yet, ahead of a forward pass."""
        if plan.load.nodes and plan.tiling is not self._paced:
            most = min(plan.load.n_rows, CHUNK_ROWS[-1])
            with step("time", lambda: [most]):
                self._pace = Pace(predicted_seconds(plan, self._programs, most_rows=most))
            self._paced = plan.tiling

    def usual(self, lanes: Sequence[Lane], plan: Plan, *, drafts: bool) -> int:
        """About how many guesses each of these lanes will have, to compile programs for."""
        most = plan.load.nodes // len(lanes)
        if _is_fixed(lanes):
            return most
        gain = GAIN_OF_DOUBLING["draft" if drafts else "lookup"]
        seconds = self._pace.seconds()
        n_rows = {share: power_of_two(len(lanes)) * rows_for(1 + share) for share in shares(most)}

        def rate(share):
            took = seconds_of(n_rows[share], seconds)
            took *= filled_share(plan, len(lanes) * (1 + share), n_rows[share])
            return (1 + gain * math.log2(1 + share)) / took

        best = max(sorted(n_rows), key=rate)
        self._compiled.add(n_rows[best])
        return best

    def best(
        self, seats: Sequence[Seat], riders: Sequence[Rider], plan: Plan, drafting_s: float
    ) -> int:
        """Guesses of each lane, of those that were drafted in `drafting_s`."""
        most = max(seat.tree.most for seat in seats)
        if _is_fixed(seat.lane for seat in seats):
            return most
        gains, seconds, sizes = np.zeros(most), self._pace.seconds(), {}
        for seat in seats:
            scores = np.sort(seat.tree.scores)[::-1][:most]
            gains[: len(scores)] += np.exp(scores)
        for share in shares(most):
            counts = {id(seat.rider): min(share, seat.tree.most) for seat in seats}
            n_rows = pass_rows(riders, counts, plan)
            n_real = sum(rider.end - rider.first + counts.get(id(rider), 0) for rider in riders)
            sizes[1 + share] = seconds_of(n_rows, seconds) * filled_share(plan, n_real, n_rows)
            if n_rows not in self._compiled:
                sizes[1 + share] += COMPILE_S / _passes_left(seats)
        return best_width(
            gains,
            sizes,
            fixed=1,
            drafting_s=drafting_s,
            ratio=self._calibration.ratio,
            sure=float(len(seats)),
        )

    def goes_on(self, seats: Sequence[Seat], gained: float, step_s: float) -> bool:
        """Whether another step of drafting pays, after one that took `step_s` and `gained` so many
        tokens."""
        expected, sweep_s = sum(seat.tree.expected for seat in seats), self.least_seconds(seats)
        return goes_on(gained, expected=expected, step_s=step_s, sweep_s=sweep_s)

    def least_seconds(self, seats: Sequence[Seat]) -> float:
        """Of the narrowest forward pass; infinite where it is asked for so many guesses."""
        if _is_fixed(seat.lane for seat in seats):
            return math.inf
        return min(self._pace.seconds().values())

    def saw(self, n_rows: int, n_real: int, plan: Plan, seconds: float) -> None:
        """Takes note of a forward pass of `n_rows`, of which `n_real` were no padding. The first
        one of a size may have compiled programs."""
        is_known = n_rows in self._compiled
        self._compiled.add(n_rows)
        if self._pace is not None and is_known and n_rows in self._pace.seconds():
            self._pace.saw(n_rows, seconds / filled_share(plan, n_real, n_rows))

    def found(self, expected: float, n_accepted: int) -> None:
        """Takes note of a tree: how many guesses were expected to be right, and how many were."""
        self._calibration.observe(expected, n_accepted)


def shares(most: int) -> set[int]:
    """Guesses of a lane that fill the rows of a chunk, and the most that there may be."""
    return {0, most, *(size - 1 for size in CHUNK_ROWS if size - 1 < most)}


def pass_rows(riders: Sequence[Rider], counts: Mapping[int, int], plan: Plan) -> int:
    """Rows of a forward pass in which riders have so many guesses, by their identity."""
    lengths, whole = defaultdict(list), defaultdict(list)
    for rider in riders:
        count = counts.get(id(rider), 0)
        n_rows = rider.end - rider.first + count
        if count and n_rows <= plan.chunk:
            whole[rider.after].append(len(lengths[rider.after]))
        lengths[rider.after].append(n_rows)
    return sum(
        pane.n_rows
        for after, some in lengths.items()
        for pane in pack(some, plan.chunk, shared=0, whole=whole[after])
    )


def seconds_of(n_rows: int, seconds: Mapping[int, float]) -> float:
    """Seconds of a pass of so many rows: as of the size above; of several chunks each for
    itself."""
    largest = max(seconds)
    whole, rest = divmod(n_rows, largest)
    fitting = [size for size in seconds if size >= rest]
    return whole * seconds[largest] + (seconds[min(fitting)] if rest else 0.0)


def _is_fixed(lanes):
    """Whether somebody asks for so many guesses, whether they pay or not."""
    return any(lane.options.draft_tokens is not None for lane in lanes)


def _passes_left(seats):
    """About how many more passes these lanes will take."""
    expected = sum(seat.tree.expected for seat in seats) / len(seats)
    return max(1.0, max(seat.lane.n_left for seat in seats) / expected)
