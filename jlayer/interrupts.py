"""Ctrl-C and SIGTERM held back until a safe moment: between two steps of a sweep or two programs
that are compiled, never inside one.

An exception in the middle of a dispatch would leave a computation under way that nobody holds, over
memory that is about to go; one in the middle of a compilation makes the process crash at its end.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_active: _Deferred | None = None


@contextmanager
def deferred():
    """While entered, a signal is noted instead of acted on; `check` of what is yielded acts, as
    leaving does. May be entered again inside.

    Does nothing outside the main thread, where Python delivers no signals.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        signals = _active or _Deferred()
        yield signals
        signals.check()
        return
    _active = signals = _Deferred()
    try:
        signals.hold()
        yield signals
    finally:
        _active = None
        signals.release()
    signals.check()


class _Deferred:
    """What was noted, and the handlers that would have acted."""

    def __init__(self):
        self._handlers = {}
        self._noted = None

    def hold(self):
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def release(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self._noted = (number, frame)

    def check(self):
        """Lets the signal that came meanwhile have its way."""
        if self._noted is not None:
            (number, frame), self._noted = self._noted, None
            self._handlers[number](number, frame)
