"""Small writes that survive a crash: whole or not at all, and synced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from jlayer.durable import room_advice, sync_folder, write_all
from jlayer.errors import CheckpointError, StorageError

TEMPORARY = ".tmp"  # the suffix of a file until it is whole


def write_file(path: str, write: Callable) -> None:
    """Has `write(file)` fill a new file, and puts it in the place of `path`. Raises StorageError;
    then nothing is changed."""
    aside = path + TEMPORARY
    try:
        try:
            with open(aside, "wb", opener=_private) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(os.path.dirname(path))
        except BaseException:
            remove(aside)
            raise
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}){room_advice(error)}"
        ) from None


def remove(path: str) -> None:
    """Removes a file, if it is there and can be."""
    try:
        os.unlink(path)
    except OSError:  # gone, or it stays: nothing depends on it
        return


def _private(path, flags):
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class Log:
    """A file of a server's own: lines of JSON that are only ever appended, or written anew as a
    whole. `read` and `rewrite` come first. Raises StorageError; then nothing is changed."""

    def __init__(self, path: str):
        self._path, self._fd = path, -1

    def read(self, apply: Callable[[dict], None]) -> None:
        """Hands each entry to `apply`. A last line that a crash tore is left out. Raises
        CheckpointError where another one is damaged, or `apply` cannot take it."""
        try:
            with open(self._path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise log_failure(self._path, error) from None
        for number, raw in enumerate(lines[:-1], 1):  # behind the last newline: nothing, or torn
            try:
                apply(json.loads(raw))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(
                    f"{self._path}: line {number} is damaged; repair it, or move the file away"
                ) from None

    def rewrite(self, entries: Iterable[dict]) -> None:
        """Writes a file of these entries, and puts it in the old one's place."""
        write_file(self._path, lambda file: file.writelines(map(_line, entries)))
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise log_failure(self._path, error) from None
        self.close()
        self._fd = fd

    def append(self, entry: dict, *, sync: bool = True) -> None:
        """`sync`: it is on the disk when this returns. Without, it survives the end of this
        process, however that comes, but not that of the machine."""
        end = os.fstat(self._fd).st_size
        try:
            write_all(self._fd, _line(entry), end)
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(self._fd, end)
            raise log_failure(self._path, error) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def log_failure(path: str, error: OSError) -> StorageError:
    return StorageError(f"--state: {path}: {error.strerror}{room_advice(error)}")


def _line(entry):
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
