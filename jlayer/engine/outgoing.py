"""Logits on their way to whoever asked for them: from the device, or from the host's own cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jlayer.plan.memory import OUTGOING


class Outgoing:
    """Calls `take(output, places, row)` for each output of the head once it is on the host.

    A few outputs may wait on the device, so that the transfer does not stop the stream.
    """

    def __init__(self, take: Callable[[np.ndarray, np.ndarray, int], None]):
        self._take = take
        self._waiting = deque()  # (function that waits for the output, bytes on the device, ...)

    @property
    def device_bytes(self) -> int:
        """Bytes that wait on the device now."""
        return sum(n_bytes for _, n_bytes, _, _ in self._waiting)

    def add(
        self, output: jax.Array, places: np.ndarray, ranges: Sequence[tuple[slice, int]]
    ) -> None:
        """Starts the transfer of logits [padded W, v]; `places` [W] says whose they are, `ranges`
        which columns begin at which vocabulary row."""
        output.copy_to_host_async()
        self._add(partial(np.asarray, output), output.nbytes, places, ranges)

    def add_hosted(self, fetch: Callable[[], np.ndarray], places: np.ndarray, row: int) -> None:
        """Notes logits [W, v] that the host's cores are at; `fetch` waits for them."""
        self._add(fetch, 0, places, [(slice(None), row)])

    def finish(self) -> None:
        """Waits for the remaining ones."""
        while self._waiting:
            self._fetch()

    def _add(self, *waiting):
        self._waiting.append(waiting)
        while len(self._waiting) >= OUTGOING:
            self._fetch()

    def _fetch(self):
        fetch, _, places, ranges = self._waiting.popleft()
        output = fetch()[: len(places)]
        for columns, row in ranges:
            self._take(output[:, columns], places, row)
