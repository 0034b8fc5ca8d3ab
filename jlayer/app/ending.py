"""How the command line ends when it is stopped: one exit code and one word for each signal."""

from __future__ import annotations

from jlayer.interrupts import Terminated

INTERRUPTED, TERMINATED = 130, 143


class Interrupted(BaseException):
    """Raised by a verb that was stopped by a signal and has a result to print all the same."""

    def __init__(self, stop: BaseException, result: dict):
        super().__init__(word_of(stop))
        self.result, self.code = result, code_of(stop)


def code_of(stop: BaseException) -> int:
    """The exit code after a KeyboardInterrupt or Terminated."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def word_of(stop: BaseException) -> str:
    return "terminated" if isinstance(stop, Terminated) else "interrupted"
