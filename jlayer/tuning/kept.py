"""What a step keeps in host memory meanwhile: each layer's input, and gradients on their way."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np


class Sent:
    """Arrays on their way from the device to host memory."""

    def __init__(self, arrays):
        self._arrays = arrays
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def arrived(self):
        """The same as arrays of numpy, once all are there."""
        return jax.tree.map(np.asarray, self._arrays)


class Inputs:
    """The input of each layer, of every chunk. `put`: begins to put arrays on the device.
    `has_link`: whether the device has a memory of its own; without one the arrays stay as they
    are."""

    def __init__(self, put: Callable, *, has_link: bool):
        self._put, self._has_link = put, has_link
        self._there: dict[int, list] = {}
        self._sent: dict[int, Sent] = {}
        self._coming: dict[int, list] = {}

    def keep(self, layer: int, arrays: list) -> None:
        """Begins to bring a layer's inputs to host memory; those of the layer before are there
        then, and no more on the device."""
        if not self._has_link:
            self._there[layer] = arrays
            return
        self.settle()
        self._sent[layer] = Sent(arrays)

    def settle(self) -> None:
        """Waits for what is on its way."""
        for layer, sent in self._sent.items():
            self._there[layer] = sent.arrived()
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
