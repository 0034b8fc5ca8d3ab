"""AdamW on the adapters, layer by layer: its moments are in host memory as the adapters are, and
pass through the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax

from jlayer.tuning.flat import Flats
from jlayer.tuning.settings import Settings

PART = 1 << 22  # numbers


@dataclass(frozen=True)
class Moments:
    """AdamW's: of each gradient the running mean, and that of its square; after `count` steps."""

    mean: Flats
    square: Flats
    count: int

    @classmethod
    def of(cls, flats: Flats) -> Moments:
        """Before the first step."""
        zeros = [{layer: np.zeros_like(one) for layer, one in flats.items()} for _ in range(2)]
        return cls(*zeros, 0)


def rates_of(settings: Settings, n_steps: int) -> Callable[[int], float]:
    """(number of a step from 0) -> its learning rate, as transformers' schedules of these names."""
    # A rate that is reached begins at 0: a run of one step would learn nothing.
    warmup = int(np.ceil(settings.warmup * n_steps)) if n_steps > 1 else 0
    rate = settings.learning_rate
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


def length_of(gradients: Flats) -> float:
    """Of all gradients together: the root of the sum of their squares, each layer's summed in
    float64."""
    return math.sqrt(sum(_squares(one) for one in gradients.values()))


def _squares(vector):
    """A part at a time: the vectors of a large model in float64 would be twice as large."""
    parts = (
        vector[first : first + PART].astype(np.float64) for first in range(0, len(vector), PART)
    )
    return sum(float(np.dot(part, part)) for part in parts)


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
        self, flats: Flats, gradients: Flats, moments: Moments, *, rate: float, factor: float
    ) -> tuple[dict[int, np.ndarray], Moments]:
        """(the adapters after a step, the moments). `factor`: multiplies the gradients first."""
        count = self._put(np.asarray(moments.count, np.int32))
        numbers = [self._put(np.asarray(each, np.float32)) for each in (rate, factor)]
        found: tuple[dict, dict, dict] = ({}, {}, {})
        before = None
        for layer in flats:
            each = (trees[layer] for trees in (flats, gradients, moments.mean, moments.square))
            results = self._update(*map(self._put, each), count, *numbers)
            if before is not None:
                _fetch(*before, found)
            before = layer, results  # the next one is on its way before this one comes back
        _fetch(*before, found)
        return found[0], Moments(found[1], found[2], moments.count + 1)


def _fetch(layer, results, found):
    for one, into in zip(results, found, strict=True):
        into[layer] = np.asarray(one)


def clip_factor(length: float, clip: float) -> float:
    """By what gradients of this length are multiplied, so that they are no longer than `clip`."""
    return 1.0 if not clip else min(1.0, clip / (length + 1e-6))  # as torch has it
