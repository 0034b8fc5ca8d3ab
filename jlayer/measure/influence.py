"""How much each layer changes what passes through it, and what a model loses without some.

The influence of a layer is 1 - the cosine of its input and its output, on average over the tokens
of a text (Men et al. 2024, ShortGPT). One sweep over the text shows that of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlayer.api import Model
from jlayer.measure.evaluate import MOST_WINDOWS, perplexity, sizes_of, windows
from jlayer.plan.shapes import RunShape

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


def influences(
    model: Model,
    ids: list[int],
    *,
    length: int | None = None,
    told: Told = lambda done, of: None,
) -> Influences:
    """The influence of each layer on `ids`, cut into windows of `length` tokens (default: the
    model's context, at most 1,024). `told(done, of)`: called after each sweep with numbers of
    windows. Raises UsageError for an invalid length, and what a sweep raises.
    """
    length, _ = sizes_of(model, ids, length, None)
    cut = windows(len(ids), length=length, stride=length)
    batch = _windows_a_sweep(model, len(cut), length)
    shape, sums, sweeps = RunShape(batch, length, length), _Sums(), 0
    with closing(model.engine.start(shape)) as forward:
        for begin in range(0, len(cut), batch):
            some = [ids[one.begin : one.end] for one in cut[begin : begin + batch]]
            forward.observe(some, sums.seen)
            sums.settle()
            sweeps += 1
            told(min(begin + batch, len(cut)), len(cut))
    n_tokens = sum(one.end - one.begin for one in cut)
    found = tuple(total / n_tokens for _, total in sorted(sums.of_layers.items()))
    return Influences(found, n_tokens, sweeps)


class _Sums:
    """Sums over tokens of each layer's influence, of chunks as they pass."""

    def __init__(self):
        self.of_layers: dict[int, float] = {}
        self._before: dict[int, jax.Array] = {}  # by the chunk's identity, the last layer's output
        self._found: list[tuple[int, jax.Array]] = []  # on the device

    def seen(self, layer, chunk):
        hidden = chunk.flow["hidden"]
        before = self._before.get(id(chunk))
        self._before[id(chunk)] = hidden
        if layer >= 0:
            self._found.append((layer, _changed(before, hidden, chunk.part.tokens >= 0)))

    def settle(self):
        """Brings the sums to the host, once a sweep is done."""
        for layer, found in self._found:
            self.of_layers[layer] = self.of_layers.get(layer, 0.0) + float(found)
        self._found, self._before = [], {}


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
    opened: Callable[[tuple[int, ...]], AbstractContextManager[Model]],
    ids: list[int],
    order: Sequence[int],
    *,
    length: int | None = None,
    told: Callable[[tuple[int, ...]], Told] = lambda dropped: lambda done, of: None,
) -> Iterator[Loss]:
    """The perplexity of held-out `ids` without the first 0, 1, ... of the layers in `order`.

    `opened(dropped)`: opens the model without these layers. `told(dropped)`: gives what is called
    as in `perplexity`. Raises what opening and evaluating a model raise.
    """
    for n in range(len(order) + 1):
        dropped = tuple(sorted(order[:n]))
        with opened(dropped) as model:
            found = perplexity(model, ids, length=length, told=told(dropped))
        yield Loss(dropped, found.perplexity, found.nll)
