"""Ctrl-C and SIGTERM held back until a safe moment: between two steps of a sweep, never inside one.

An exception in the middle of a dispatch would leave a computation under way that nobody holds, over
memory that is about to go.
"""

from __future__ import annotations

import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Deferred:
    """While entered, notes a signal instead of acting on it; `check` acts, as leaving does.

    Does nothing outside the main thread, where Python delivers no signals.
    """

    def __init__(self):
        self._handlers = {}
        self._noted = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self._noted = (number, frame)

    def check(self):
        """Lets the signal that came meanwhile have its way."""
        if self._noted is not None:
            (number, frame), self._noted = self._noted, None
            self._handlers[number](number, frame)

    def __exit__(self, kind, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()
