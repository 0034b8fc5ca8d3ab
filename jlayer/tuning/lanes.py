"""Texts in lanes of one length, in an order that follows from a seed: what each step is made of."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from jlayer.errors import UsageError
from jlayer.tuning.examples import Example


@dataclass(frozen=True)
class Lanes:
    """n lanes of T tokens, all [n, T]. `targets`: what follows each token in its text, 0 where
    nothing does. `weights`: float32, by how much the prediction of the target counts. `positions`:
    from 0 in each text, or piece of one. `texts`: the number of the text in its lane, from 1; 0 is
    padding."""

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    texts: np.ndarray


def cut(examples: Sequence[Example], length: int) -> list[Example]:
    """Texts in pieces of at most `length` + 1 tokens, of which the last of one is the first of the
    next: so each token but a text's first is predicted once. Pieces that count nothing are left
    out. Raises UsageError where none is left."""
    found = []
    for example in examples:
        for first in range(0, max(1, len(example) - 1), length):
            is_whole = not first and len(example) <= length + 1
            piece = example if is_whole else example.piece(first, first + length + 1)
            if piece.n_learned:
                found.append(piece)
    if not found:
        raise UsageError("data: nothing in it counts: every weight is 0; give some text weight")
    return found


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below n in the order of an epoch, the same on every machine."""
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return draw.permutation(n)


def placed(examples: Sequence[Example], length: int) -> list[list[int]]:
    """Of each lane the numbers of its texts: each goes to the fullest of all lanes that has room.

    In an order by chance that fills lanes as well as if the long texts came first, and what shares
    a lane is by chance too.
    """
    lanes, with_room, rooms = [], {}, []  # room -> the lanes that have it; the rooms, ascending
    for number, example in enumerate(examples):
        size = len(example) - 1
        at = bisect_left(rooms, size)
        if at == len(rooms):
            lane, room = len(lanes), length
            lanes.append([])
        else:
            room = rooms[at]
            lane = with_room[room].pop()
            if not with_room[room]:
                del rooms[at], with_room[room]
        lanes[lane].append(number)
        if room == size:
            continue
        if room - size not in with_room:
            with_room[room - size] = []
            insort(rooms, room - size)
        with_room[room - size].append(lane)
    return lanes


def packed(examples: Sequence[Example], length: int) -> Lanes:
    """Texts beside each other."""
    return filled(examples, placed(examples, length), length)


def padded(examples: Sequence[Example], length: int) -> Lanes:
    """One text a lane."""
    return filled(examples, [[number] for number in range(len(examples))], length)


def filled(examples: Sequence[Example], lanes: Sequence[Sequence[int]], length: int) -> Lanes:
    """Lanes of which each has the texts of some numbers."""
    n = len(lanes)
    found = {
        name: np.zeros((n, length), np.float32 if name == "weights" else np.int32)
        for name in ("ids", "targets", "weights", "positions", "texts")
    }
    counting = np.arange(length, dtype=np.int32)
    for lane, of_lane in enumerate(lanes):
        at = 0
        for text, number in enumerate(of_lane, 1):
            example = examples[number]
            ids, size = example.ids, len(example) - 1
            own = lane, slice(at, at + size)
            found["ids"][own], found["targets"][own] = ids[:-1], ids[1:]
            found["weights"][own] = 1 if example.weights is None else example.weights[1:]
            found["positions"][own], found["texts"][own] = counting[:size], text
            at += size
    return Lanes(**found)


class Steps:
    """The lanes of each step, by its number from 0: `count` of them, through epoch after epoch. The
    lanes of an epoch follow one another without a gap, so that nothing is left out; its last step
    has the first ones of the next epoch too. `examples`: cut to the length."""

    def __init__(
        self, examples: Sequence[Example], length: int, count: int, seed: int, packs: bool
    ):
        self._examples, self._length, self._count = examples, length, count
        self._seed, self._packs = seed, packs
        self._firsts = [0]  # of each epoch the number of its first lane
        self._kept: dict[int, list[list[int]]] = {}

    def step(self, number: int) -> Lanes:
        """The lanes of a step."""
        first, end = number * self._count, (number + 1) * self._count
        epoch, lanes = self._epoch_of(first), []
        while first < end:
            begin = self._first(epoch)
            lanes += self._epoch(epoch)[first - begin : end - begin]
            first, epoch = self._first(epoch + 1), epoch + 1
        return filled(self._examples, lanes, self._length)

    def epoch_of(self, number: int) -> float:
        """How often the data was gone through before a step."""
        first = number * self._count
        epoch = self._epoch_of(first)
        begin, end = self._first(epoch), self._first(epoch + 1)
        return epoch + (first - begin) / (end - begin)

    def n_steps(self, epochs: float) -> int:
        """The steps after which the data was gone through so often."""
        often = Fraction(repr(epochs))  # 1.1 is 11/10 here, and no more than that
        whole, part = int(often), often % 1
        lanes = Fraction(self._first(whole))
        if part:
            lanes += part * (self._first(whole + 1) - self._first(whole))
        return max(1, math.ceil(lanes / self._count))

    def _epoch_of(self, lane):
        """The epoch that a lane is in, of all that follow one another."""
        while self._firsts[-1] <= lane:
            self._first(len(self._firsts))
        return bisect_right(self._firsts, lane) - 1

    def _first(self, epoch):
        while len(self._firsts) <= epoch:
            size = len(self._epoch(len(self._firsts) - 1)) if self._packs else len(self._examples)
            self._firsts.append(self._firsts[-1] + size)
        return self._firsts[epoch]

    def _epoch(self, epoch):
        if epoch not in self._kept:
            if len(self._kept) > 1:
                self._kept.pop(min(self._kept))
            numbers = order(len(self._examples), self._seed, epoch).tolist()
            lanes = [[number] for number in numbers]
            if self._packs:
                some = placed([self._examples[number] for number in numbers], self._length)
                lanes = [[numbers[at] for at in lane] for lane in some]
            self._kept[epoch] = lanes
        return self._kept[epoch]
