"""AdamW on the adapters, matrix by matrix: its moments are in host memory as the adapters are, and
pass through the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
import optax

from jlayer.tuning.settings import Settings
from jlayer.tuning.step import State

# So many matrices are on the device at a time.
AT_A_TIME = 8


@dataclass(frozen=True)
class Moments:
    """AdamW's: of each gradient the running mean, and that of its square; after `count` steps."""

    mean: State
    square: State
    count: int

    @classmethod
    def of(cls, state: State) -> Moments:
        """Before the first step."""
        zeros = jax.tree.map(np.zeros_like, dict(state))
        return cls(zeros, jax.tree.map(np.copy, zeros), 0)


def rates_of(settings: Settings, n_steps: int) -> Callable[[int], float]:
    """(number of a step from 0) -> its learning rate, as transformers' schedules of these names."""
    rate, warmup = settings.learning_rate, int(np.ceil(settings.warmup * n_steps))
    rest = max(1, n_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
    }[settings.schedule]()
    joined = after
    if warmup:
        joined = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])

    def rate_at(step):
        with jax.numpy_dtype_promotion("standard"):
            return float(joined(step))

    return rate_at


def length_of(gradients: State) -> float:
    """Of all gradients together: the root of the sum of their squares, summed in float64."""
    return float(np.sqrt(sum(float(np.vdot(a, a)) for a in map(_wide, jax.tree.leaves(gradients)))))


def _wide(array):
    return array.astype(np.float64)


class AdamW:
    """The steps of one run. `put`: puts an array on the device."""

    def __init__(self, settings: Settings, put):
        self._put = put
        adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
        decay = optax.add_decayed_weights(settings.weight_decay)

        def update(state, gradient, mean, square, count, rate, factor):
            moments = optax.ScaleByAdamState(count, mean, square)
            with jax.numpy_dtype_promotion("standard"):  # optax relies on it
                change, moments = adam.update(gradient * factor, moments, state)
                change, _ = decay.update(change, optax.EmptyState(), state)
            return state - rate * change, moments.mu, moments.nu

        self._update = jax.jit(update)

    def step(
        self, state: State, gradients: State, moments: Moments, *, rate: float, factor: float
    ) -> tuple[dict, Moments]:
        """(the adapters after a step, the moments). `factor`: multiplies the gradients first."""
        count = self._put(np.asarray(moments.count, np.int32))
        numbers = [self._put(np.asarray(each, np.float32)) for each in (rate, factor)]
        found, waiting = {}, []

        def finish(some):
            for name, side, results in some:
                found[name, side] = [np.asarray(each) for each in results]

        for name, pair in state.items():
            for side in pair:
                each = (tree[name][side] for tree in (state, gradients, *_trees(moments)))
                results = self._update(*map(self._put, each), count, *numbers)
                waiting.append((name, side, results))
            if len(waiting) > 2 * AT_A_TIME:
                finish(waiting[: len(waiting) // 2])
                del waiting[: len(waiting) // 2]
        finish(waiting)
        trees = [
            {name: {side: found[name, side][n] for side in pair} for name, pair in state.items()}
            for n in range(3)
        ]
        return trees[0], Moments(trees[1], trees[2], moments.count + 1)


def _trees(moments: Moments) -> tuple[Mapping, Mapping]:
    return moments.mean, moments.square


def clip_factor(length: float, clip: float) -> float:
    """By what gradients of this length are multiplied, so that they are no longer than `clip`."""
    return 1.0 if not clip or length <= clip else clip / length
