"""The few kinds of failure a caller can act on, each with its exit code on the command line.

A message is one line: what, where, found, expected, what to do. Anything that is not one of these
is a bug of ours.
"""


class JlayerError(Exception):
    """Base of every error that jlayer raises on purpose; `exit_code` is what the command line ends
    with."""

    exit_code = 1


class UsageError(JlayerError):
    """An option or a request that cannot be meant: wrong range, unknown name, prompt beyond the
    context."""

    exit_code = 2


class CheckpointError(JlayerError):
    """A model or checkpoint that is damaged, incomplete, inconsistent or not what it claims to
    be."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """A sound checkpoint of a kind that jlayer does not run (yet)."""


class DoesNotFitError(JlayerError):
    """Not enough memory or disk for what was asked. `report` is what --json shows of the sum behind
    it."""

    exit_code = 4

    def __init__(self, message, report=None):
        super().__init__(message)
        self.report = report or {}


class NetworkError(JlayerError):
    """The hub cannot be reached, is not to be asked (offline), or says no."""

    exit_code = 5


class StorageError(JlayerError):
    """The operating system failed to read or write."""

    exit_code = 6


class LockedError(JlayerError):
    """Another process is at work on the same target."""

    exit_code = 7
