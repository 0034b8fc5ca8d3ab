"""Requests that were accepted, on disk: lines of JSON that are only ever appended, each synced
before anybody is told.

A line that a crash tore is dropped: nobody was told of it. What is over or forgotten is left out
when the file is written anew, whole, beside the old one.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress

from jlayer.errors import CheckpointError, LockedError, StorageError
from jlayer.serving.disk import room_advice, write_all, write_file

FILE, LOCK = "requests.jsonl", "lock"
MOST_DEAD = 2000  # lines that stand for nothing any more


class Journal:
    """The journal in a folder, which is made if need be, and is this process's alone until `close`.

    Raises LockedError, StorageError, or CheckpointError where the file is no journal.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        self._path = os.path.join(self.folder, FILE)
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self._lock = os.open(
                os.path.join(self.folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise _failure(self.folder, error) from None
        try:
            self._take_lock()
            self.requests = self._read()
            self._file = -1
            self.rewrite()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """The lock is free for the next process."""
        if self._file >= 0:
            os.close(self._file)
            os.close(self._lock)
            self._file = -1

    def accept(self, request: dict) -> None:
        """`request` has an "id". It is on disk when this returns."""
        self._append({"accept": request})
        self.requests[request["id"]] = request

    def end(self, request_id: str, ended: dict) -> None:
        """What has come of a request; told once."""
        self._append({"end": request_id, "ended": ended})
        self.requests[request_id]["ended"] = ended

    def forget(self, request_id: str) -> None:
        if request_id in self.requests:
            self._append({"forget": request_id})
            del self.requests[request_id]
            self._n_dead += 2
            if self._n_dead > MOST_DEAD:
                self.rewrite()

    def rewrite(self) -> None:
        """Writes a file of what still counts, and puts it in the old one's place."""
        write_file(
            self._path,
            lambda file: file.writelines(
                _line({"accept": request}) for request in self.requests.values()
            ),
        )
        try:
            if self._file >= 0:
                os.close(self._file)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _failure(self._path, error) from None
        self._n_dead = 0

    def _append(self, entry):
        end = os.fstat(self._file).st_size
        try:
            write_all(self._file, _line(entry), end)
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(self._file, end)
            raise _failure(self._path, error) from None

    def _take_lock(self):
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"--state: {self.folder} is another server's ({_holder(self._lock)}); give each "
                "server a folder of its own"
            ) from None
        except OSError as error:
            raise _failure(self.folder, error) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()}\n".encode(), 0)

    def _read(self):
        try:
            with open(self._path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _failure(self._path, error) from None
        found: dict[str, dict] = {}
        for number, raw in enumerate(lines[:-1], 1):  # behind the last newline: nothing, or torn
            try:
                _apply(json.loads(raw), found)
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"{self._path}: line {number} is damaged; repair it, or move the file away"
                ) from None
        return found


def _apply(entry, found):
    if "accept" in entry:
        found[entry["accept"]["id"]] = entry["accept"]
    elif "end" in entry:
        found[entry["end"]]["ended"] = entry["ended"]
    else:
        del found[entry["forget"]]


def _line(entry):
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _holder(fd):
    with suppress(OSError):
        return os.pread(fd, 100, 0).decode("ascii", "replace").strip() or "unknown process"
    return "unknown process"


def _failure(path, error):
    return StorageError(f"--state: {path}: {error.strerror}{room_advice(error)}")
