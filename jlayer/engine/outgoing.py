"""Logits on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import jax
import numpy as np

from jlayer.plan.memory import OUTGOING


class Outgoing:
    """The head's outputs, which `take(output, column, row)` gets as they arrive on the host.

    A few stay on the device meanwhile, so that the transfer does not stop the stream.
    """

    def __init__(self, take: Callable[[np.ndarray, int, int], None]):
        self._take = take
        self._waiting = deque()

    @property
    def device_bytes(self) -> int:
        """Bytes that wait on the device now."""
        return sum(output.nbytes for output, _, _ in self._waiting)

    def add(self, output: jax.Array, column: int, row: int) -> None:
        """Starts the transfer of logits [B, columns, rows] from this column and vocabulary row
        on."""
        output.copy_to_host_async()
        self._waiting.append((output, column, row))
        while len(self._waiting) >= OUTGOING:
            self._fetch()

    def finish(self) -> None:
        """Waits for what is left."""
        while self._waiting:
            self._fetch()

    def _fetch(self):
        output, column, row = self._waiting.popleft()
        self._take(np.asarray(output), column, row)
