"""Texts as lanes of a fixed length, and which lanes each training step has.

A lane is a row of tokens with one text or several beside each other, which must not see each other.
All is decided by the texts, the length, the seed and the number of the step, so a run that goes on
sees what one that was never stopped would have seen. Needs numpy alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.errors import UsageError
from jlayer.tuning.data import Example

# Lanes that wait for more texts while others are packed. With fewer, lanes are less full; with
# more, texts leave the order of the epoch further.
MOST_OPEN = 64
_KEPT_EPOCHS = 2  # whose packing is kept: a step may be of two


@dataclass(frozen=True)
class Lanes:
    """n lanes of T tokens; what is padding is 0 in all of them.

    ids: int32 [n, T].
    targets: int32 [n, T], the id that follows within the same text.
    weights: float32 [n, T], by how much predicting the target counts.
    positions: int32 [n, T], from 0 in each text or piece of one.
    texts: int32 [n, T], the number of the text within its lane, from 1.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    texts: np.ndarray


@dataclass(frozen=True)
class Counts:
    """What `cut` does. `n_cut`: texts that are longer than a lane. `n_pieces`: what it gives.
    `n_left_out`: pieces and texts that nothing is learnt of. `n_tokens`: of the pieces, as places
    in lanes. `n_predicted`: those of them that count."""

    n_texts: int
    n_cut: int
    n_pieces: int
    n_left_out: int
    n_tokens: int
    n_predicted: int


# Texts → pieces


def cut(examples: Sequence[Example], length: int) -> list[Example]:
    """Texts that fit into lanes of `length`, those that are longer in pieces.

    A text of `length` + 1 ids fits, since its last one is only predicted. Pieces overlap by one id,
    so each id but a text's first is predicted exactly once, and the weights keep their sum. A later
    piece is learnt without what stood before it. What has no weight at all is left out: the trainer
    knows the pieces alone, each a text of its own; `counts` says how many there are.

    Raises UsageError where no id of any text has a weight.
    """
    found = [piece for one in examples for piece in _pieces(one, length) if any(piece.weights)]
    if not found:
        raise UsageError(
            f"data: none of {len(examples)} texts has a weight above 0, so there is nothing to "
            "learn; give a line a weight, or leave `weight` out"
        )
    return found


def counts(examples: Sequence[Example], length: int) -> Counts:
    """What `cut` does with the same arguments; it raises nothing."""
    pieces = [piece for one in examples for piece in _pieces(one, length)]
    kept = [piece for piece in pieces if any(piece.weights)]
    return Counts(
        n_texts=len(examples),
        n_cut=sum(n_places(one) > length for one in examples),
        n_pieces=len(kept),
        n_left_out=len(pieces) - len(kept),
        n_tokens=sum(map(n_places, kept)),
        n_predicted=sum(weight > 0 for piece in kept for weight in piece.weights),
    )


def n_places(example: Example) -> int:
    """How many tokens of a lane a text takes: all but its last, of which nothing is predicted."""
    return len(example.ids) - 1


def _pieces(example, length) -> Iterator[Example]:
    if n_places(example) <= length:
        yield example
        return
    for begin in range(0, n_places(example), length):
        end = begin + length + 1
        yield Example(example.ids[begin:end], (0.0, *example.weights[begin + 1 : end]))


# Pieces → lanes


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n numbers, int64 [n], of which (seed, epoch) decides: the order of 64-bit
    draws, which numpy promises to be the same in all its versions and on all machines."""
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(draws, kind="stable")


def packing(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which texts are beside each other, by their numbers in `sizes`: their places, each at most
    `length`.

    Each text in turn goes to the lane that it fills best, of at most MOST_OPEN that are open; a new
    one is opened where it fits into none, and for it the fullest is closed.
    """
    lanes, free = [], []  # free: (places left, number of the lane) of open ones, ascending
    for number, size in enumerate(sizes):
        assert 0 < size <= length, f"a text of {size} places in a lane of {length}"
        at = bisect_left(free, (size, 0))
        if at < len(free):
            left, lane = free.pop(at)
            lanes[lane].append(number)
        else:
            left, lane = length, len(lanes)
            lanes.append([number])
            if len(free) == MOST_OPEN:
                free.pop(0)
        if left > size:
            insort(free, (left - size, lane))
    return lanes


def packed(examples: Sequence[Example], length: int) -> Lanes:
    """The texts in lanes of several, nearly in their order; each must fit into a lane."""
    rows = packing([n_places(one) for one in examples], length)
    return filled([[examples[number] for number in row] for row in rows], length)


