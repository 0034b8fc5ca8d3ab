"""Grows the trees of a forward pass: best-first, some nodes of all trees at a time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jlayer.drafting.lookup import LONGEST, children
from jlayer.drafting.scores import Sharpness, perturbed
from jlayer.drafting.tree import ROOT
from jlayer.engine.batch import Entry, Growth, arrange, arrange_growth
from jlayer.engine.draft import DraftModel
from jlayer.engine.drawing import Drawn
from jlayer.engine.lane import Lane
from jlayer.engine.pool import Pool
from jlayer.engine.riders import NOTHING
from jlayer.engine.seats import Noise, Seat, temperature_of
from jlayer.engine.widths import Widths
from jlayer.interrupts import check
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import CHUNK_ROWS, LEAST_ROWS, power_of_two, rows_for

# Nodes of a lane's tree that are expanded at a time, by the size of the tree: more of them make
# fewer steps, and a tree that is a little worse.
STEP_NODES = {64: 8, 128: 16, 512: 32}
# The draft model reads the last two tokens of a text at least: so the token that was drawn, and one
# that was guessed before it without having been expanded, are one program.
LEAST_READ = 2
MOST_STEP_ROWS = 64  # of all lanes
LOOKUP_NODES = 2  # the same without a draft model
LOOKUP_SHARE = 0.05  # of the time of a forward pass, for looking up what followed


class Grower:
    """What guesses are scored with, and what is learnt of that.

    `knows_noise`: whether trees are made with the noise that will be drawn with; False only for
    measurements.
    """

    def __init__(self, vocab_size: int, draft: DraftModel | None, widths: Widths):
        self._draft, self._widths = draft, widths
        self.noise = Noise(vocab_size)
        self._sharpness = defaultdict(Sharpness)  # by temperature
        self._latest: float | None = None  # the temperature that came last
        self.knows_noise = True

    @property
    def sharpness(self) -> float | None:
        """How far apart the logits of both models were found, at the temperature that came last;
        None without a draft model."""
        if self._draft is None or self._latest is None:
            return None
        return self._sharpness[self._latest].value

    def prepare(self, lanes: Sequence[Lane], plan: Plan, n_rows: int, share: int) -> None:
        """Compiles the draft model's programs for these lanes' texts as they are, for what it will
        read of them later, and for trees of `share` nodes. `n_rows`: of the pools."""

        def stand_in(n_tokens, lane):
            return Entry([0] * n_tokens, NOTHING, np.zeros(n_tokens, np.int32), lane.capacity)

        whole = [stand_in(len(lane.history), lane) for lane in lanes]
        later = [stand_in(LEAST_READ, lane) for lane in lanes]
        parts = [
            part
            for entries in (whole, later)
            for part in arrange(entries, pool=n_rows, most=plan.chunk)
        ]
        if share:
            none = np.zeros((1, 0), bool)
            one = Growth([0], [0], np.zeros(1, np.int32), NOTHING, NOTHING, NOTHING, none)
            parts.append(_arrange_step([one] * len(lanes), lanes, share, n_rows))
        for part in parts:
            self._draft.compile(part)

    def grow(self, seats: Sequence[Seat], plan: Plan, pool: Pool) -> None:
        """Grows trees to their size, or as long as it pays. Takes pool rows; the caller releases
        those of the seats."""
        drafting = [seat for seat in seats if seat.drafts]
        if drafting:
            self._begin(drafting, plan, pool)
        for seat in seats:
            seat.tree.next(1)  # the root
            self._add(seat, ROOT)
        self._look_up([seat for seat in seats if not seat.drafts])
        while drafting and self._step(drafting, pool):
            check()

    def _look_up(self, seats):
        """Grows trees from texts alone, in turn, for a small part of the time of a pass."""
        began, limit_s = time.perf_counter(), LOOKUP_SHARE * self._widths.least_seconds(seats)
        while seats and time.perf_counter() - began < limit_s:
            growing = [(seat, seat.tree.next(LOOKUP_NODES)) for seat in seats]
            for seat, nodes in growing:
                for node in nodes:
                    self._add(seat, node)
            seats = [seat for seat, nodes in growing if nodes]

    def learn(self, seat: Seat, drawn: Drawn) -> None:
        """Takes note of what a lane drew, after it was added to its history."""
        guesses = seat.rider.guesses
        self._widths.found(guesses.expected - 1, len(drawn.nodes))
        added = _added(seat.lane, drawn.choices)
        temperature, n_drawn = temperature_of(seat.lane), len(added)
        nodes = [ROOT, *(guesses.nodes[number] for number in drawn.nodes)]
        for depth, (node, choice) in enumerate(zip(nodes, added, strict=False), 1):
            if node not in seat.candidates:
                continue
            ids, logits = seat.candidates[node]
            place = np.flatnonzero(ids == choice.token_id)
            noise = self.noise.of(seat.lane, ids, depth - n_drawn) if temperature else None
            scores = perturbed(logits, noise, temperature=temperature)
            self._sharpness[temperature].observe(scores, int(place[0]) if len(place) else None)

    def _begin(self, seats, plan, pool):
        """The draft model reads what it does not know yet of the lanes' texts."""
        riders, entries = {id(seat.rider) for seat in seats}, []
        for seat in seats:
            rider, after = seat.rider, 0
            n_known = self._draft.n_known(seat.rows)
            if rider.source is not None and id(rider.source) in riders:
                n_known, after = max(n_known, rider.first), rider.after  # what its source reads
            n_known = max(0, min(n_known, rider.end - LEAST_READ))
            entries.append(
                Entry(
                    seat.lane.history[n_known : rider.end],
                    seat.rows[:n_known],
                    seat.rows[n_known:],
                    seat.lane.capacity,
                    after=after,
                )
            )
        found = self._draft.guess(arrange(entries, pool=pool.n_rows, most=plan.chunk))
        for seat, ids, logits in zip(seats, found.ids, found.logits, strict=True):
            seat.candidates[ROOT] = (ids, logits)

    def _step(self, seats, pool) -> bool:
        """One step of the draft model: some more nodes of each tree. False once no tree can gain,
        or none would gain enough."""
        most = max(seat.tree.most for seat in seats)
        count, room = step_nodes(most, len(seats)), room_for_tree(most)
        asks = []
        for seat in seats:
            above = self._draft.context_limit - len(seat.lane.history)
            nodes = seat.next(min(count, room - len(seat.expanded)), above=above)
            asks += [(seat, nodes)] if nodes else []
        if not asks or pool.n_free_everywhere < sum(len(nodes) for _, nodes in asks):
            return False
        before, began = sum(seat.tree.expected for seat in seats), time.perf_counter()
        growths = [seat.grow(nodes, self._take(pool, len(nodes))) for seat, nodes in asks]
        part = _arrange_step(growths, [seat.lane for seat in seats], most, pool.n_rows)
        found = self._draft.guess([part])
        pairs = [(seat, node) for seat, nodes in asks for node in nodes]
        for (seat, node), ids, logits in zip(pairs, found.ids, found.logits, strict=True):
            seat.candidates[node] = (ids, logits)
            self._add(seat, node)
        gained = sum(seat.tree.expected for seat in seats) - before
        return self._widths.goes_on(seats, gained, time.perf_counter() - began)

    def _take(self, pool, count):
        rows = pool.take(count)
        self._draft.forget(rows)
        return rows

    def _add(self, seat, node):
        """Adds the children of a node."""
        lane, tree = seat.lane, seat.tree
        depth = 1 if node == ROOT else int(tree.depths[node]) + 1
        if depth > seat.deepest:
            return
        temperature = self._latest = temperature_of(lane)
        learnt = self._sharpness[temperature]
        sharpness = learnt.value
        if not self.knows_noise and temperature:
            temperature, sharpness = 0.0, temperature
        ids, log_p = children(
            seat.candidates.get(node),
            [*lane.history[-LONGEST:], *tree.path(node)][-LONGEST:],
            own=seat.own,
            others=seat.others,
            temperature=temperature,
            noise_of=lambda ids: self.noise.of(lane, ids, depth),
            sharpness=sharpness,
            coverage=learnt.coverage,
        )
        tree.add(node, ids, log_p)


def _arrange_step(growths, lanes, most, n_rows):
    """The chunk of a step of the draft model, for trees of `most` nodes below these lanes."""
    return arrange_growth(
        growths,
        tokens=step_nodes(most, len(lanes)),
        fresh=room_for_tree(most),
        capacity=max(lane.capacity for lane in lanes),
        pool=n_rows,
    )


def _added(lane, choices):
    """Those that the lane got: it may have ended before the last of them, or left."""
    last = lane.choices[-1] if lane.choices else None
    for count, choice in enumerate(choices, 1):
        if choice is last:
            return choices[:count]
    return []


def step_nodes(most: int, n_lanes: int) -> int:
    """Nodes of each lane in a step: a size of a chunk."""
    nodes = next(count for size, count in STEP_NODES.items() if most <= size)
    return max(LEAST_ROWS, min(nodes, MOST_STEP_ROWS // power_of_two(n_lanes)))


def room_for_tree(most: int) -> int:
    """Nodes that the draft model may take of a tree of `most`: more than ride, since the best ones
    are known at the end."""
    return rows_for(min(CHUNK_ROWS[-1], max(2 * most, MOST_STEP_ROWS)))
