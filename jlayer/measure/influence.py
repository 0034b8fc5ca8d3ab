"""How much each layer changes what passes through it, and what a model loses without some.

The influence of a layer is 1 - the cosine of its input and its output, on average over the tokens
of a text (Men et al. 2024, ShortGPT). One sweep over the text shows that of all layers. What a
model loses is its perplexity of held-out text: with all layers and without the first 1, 2, ... of
an order, all in one sweep, since a layer is passed over by those rows that are without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count

import jax
import jax.numpy as jnp

from jlayer.api import Model
from jlayer.engine.scores import Scores
from jlayer.measure.evaluate import MOST_WINDOWS, perplexity_of, sizes_of, targets_of, windows
from jlayer.plan.shapes import RunShape, power_of_two

Told = Callable[[int, int], None]
_TINY = 1e-12  # a row of zeros has no direction: it is taken to be unchanged by another such


@dataclass(frozen=True)
class Influences:
    """`of_layers`: of each layer from 0 up, from 0 (nothing changes) to 2; over `n_tokens`."""

    of_layers: tuple[float, ...]
    n_tokens: int
    sweeps: int

    def least(self, n: int, keep: Sequence[int] = ()) -> tuple[int, ...]:
        """The `n` layers of least influence that are not in `keep`, the least first; of equal ones
        the later goes first."""
        numbers = [layer for layer in range(len(self.of_layers)) if layer not in set(keep)]
        return tuple(sorted(numbers, key=lambda layer: (self.of_layers[layer], -layer))[:n])


@dataclass(frozen=True)
class Loss:
    """What a model without the layers `dropped` predicts of held-out text: `nll` in nats a
    token."""

    dropped: tuple[int, ...]
    perplexity: float
    nll: float


@dataclass
class SoFar:
    """What is known of a report after some sweeps; with it, the rest is measured.

    `n_windows`: of the text for influence, those that were seen, and `of_layers` the sums over
    their tokens. `curve`: for each number of layers left out the windows of held-out text that
    were, the sum of nats, and the tokens predicted.
    """

    n_windows: int = 0
    of_layers: list[float] = field(default_factory=list)
    curve: list[list] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {"windows": self.n_windows, "of_layers": self.of_layers, "curve": self.curve}

    @classmethod
    def from_dict(cls, raw: Mapping) -> SoFar:
        return cls(raw["windows"], list(raw["of_layers"]), [list(one) for one in raw["curve"]])


def influences(
    model: Model,
    ids: list[int],
    *,
    length: int | None = None,
    so_far: SoFar | None = None,
    told: Told = lambda done, of: None,
) -> Influences:
    """The influence of each layer on `ids`, cut into windows of `length` tokens (default: the
    model's context, at most 1,024). `so_far`: what is known already, to which each sweep adds.
    `told(done, of)`: called after each sweep with numbers of windows. Raises UsageError for an
    invalid length, and what a sweep raises.
    """
    so_far = so_far or SoFar()
    length, _ = sizes_of(model, ids, length, None)
    cut = windows(len(ids), length=length, stride=length)
    batch, sweeps = _windows_a_sweep(model, len(cut), length), 0
    if so_far.n_windows < len(cut):
        with closing(model.engine.start(RunShape(batch, length, length))) as forward:
            while so_far.n_windows < len(cut):
                some = cut[so_far.n_windows : so_far.n_windows + batch]
                sums = _Sums(so_far.of_layers)
                forward.observe([ids[one.begin : one.end] for one in some], sums.seen)
                so_far.of_layers, so_far.n_windows = sums.settled(), so_far.n_windows + len(some)
                sweeps += 1
                told(so_far.n_windows, len(cut))
    n_tokens = sum(one.end - one.begin for one in cut)
    return Influences(tuple(total / n_tokens for total in so_far.of_layers), n_tokens, sweeps)


class _Sums:
    """Sums over tokens of each layer's influence, of chunks as they pass."""

    def __init__(self, before: Sequence[float]):
        self._of_layers = dict(enumerate(before))
        self._before: dict[int, jax.Array] = {}  # by the chunk's identity, the last layer's output
        self._found: list[tuple[int, jax.Array]] = []  # on the device

    def seen(self, layer, chunk):
        hidden = chunk.flow["hidden"]
        before = self._before.get(id(chunk))
        self._before[id(chunk)] = hidden
        if layer >= 0:
            self._found.append((layer, _changed(before, hidden, chunk.part.tokens >= 0)))

    def settled(self) -> list[float]:
        """The sums on the host, once a sweep is done."""
        for layer, found in self._found:
            self._of_layers[layer] = self._of_layers.get(layer, 0.0) + float(found)
        return [self._of_layers[layer] for layer in sorted(self._of_layers)]


@jax.jit
def _changed(before, after, real):
    """1 - cosine of rows before and after, [R, D] each, summed over the `real` [R] ones."""
    a, b = before.astype(jnp.float32), after.astype(jnp.float32)
    dot = jnp.sum(a * b, axis=1)
    norms = jnp.sqrt(jnp.sum(a * a, axis=1) * jnp.sum(b * b, axis=1))
    cosine = jnp.where(norms > _TINY, dot / jnp.maximum(norms, _TINY), 1.0)
    return jnp.sum(jnp.where(real, 1.0 - cosine, 0.0))


def _windows_a_sweep(model, n_windows, length):
    """The most windows a sweep: of each row a second one is held, the layer's input, so that twice
    as many must fit."""
    batch = 1
    while batch < min(n_windows, MOST_WINDOWS):
        more = min(2 * batch, n_windows, MOST_WINDOWS)
        if not model.engine.plan_for(RunShape(2 * more, length, length)).fits:
            break
        batch = more
    return batch


def curve(
    model: Model,
    ids: list[int],
    order: Sequence[int],
    *,
    length: int | None = None,
    so_far: SoFar | None = None,
    told: Told = lambda done, of: None,
) -> Iterator[Loss]:
    """The perplexity of held-out `ids` without the first 0, 1, ... of the layers in `order`, each
    as the model would have it if it was opened without them.

    As many of these, and as many windows, ride in a sweep as the budgets allow. `so_far`: what is
    known already, to which each sweep adds. `told(done, of)`: called after each sweep with numbers
    of windows, those of all. Raises UsageError for an invalid length, and what a sweep raises.
    """
    so_far, length = so_far or SoFar(), sizes_of(model, ids, length, None)[0]
    cut, dropped = windows(len(ids), length=length, stride=length), _dropped(order)
    so_far.curve = so_far.curve or [[0, 0.0, 0] for _ in dropped]
    n_together, n_windows = _at_a_time(model, len(dropped), len(cut), length)
    for first in range(0, len(dropped), n_together):
        of_group = list(zip(dropped, so_far.curve, strict=True))[first : first + n_together]
        while missing := [one for one in of_group if one[1][0] < len(cut)]:
            begin = min(done for _, (done, *_) in missing)
            riding = [one for one in missing if one[1][0] == begin]
            some = cut[begin : begin + n_windows]
            shape = _shape(n_together, n_windows, length)
            with closing(model.engine.start(shape)) as forward:
                sums = _nll(forward, ids, some, [without for without, _ in riding])
            for (_, known), total in zip(riding, sums, strict=True):
                n_predicted = sum(one.n_predicted for one in some)
                known[:] = [begin + len(some), known[1] + total, known[2] + n_predicted]
            told(sum(done for done, *_ in so_far.curve), len(cut) * len(dropped))
        for without, (_, nll, n_predicted) in of_group:
            mean = nll / n_predicted
            yield Loss(tuple(sorted(without)), perplexity_of(mean), mean)


def _dropped(order):
    return [frozenset(order[:n]) for n in range(len(order) + 1)]


def _nll(forward, ids, some, without):
    """Of the model without each of these sets of layers, the nats of these windows."""
    targets, _ = targets_of(ids, some * len(without), count())
    scores = Scores(targets)
    rows = [ids[one.begin : one.end] for one in some]
    lanes = [passed for passed in without for _ in some]
    forward.score(rows * len(without), scores, without=lanes)
    return scores.nll.reshape(len(without), -1).sum(axis=1).tolist()


def _at_a_time(model, n_sets, n_windows, length):
    """(sets of layers, windows) in a sweep, as many as fit: all sets if possible, since their rows
    share the weights that come."""

    def fits(sets, some):
        return model.engine.plan_for(_shape(sets, some, length)).fits

    sets, some = n_sets, 1
    while sets > 1 and not fits(sets, 1):
        sets = -(-sets // 2)
    while some < n_windows and 2 * some * sets <= MOST_WINDOWS and fits(sets, 2 * some):
        some *= 2
    return sets, some


def _shape(n_sets, n_windows, length):
    """Windows of different sets share no chunk: there is room for as many as chunks are padded
    to."""
    return RunShape(n_sets * power_of_two(n_windows), length, length, all_logits=True)
