"""What a step keeps in host memory meanwhile: each layer's input, and gradients on their way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np


class Down:
    """Brings arrays from the device to host memory, in the background: to begin a copy takes a
    millisecond and more, in which the next weights would not be on their way."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jlayer-down")

    def send(self, arrays) -> Future:
        """Begins with a tree of arrays; the result is the same with arrays of numpy."""
        return self._pool.submit(jax.tree.map, np.asarray, arrays)

    def call(self, function: Callable, *args) -> Future:
        """Calls a function there."""
        return self._pool.submit(function, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Inputs:
    """The input of each layer, of every chunk. `put`: begins to put arrays on the device.
    `has_link`: whether the device has a memory of its own; without one the arrays stay as they
    are."""

    def __init__(self, put: Callable, down: Down, *, has_link: bool):
        self._put, self._down, self._has_link = put, down, has_link
        self._there: dict[int, list] = {}
        self._sent: dict[int, Future] = {}
        self._coming: dict[int, list] = {}

    def keep(self, layer: int, arrays: list) -> None:
        """Begins to bring a layer's inputs to host memory; those of the layer before are there
        then, and no more on the device."""
        if not self._has_link:
            self._there[layer] = arrays
            return
        self.settle()
        self._sent[layer] = self._down.send(arrays)

    def settle(self) -> None:
        """Waits for what is on its way."""
        for layer, sent in self._sent.items():
            self._there[layer] = sent.result()
        self._sent.clear()

    def fetch(self, layer: int) -> None:
        """Begins to put a layer's inputs back on the device, if they are kept."""
        self.settle()
        if layer in self._there:
            found = self._there.pop(layer)
            self._coming[layer] = [self._put(each) for each in found] if self._has_link else found

    def take(self, layer: int) -> list:
        """A layer's inputs on the device, the last time they are asked for."""
        if layer not in self._coming:
            self.fetch(layer)
        return self._coming.pop(layer)
