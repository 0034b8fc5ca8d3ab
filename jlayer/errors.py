"""The kinds of failure that a caller can act on, each with its exit code on the command line.

A message is one line: what, where, found, expected, what to do. Any other exception is a bug in
jlayer.
"""


class JlayerError(Exception):
    """Base of every error that jlayer raises on purpose. `exit_code`: of the command line.

    `command_line`: the message as the command line shows it, where the advice for a user of Python
    names what only Python has.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, command_line: str | None = None):
        super().__init__(message)
        self._command_line = command_line

    @property
    def command_line(self) -> str:
        return str(self) if self._command_line is None else self._command_line


class UsageError(JlayerError):
    """An invalid option or request: out of range, unknown name, prompt longer than the context."""

    exit_code = 2


class CheckpointError(JlayerError):
    """A model or checkpoint that is damaged, incomplete, inconsistent or of another format."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """A valid checkpoint of a kind that jlayer does not support."""


class DoesNotFitError(JlayerError):
    """Not enough memory or disk for the request. `report`: the sum behind it, printed by --json."""

    exit_code = 4

    def __init__(self, message: str = "", report: dict | None = None, **advice):
        super().__init__(message, **advice)
        self.report = report or {}


class NetworkError(JlayerError):
    """The hub cannot be reached, must not be asked (offline), or refuses."""

    exit_code = 5


class StorageError(JlayerError):
    """The operating system failed to read or write."""

    exit_code = 6


class LockedError(JlayerError):
    """Another process is working on the same target."""

    exit_code = 7
