"""What a command reads before it runs: a text from a file or from stdin, a model's folder."""

from __future__ import annotations

import os
import sys

from jlayer.checkpoint.hub import Weights, local_folder
from jlayer.errors import StorageError, UsageError
from jlayer.interrupts import released


def folder_of(ref: str, *, offline: bool, weights: Weights = Weights.RUN) -> str:
    """The folder of REF, downloaded where it is a hub id. Raises what `local_folder` does."""
    with released():
        return local_folder(ref, weights=weights, offline=offline)


def name_of(ref: str | os.PathLike) -> str:
    """A short name of a model: the last part of its folder's path."""
    return os.path.basename(os.path.normpath(ref))


def read_file(path: str, *, option: str) -> str:
    """A UTF-8 text file. Raises UsageError (missing, not UTF-8) or StorageError, which name
    `option`."""
    try:
        with released(), open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise UsageError(f"{option}: {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"{option}: {path}: {error.strerror}") from None
    return _decoded(raw, f"{option}: {path}")


def read_stdin(*, missing: str) -> str:
    """UTF-8 text from stdin. Raises UsageError: not UTF-8, or `missing` where stdin is a
    terminal."""
    if sys.stdin.isatty():
        raise UsageError(missing)
    with released():
        raw = sys.stdin.buffer.read()
    return _decoded(raw, "stdin")


def _decoded(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 at byte {error.start}; convert the text to UTF-8"
        ) from None
