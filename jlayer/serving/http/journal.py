"""Requests that were accepted, on disk: lines of JSON that are only ever appended, each synced
before anybody is told.

A line that a crash tore is dropped: nobody was told of it. What is over or forgotten is left out
when the file is written anew, whole, beside the old one.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from jlayer.errors import LockedError
from jlayer.serving import starts
from jlayer.serving.disk import Log, log_failure
from jlayer.serving.starts import Starts

FILE, LOCK = "requests.jsonl", "lock"
MOST_DEAD = 2000  # lines that stand for nothing any more


class Journal:
    """The journal in a folder, which is made if need be, and is this process's alone until `close`.

    `starts`: of these requests, and of what else the server keeps in the folder. Raises
    LockedError, StorageError, or CheckpointError where the file is no journal.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        self._log = Log(os.path.join(self.folder, FILE))
        self.requests: dict[str, dict] = {}
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self._lock = os.open(
                os.path.join(self.folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise log_failure(self.folder, error) from None
        try:
            self._take_lock()
            self._log.read(self._apply)
            self.rewrite()
            self.starts = Starts(os.path.join(self.folder, starts.FILE))
        except BaseException:
            self._log.close()
            os.close(self._lock)
            raise

    def close(self) -> None:
        """The lock is free for the next process."""
        if self._lock >= 0:
            self.starts.close()
            self._log.close()
            os.close(self._lock)
            self._lock = -1

    def accept(self, request: dict) -> None:
        """`request` has an "id". It is on disk when this returns."""
        self._log.append({"accept": request})
        self.requests[request["id"]] = request

    def end(self, request_id: str, ended: dict) -> None:
        """What has come of a request; told once."""
        self._log.append({"end": request_id, "ended": ended})
        self.requests[request_id]["ended"] = ended

    def forget(self, request_id: str) -> None:
        if request_id in self.requests:
            self._log.append({"forget": request_id})
            del self.requests[request_id]
            self._n_dead += 2
            if self._n_dead > MOST_DEAD:
                self.rewrite()

    def rewrite(self) -> None:
        """Writes a file of what still counts, and puts it in the old one's place."""
        self._log.rewrite({"accept": request} for request in self.requests.values())
        self._n_dead = 0

    def _take_lock(self):
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"--state: {self.folder} is another server's ({_holder(self._lock)}); give each "
                "server a folder of its own"
            ) from None
        except OSError as error:
            raise log_failure(self.folder, error) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()}\n".encode(), 0)

    def _apply(self, entry):
        if "accept" in entry:
            self.requests[entry["accept"]["id"]] = entry["accept"]
        elif "end" in entry:
            self.requests[entry["end"]]["ended"] = entry["ended"]
        else:
            del self.requests[entry["forget"]]


def _holder(fd):
    with suppress(OSError):
        return os.pread(fd, 100, 0).decode("ascii", "replace").strip() or "unknown process"
    return "unknown process"
