"""What an executor asks of who has it stream."""

from __future__ import annotations

from typing import Protocol


class CachesOnHost(Protocol):
    """Caches in host memory, by layer."""

    def put(self, layer: int) -> int:
        """Begins to put a layer's cache on the device; returns its bytes."""

    def take(self, layer: int) -> None:
        """Begins to bring back what was written to it, and drops it from the device."""


class Waitable(Protocol):
    """What the host's cores are at."""

    def wait(self) -> None:
        """Returns once the tile is multiplied, and its memory is not read any more."""

    def leave(self) -> None:
        """The same for a pass that is given up: it need not be multiplied."""
