"""Texts in lanes of one length, in an order that follows from a seed: what each step is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.errors import UsageError
from jlayer.tuning.data import Example

# A text is put beside others in one of so many lanes that were begun last.
OPEN_LANES = 64


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
        for first in range(0, max(1, len(example.ids) - 1), length):
            some = slice(first, first + length + 1)
            weights = (0.0, *example.weights[some][1:])
            if any(weights):
                found.append(Example(example.ids[some], weights))
    if not found:
        raise UsageError("data: nothing in it counts: every weight is 0; give some text weight")
    return found


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below n in the order of an epoch, the same on every machine."""
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return draw.permutation(n)


def packed(examples: Sequence[Example], length: int) -> Lanes:
    """Texts beside each other: each goes to the fullest of the lanes begun last that has room."""
    lanes, is_open = [], []  # (the room that is left, the lane's number)
    for example in examples:
        size = len(example.ids) - 1
        rooms = [(room, lane) for room, lane in is_open if room >= size]
        if rooms:
            room, lane = min(rooms)
            is_open.remove((room, lane))
        else:
            room, lane = length, len(lanes)
            lanes.append([])
        lanes[lane].append(example)
        if room > size:
            is_open = [*is_open, (room - size, lane)][-OPEN_LANES:]
    return _filled(lanes, length)


def padded(examples: Sequence[Example], length: int) -> Lanes:
    """One text a lane."""
    return _filled([[example] for example in examples], length)


def _filled(lanes, length) -> Lanes:
    n = len(lanes)
    found = {
        name: np.zeros((n, length), np.float32 if name == "weights" else np.int32)
        for name in ("ids", "targets", "weights", "positions", "texts")
    }
    for lane, of_lane in enumerate(lanes):
        at = 0
        for number, example in enumerate(of_lane, 1):
            ids, size = np.asarray(example.ids, np.int32), len(example.ids) - 1
            own = lane, slice(at, at + size)
            found["ids"][own], found["targets"][own] = ids[:-1], ids[1:]
            found["weights"][own] = example.weights[1:]
            found["positions"][own], found["texts"][own] = np.arange(size), number
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
        self._seed, self._put = seed, packed if packs else padded
        self._firsts = [0]  # of each epoch the number of its first lane
        self._kept: dict[int, Lanes] = {}

    def step(self, number: int) -> Lanes:
        """The lanes of a step."""
        first, end, epoch, parts = number * self._count, (number + 1) * self._count, 0, []
        while self._first(epoch + 1) <= first:
            epoch += 1
        while first < end:
            lanes, begin = self._epoch(epoch), self._first(epoch)
            some = slice(first - begin, min(end, self._first(epoch + 1)) - begin)
            parts.append({name: array[some] for name, array in vars(lanes).items()})
            first, epoch = self._first(epoch + 1), epoch + 1
        return Lanes(**{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})

    def epoch_of(self, number: int) -> float:
        """How often the data was gone through before a step."""
        first, epoch = number * self._count, 0
        while self._first(epoch + 1) <= first:
            epoch += 1
        size = self._first(epoch + 1) - self._first(epoch)
        return epoch + (first - self._first(epoch)) / size

    def n_steps(self, epochs: float) -> int:
        """The steps after which the data was gone through so often."""
        whole, part = int(epochs), epochs - int(epochs)
        size = self._first(whole + 1) - self._first(whole) if part else 0
        lanes = self._first(whole) + part * size
        return max(1, int(np.ceil(lanes / self._count)))

    def _first(self, epoch):
        while len(self._firsts) <= epoch:
            size = len(self._epoch(len(self._firsts) - 1).ids)
            self._firsts.append(self._firsts[-1] + size)
        return self._firsts[epoch]

    def _epoch(self, epoch):
        if epoch not in self._kept:
            if len(self._kept) > 1:
                self._kept.pop(min(self._kept))
            numbers = order(len(self._examples), self._seed, epoch)
            self._kept[epoch] = self._put([self._examples[n] for n in numbers], self._length)
        return self._kept[epoch]
