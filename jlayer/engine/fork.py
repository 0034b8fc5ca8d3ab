"""A process that was forked from one that has used a model: neither JAX nor a reader's threads live
on in it, and whatever waits for them would wait for ever."""

from __future__ import annotations

import os

from jlayer.errors import UsageError

_first: int | None = None  # the process that opened a model first


def check_process() -> None:
    """Raises UsageError in a process that was forked after a model was opened."""
    global _first
    _first = os.getpid() if _first is None else _first
    if is_forked():
        raise UsageError(
            f"this process was forked from process {_first} after a model was opened there, and "
            "JAX's threads do not live on in it; start processes with multiprocessing's method "
            "'spawn', or open models in the new process alone"
        )


def is_forked() -> bool:
    return _first is not None and _first != os.getpid()
