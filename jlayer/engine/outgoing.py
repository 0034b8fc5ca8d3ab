"""The transfer of logits from the device to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import jax
import numpy as np

from jlayer.plan.memory import OUTGOING


class Outgoing:
    """Calls `take(output, places, row)` for each output of the head once it is on the host.

    A few outputs may wait on the device, so that the transfer does not stop the stream.
    """

    def __init__(self, take: Callable[[np.ndarray, np.ndarray, int], None]):
        self._take = take
        self._waiting = deque()

    @property
    def device_bytes(self) -> int:
        """Bytes that wait on the device now."""
        return sum(output.nbytes for output, _, _ in self._waiting)

    def add(self, output: jax.Array, places: np.ndarray, row: int) -> None:
        """Starts the transfer of logits [padded W, v], which begin at vocabulary row `row`;
        `places` [W] says whose they are."""
        output.copy_to_host_async()
        self._waiting.append((output, places, row))
        while len(self._waiting) >= OUTGOING:
            self._fetch()

    def finish(self) -> None:
        """Waits for the remaining transfers."""
        while self._waiting:
            self._fetch()

    def _fetch(self):
        output, places, row = self._waiting.popleft()
        self._take(np.asarray(output)[: len(places)], places, row)
