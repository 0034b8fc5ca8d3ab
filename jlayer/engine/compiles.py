"""Counts the programs that XLA compiles."""

from __future__ import annotations

import jax

_backend_compiles = 0


def _count_compiles(event, duration, **_):
    global _backend_compiles
    if event.endswith("backend_compile_duration"):
        _backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def backend_compiles() -> int:
    """The number of programs that XLA has compiled in this process so far, ours or not."""
    return _backend_compiles
