"""The part of the schedule that is decided as it goes: the experts of a layer.

Which experts a layer uses is known once its router has run. Those that are kept on the device run
at once; the others are put from host memory, or read first. Each layer keeps those that it used
last: a common store of all layers that is smaller than what one token uses would never have what is
asked for, since layers come round in a circle.

Some of the experts that a layer is guessed to use may be put before it has decided: see `guesses`.
They have rooms of their own on the device, so what is kept there does not depend on guesses: one
that was right takes the place that it would have got, and others are dropped.

What passes is dropped once its place is needed, and not as soon as it has run: to wait for that
would keep the host from what comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from jlayer.plan.experts import ExpertRooms, at_once
from jlayer.plan.tiles import Tile
from jlayer.streaming.guesses import Score
from jlayer.streaming.lru import Lru
from jlayer.streaming.steps import Decision, Drop, Free, Keep, Put, Read, Run, Slot, Step
from jlayer.streaming.watch import Totals


@dataclass(frozen=True)
class Choice:
    """The experts of a layer, whose tiles stand together from `first` up to `end`. `tiles`: of each
    expert, in order. `at_once`: how many tiles run in one call."""

    layer: int
    first: int
    end: int
    tiles: tuple[tuple[int, ...], ...]
    at_once: int = 1


def choices(tiles: Sequence[Tile]) -> tuple[Choice, ...]:
    """The experts of each layer that has some, in order."""
    found, of_layer = [], {}
    for index, tile in enumerate(tiles):
        if tile.expert is not None:
            of_layer.setdefault(tile.layer, {}).setdefault(tile.expert, []).append(index)
    for layer, experts in of_layer.items():
        groups = tuple(map(tuple, experts.values()))
        first, end = groups[0][0], groups[-1][-1] + 1
        found.append(Choice(layer, first, end, groups, at_once(tiles[first])))
    return tuple(found)


def followers(choices: Iterable[Choice], passing: Collection[int]) -> dict[int, int]:
    """The layers whose experts can be guessed, by their first tile: that of the layer before, which
    has experts too -> its own. Not where the link has something else to carry meanwhile: a tile of
    those `passing` is between the two."""
    return {
        one.first: other.first
        for one, other in pairwise(choices)
        if other.layer == one.layer + 1
        and not any(one.end <= tile < other.first for tile in passing)
    }


@dataclass
class _Move:
    """A tile on its way to the device. `stays`: on the device; `slot`: in host memory, once it is
    known; `is_read`: it comes from disk; `drops`: tiles whose place it takes; `is_there`: it was
    put by guess."""

    tile: int
    stays: bool
    slot: Slot = None
    is_read: bool = False
    needs_ring: bool = False
    drops: tuple[int, ...] = ()
    is_there: bool = False


class ExpertStream:
    """The experts of all layers: what is kept of them, and the steps to use some.

    `rooms`: how many experts each layer keeps, and how many are put by guess. `ring`: slots in host
    memory for those that are not kept, and `ahead` so many of their tiles on the device at a time.
    `totals`: what is used is counted there. `guesses`: whether the present sweep makes guesses.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        rooms: ExpertRooms,
        ring: Iterable[int],
        ahead: int,
        totals: Totals,
    ):
        self.choices = {choice.first: choice for choice in choices}
        self._rooms = rooms
        self._in_host = {c.first: Lru(n) for c, n in zip(choices, rooms.in_host, strict=True)}
        self._scores = {choice.first: Score() for choice in choices}
        self._ring, self._ahead, self.totals = tuple(ring), ahead, totals
        self.guesses = False
        self.restart(())

    def resize(self, rooms: ExpertRooms) -> list[Slot]:
        """Keeps so many experts from now on -> the rooms in host memory that are not used any more.
        Nothing may be on the device."""
        self._rooms, gone = rooms, []
        for (first, kept), n_slots in zip(self._in_host.items(), rooms.in_host, strict=True):
            places = range(max(map(len, self.choices[first].tiles)))
            slots = kept.resize(n_slots)
            gone += [(first, place, slot) for slot in slots for place in places]
        return gone

    def kept_in_host(self) -> dict[int, tuple[int, ...]]:
        """Of each layer, by the first tile of its experts, those that are kept in host memory, the
        least recently used first."""
        return {first: kept.numbers() for first, kept in self._in_host.items()}

    def restart(self, in_host: Collection[int]) -> None:
        """Begins anew after a pass that was given up: nothing is on the device, and of the experts
        in host memory only those are there whose tiles are `in_host`."""
        sizes = zip(self.choices.values(), self._rooms.on_device, strict=True)
        self._on_device = {choice.first: Lru(n) for choice, n in sizes}
        self._next: int | None = None  # the layer that is guessed for, by its first tile
        self._guessed: dict[int, tuple[int, ...]] = {}  # expert of it that was put -> its tiles
        self._wrong: list[int] = []  # tiles that were put by guess in vain, still on the device
        self._free, self._n_passing = deque(self._ring), 0
        self._to_read: deque[_Move] = deque()
        self._to_put: deque[_Move] = deque()
        self._have_run: deque[_Move] = deque()  # what they had is not given back yet
        for first, kept in self._in_host.items():
            tiles = self.choices[first].tiles
            kept.forget([n for n in kept.numbers() if not set(tiles[n]) <= set(in_host)])

    def to_guess(self, first: int | None) -> int | None:
        """`first`, if the experts that begin at this tile are to be guessed in this sweep."""
        may_guess = first is not None and self.guesses and self._rooms.guessed
        self._next = first if may_guess and self._scores[first].may_guess() else None
        return self._next

    def steps(self, first: int, decision: Decision) -> Iterator[Step]:
        """The steps that use the experts that were chosen, in their order, of the layer whose
        experts begin at tile `first`."""
        chosen = decision.chosen
        moves = self._moves(self.choices[first], chosen)
        self._judge(first, chosen)
        self._to_read += (move for move in moves.values() if move.is_read)
        self._to_put += (move for move in moves.values() if not move.is_there)
        for move in moves.values():
            if move.is_there and move.stays:
                yield from [*map(Drop, move.drops), Keep(move.tile)]
        yield from self._move_ahead()
        yield from self._drop_wrong()
        # What was guessed for the layer before, and passes, has run: it gives its places back.
        while any(move.is_there and not move.stays for move in self._have_run):
            yield from self._end(self._have_run.popleft())
        yield from self._put_guessed(decision.guessed)
        choice = self.choices[first]
        tiles = [tile for expert in chosen for tile in choice.tiles[expert]]
        for begin in range(0, len(tiles), choice.at_once):
            together = tiles[begin : begin + choice.at_once]
            moving = [moves[tile] for tile in together if tile in moves]
            while any(move is waiting for move in moving for waiting in self._to_put):
                yield from self._put_next()
            yield Run(together[0], also=tuple(together[1:]))
            self._have_run += moving
            yield from self._move_ahead()
            yield from self._put_guessed(decision.guessed)

    def end(self) -> Iterator[Step]:
        """The steps after the last layer: nothing of what passes is on the device any more."""
        while self._have_run:
            yield from self._end(self._have_run.popleft())
        yield from self._drop_wrong()

    def _put_guessed(self, expected):
        """Puts what the next layer is guessed to use and is in host memory, as far as there are
        rooms, once all that this layer uses is on its way. From disk nothing comes: a read takes
        longer than what it could hide.

        As soon as can be: a transfer waits for all programs that were called before it (JAX takes
        the memory to be free only after them), so later ones would not run beside it."""
        first = self._next
        if first is None or self._to_put:
            return
        self._next = None
        device, host, tiles = (
            self._on_device[first],
            self._in_host[first],
            self.choices[first].tiles,
        )
        found = (number for number in expected if number not in device and number in host)
        for number in islice(found, self._rooms.guessed):
            self._guessed[number] = tiles[number]
            for place, tile in enumerate(tiles[number]):
                yield Put(tile, (first, place, host.slot(number)), guessed=True)

    def _drop_wrong(self):
        """Drops what was guessed in vain; its transfer has to end first."""
        for tile in self._wrong:
            yield from (Free(tile, None, after=None), Drop(tile))
        self._wrong = []

    def _judge(self, first, chosen):
        """Counts the guesses, and notes those that were wrong."""
        guessed, self._guessed = self._guessed, {}
        wrong = [number for number in guessed if number not in chosen]
        if guessed:
            self._scores[first].count(len(guessed) - len(wrong), len(wrong))
        self.totals.experts_guessed += len(guessed)
        self.totals.experts_wasted += len(wrong)
        self._wrong = [tile for number in wrong for tile in guessed[number]]

    def _moves(self, choice, chosen):
        """Tile -> its move, of the experts that are not on the device, in order."""
        device, host = self._on_device[choice.first], self._in_host[choice.first]
        found = device.take(chosen)
        missed = [expert for expert in chosen if expert not in found.hits]
        there = host.take(missed)
        self.totals.experts_used += len(chosen)
        self.totals.experts_on_device += len(found.hits)
        self.totals.experts_in_host += len(there.hits)
        moves = {}
        for expert in missed:
            evicted = found.evicted.get(found.placed.get(expert))
            for place, tile in enumerate(choice.tiles[expert]):
                is_kept = expert in host
                moves[tile] = _Move(
                    tile,
                    stays=expert in found.placed,
                    slot=(choice.first, place, host.slot(expert)) if is_kept else None,
                    is_read=expert not in there.hits,
                    needs_ring=not is_kept,
                    drops=() if evicted is None or place else choice.tiles[evicted],
                    is_there=expert in self._guessed,
                )
        return moves

    def _read_ahead(self):
        """Reads in order, as far as there are slots."""
        while self._to_read:
            move = self._to_read[0]
            if move.needs_ring:
                if not self._free:
                    return
                move.slot = self._free.popleft()
            self._to_read.popleft()
            yield Read(move.tile, move.slot)

    def _move_ahead(self):
        """Reads and puts in order, as far as there are slots and places: those of what has run are
        taken, the oldest first."""
        yield from self._read_ahead()
        while self._to_put and (self._has_place() or self._have_run):
            yield from self._put_next()

    def _put_next(self):
        """Puts the next tile or, where it has no place, gives back what one had that has run."""
        if not self._has_place():
            yield from self._end(self._have_run.popleft())
            yield from self._read_ahead()
            return
        move = self._to_put.popleft()
        yield from map(Drop, move.drops)
        self._n_passing += not move.stays
        yield Put(move.tile, move.slot, stays=move.stays)

    def _has_place(self):
        """Whether the next tile can be put: it has a slot, if it needs one, and a place on the
        device."""
        move = self._to_put[0]
        if move.needs_ring and move.slot is None:
            return False  # it is not read yet
        return move.stays or self._n_passing < self._ahead

    def _end(self, move):
        """After a tile has run: what passes is freed, and so is the slot of what stays."""
        if not move.stays:
            self._n_passing -= not move.is_there
            yield Free(move.tile, move.slot, after=move.tile)
        elif move.needs_ring:
            yield Free(move.tile, move.slot, after=None)
        if move.needs_ring:
            self._free.append(move.slot)
