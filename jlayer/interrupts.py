"""SIGINT (Ctrl-C) and SIGTERM are held, and acted on at safe points.

Python runs a signal's handler between any two instructions. An exception raised there can break the
import of a C extension, a dispatch to the device or a compilation, and then the process crashes; or
it is raised in a finaliser or a callback, which drops it, and the program runs on. So the handler
notes the signal, and `check` acts on it: between two steps of a sweep, two compilations, two phases
of opening a model.

The command line holds signals from its first statement on (`hold`), and releases them only where it
waits for something else (`released`), and not at all where nothing may end halfway
(`uninterrupted`). A program that uses jlayer as a library keeps its own handlers; `deferred` holds
them back while it is entered.
"""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_held: _Held | None = None


class Terminated(BaseException):
    """SIGTERM, raised as KeyboardInterrupt is for SIGINT."""


STOPS = (KeyboardInterrupt, Terminated)


class _Held:
    """The handlers that were replaced, and the signal that is noted.

    `at_once`: act on a signal when it comes, not at the next `check`. `is_put_off`: act on none,
    but call `again` with a second one that comes meanwhile.
    """

    def __init__(self):
        self.at_once = self.is_put_off = False
        self.again: Callable[[int], None] | None = None
        self._handlers = {}
        self._noted = None

    def install(self, handlers: dict):
        for number, handler in handlers.items():
            self._handlers[number] = handler
            signal.signal(number, self._on_signal)

    def restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        is_second = self.is_put_off and self._noted is not None
        self._noted = (number, frame)
        if is_second and self.again is not None:
            self.again(number)
        if self.at_once and not self.is_put_off:
            self.at_once = False  # a second signal does not interrupt the clean-up
            # The note stays: if this exception is dropped, `released` acts on it at its end.
            self._handlers[number](number, frame)

    def check(self):
        """Acts on a signal that is noted: calls the handler that was replaced."""
        if self._noted is not None and not self.is_put_off:
            (number, frame), self._noted = self._noted, None
            self._handlers[number](number, frame)

    def forget(self):
        self._noted = None


class _Unheld:
    """Stands for `_Held` outside the main thread, where Python delivers no signals."""

    def check(self):
        pass


def hold() -> bool:
    """Holds signals until `release`, in a program of our own: SIGTERM raises Terminated.

    A signal that the parent process set to be ignored stays ignored. Returns False where signals
    are held already, or outside the main thread.
    """
    global _held
    if _held is not None or not _in_main_thread():
        return False
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    _held = _Held()
    _held.install({n: own for n, own in handlers.items() if signal.getsignal(n) != signal.SIG_IGN})
    return True


def release():
    """Gives the handlers back that `hold` replaced. A signal that is noted is dropped."""
    global _held
    held, _held = _held, None
    held.restore()


@contextmanager
def deferred():
    """Holds signals; `check` of what is yielded acts on one, as leaving does, also with an error.

    May be entered again inside.
    """
    global _held
    if not _in_main_thread():
        yield _Unheld()
        return
    if _held is not None:
        held, before = _held, _held.at_once
        held.at_once = False
        try:
            yield held
        finally:
            _leave(held, before)
        return
    held = _Held()
    try:
        _held = held
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        held.install({number: own for number, own in handlers.items() if callable(own)})
        yield held
    finally:
        _held = None
        held.restore()
        held.check()


@contextmanager
def released():
    """Acts on signals when they come, where they are held otherwise: for a place that waits."""
    if _held is None or not _in_main_thread():
        yield
        return
    held, before = _held, _held.at_once
    try:
        held.at_once = True
        held.check()
        yield
    except STOPS:
        held.forget()
        raise
    finally:
        _leave(held, before)


@contextmanager
def uninterrupted(again: Callable[[int], None] | None = None):
    """Inside, held signals are not acted on: what is begun there is ended. The next safe point
    after it acts on them. `again`: called with the number of a second one, for who will not wait
    so long."""
    held = _held
    if held is None or held.is_put_off or not _in_main_thread():
        yield
        return
    held.is_put_off, held.again = True, again
    try:
        yield
    finally:
        held.is_put_off, held.again = False, None


def imported(name: str):
    """The module of this name. An extension that is interrupted while it is imported may crash."""
    with deferred():
        return importlib.import_module(name)


def check():
    """A safe point: acts on a signal that is noted, if any."""
    if _held is not None and _in_main_thread():
        _held.check()


def _leave(held, at_once):
    held.at_once = at_once
    held.check()


def _in_main_thread():
    return threading.current_thread() is threading.main_thread()


def _terminate(number, frame):
    raise Terminated