def padded(examples: Sequence[Example], length: int) -> Lanes:
    """The texts in lanes of their own, in their order; each must fit into a lane."""
    return filled([[one] for one in examples], length)


def filled(rows: Sequence[Sequence[Example]], length: int) -> Lanes:
    """A lane for each of `rows`, with the texts of it from the left."""
    shape = len(rows), length
    ids, targets, positions, texts = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for lane, row in enumerate(rows):
        begin = 0
        for number, one in enumerate(row, 1):
            n = n_places(one)
            assert begin + n <= length, f"{begin + n} places in a lane of {length}"
            here = lane, slice(begin, begin + n)
            ids[here], targets[here] = one.ids[:-1], one.ids[1:]
            weights[here] = one.weights[1:]
            positions[here] = np.arange(n, dtype=np.int32)
            texts[here] = number
            begin += n
    return Lanes(ids, targets, weights, positions, texts)


# Lanes → steps


class Steps:
    """The lanes of each step, without end: epoch after epoch, each in an order of its own.

    `examples`: as `cut` gives them for `length`. `packs`: several texts share a lane. Each epoch
    has every text once. A step has exactly `lanes_per_step` lanes; where an epoch ends within it,
    the first lanes of the next fill it.

    Raises UsageError where a text has no weight at all, or there is none.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        lanes_per_step: int,
        *,
        seed: int,
        packs: bool = True,
    ):
        for number, one in enumerate(examples, 1):
            if not any(one.weights):
                raise UsageError(
                    f"data: text {number} has no weight, so a lane could have none; cut them first"
                )
        if not examples or lanes_per_step < 1:
            raise UsageError(
                f"data: {len(examples)} texts and {lanes_per_step} lanes a step; expected at least "
                "one of each"
            )
        self._examples, self._length = examples, length
        self._lanes_per_step, self._seed, self._packs = lanes_per_step, seed, packs
        self._starts = [0]  # the first lane of each epoch, as far as they are known
        self._rows: dict[int, list[list[int]]] = {}  # of the epochs that are kept

    def step(self, number: int) -> Lanes:
        """The lanes of a step, from 0 on."""
        at, rows = number * self._lanes_per_step, []
        epoch = self._epoch_with(at)
        while len(rows) < self._lanes_per_step:
            begin = at + len(rows) - self._start(epoch)
            rows += self._epoch(epoch)[begin : begin + self._lanes_per_step - len(rows)]
            epoch += 1
        return filled([[self._examples[n] for n in row] for row in rows], self._length)

    def epoch_of(self, number: int) -> float:
        """How many epochs lie before a step."""
        at = number * self._lanes_per_step
        epoch = self._epoch_with(at)
        return epoch + (at - self._start(epoch)) / self._n_lanes(epoch)

    def n_steps(self, epochs: float) -> int:
        """How many steps have the lanes of so many epochs; the last may have some of the next."""
        whole = math.floor(epochs)
        n = self._start(whole)
        if epochs > whole:
            n += (epochs - whole) * self._n_lanes(whole)
        # A share such as 0.1 + 0.2 is not to cost a step more.
        return math.ceil(n / self._lanes_per_step - 1e-9)

    def _epoch_with(self, lane):
        if not self._packs:
            return lane // len(self._examples)
        while self._starts[-1] <= lane:
            self._start(len(self._starts))
        return bisect_right(self._starts, lane) - 1

    def _start(self, epoch):
        """The number of an epoch's first lane."""
        if not self._packs:
            return epoch * len(self._examples)
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        return self._starts[epoch]

    def _n_lanes(self, epoch):
        return self._start(epoch + 1) - self._start(epoch)

    def _epoch(self, epoch):
        """The lanes of an epoch: of each, the numbers of its texts."""
        self._start(epoch)
        if epoch not in self._rows:
            while len(self._rows) >= _KEPT_EPOCHS:
                del self._rows[max(self._rows, key=lambda other: abs(other - epoch))]
            self._rows[epoch] = self._arranged(epoch)
        return self._rows[epoch]

    def _arranged(self, epoch):
        numbers = order(len(self._examples), self._seed, epoch).tolist()
        if not self._packs:
            return [[number] for number in numbers]
        sizes = [n_places(self._examples[number]) for number in numbers]
        return [[numbers[at] for at in row] for row in packing(sizes, self._length)]
