"""The output of a batch: a line for each request that was answered, appended and synced.

A process that is killed anywhere leaves whole lines, and at most a torn last one, which the next
one cuts. Every line has an id by which it shows whether it is of the same input and model (see
`names`), so nothing else has to be kept beside the output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator

from jlayer.durable import FULL, sync_folder, take_lock, write_all
from jlayer.errors import LockedError, StorageError, UsageError
from jlayer.serving.batch.names import Names
from jlayer.strict import close

GO_ON = "run the same command again, it goes on from there"
_STRANGE = {
    "input": "another input, or this one before it was changed",
    "model": "another model, dtype, context or chat template",
}


class Journal:
    """An output file, opened and locked; close it. `read` comes before the first `add`.

    `finished`: the custom_ids that have their line. `n_refused`: those of them that are errors.
    `note`: told what is no error. Raises UsageError (not such a file), LockedError (another process
    writes to it) or StorageError.
    """

    def __init__(self, path: str | os.PathLike, *, note: Callable[[str], None] = print):
        self.path = os.fspath(path)
        self.finished: set[str] = set()
        self.n_refused = 0
        self._end = 0
        self._fd, self._is_new = self._open()
        try:
            self._lock(note)
        except BaseException:
            close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def status(self) -> os.stat_result:
        return os.fstat(self._fd)

    def read(self, names: Names) -> None:
        """Takes up what is there, and cuts a torn end. Raises UsageError where it is of another
        batch."""
        for number, end, raw in self._whole_lines():
            line = _line_of(raw)
            if line is None:
                raise self._no_output(number)
            strange = names.strangeness(line["id"], line["custom_id"])
            if strange is not None:
                raise UsageError(
                    f"{self.path}: line {number} is the answer of {_STRANGE[strange]}; nothing was "
                    "changed, name another file for this output"
                )
            if line["custom_id"] in self.finished:
                raise UsageError(
                    f"{self.path}: line {number} answers {line['custom_id']!a:.80} once more; "
                    "nothing was changed, name another file for this output"
                )
            self._count(line)
            self._end = end
        try:
            if self.status.st_size > self._end:
                os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
        except OSError as error:
            raise self._failure(error) from None

    def add(self, lines: Iterable[dict]) -> None:
        """Appends lines, and returns when they are on the disk. After an error none of them is
        there."""
        lines = list(lines)
        raw = b"".join(map(_encoded, lines))
        try:
            self._check_place()
            write_all(self._fd, raw, self._end)
            os.fsync(self._fd)
        except OSError as error:
            self._cut()
            raise self._failure(error) from None
        self._end += len(raw)
        for line in lines:
            self._count(line)

    def lines(self) -> Iterator[dict]:
        """All lines that are there."""
        for _, _, raw in self._whole_lines():
            yield json.loads(raw)

    def close(self) -> None:
        """An empty file that this one has made is not left behind."""
        if self._fd < 0:
            return
        try:
            if self._is_new and not self._end and self._is_in_place():
                os.unlink(self.path)
        except OSError:  # it is as good as empty where it stays
            pass
        finally:
            close(self._fd)
            self._fd = -1

    def _open(self):
        """(descriptor, whether it was made)"""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise UsageError(
                    f"{self.path}: not a regular file; expected the name of a file for the output"
                )
            try:
                fd, is_new = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:  # a link to a file that is not there yet is followed
                fd, is_new = os.open(self.path, flags | os.O_CREAT, 0o666), False
            if is_new:
                sync_folder(os.path.dirname(os.path.abspath(self.path)))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None
        return fd, is_new

    def _lock(self, note):
        try:
            without = take_lock(self._fd)
        except BlockingIOError:
            raise LockedError(
                f"{self.path}: another batch writes to it; wait until it is done, or stop it and "
                "run the same command again"
            ) from None
        except OSError as error:
            raise self._failure(error) from None
        if without is not None:
            note(
                f"{self.path}: its file system has no locks ({without.strerror}); see that no "
                "other batch writes to it"
            )

    def _whole_lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, where it ends, its bytes) up to the first torn one: without its end, or with the
        zeros that a power cut leaves, which JSON never has."""
        end = 0
        try:
            with open(os.dup(self._fd), "rb") as file:
                file.seek(0)
                for number, raw in enumerate(file, 1):
                    if not raw.endswith(b"\n") or b"\0" in raw:
                        return
                    end += len(raw)
                    yield number, end, raw
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _no_output(self, number):
        return UsageError(
            f"{self.path}: line {number} is no answer of a batch; nothing was changed, name "
            "another file for the output"
        )

    def _count(self, line):
        self.finished.add(line["custom_id"])
        self.n_refused += is_refused(line)

    def _is_in_place(self):
        try:
            return os.path.samestat(os.stat(self.path), self.status)
        except FileNotFoundError:
            return False

    def _check_place(self):
        if not self._is_in_place():
            raise StorageError(
                f"{self.path}: was removed or replaced while the batch runs; {GO_ON} with what is "
                "there then"
            )

    def _cut(self):
        """After a failed write; where that fails too, the next process cuts."""
        try:
            os.ftruncate(self._fd, self._end)
        except OSError:
            return

    def _failure(self, error):
        advice = "free some space, and " if error.errno in FULL else ""
        return StorageError(
            f"{self.path}: cannot be written ({error.strerror}); what is finished is kept, "
            f"{advice}{GO_ON}"
        )


def is_refused(line: dict) -> bool:
    """Whether a line of an output is an error."""
    response = line["response"]
    return response is None or response["status_code"] != 200


def _line_of(raw):
    """A line of an output, as far as it is read again; None where it is none."""
    try:
        found = json.loads(raw)
        response = found["response"]
        is_ours = (
            isinstance(found["id"], str)
            and isinstance(found["custom_id"], str)
            and (response is None or isinstance(response["status_code"], int))
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if is_ours else None


def _encoded(line):
    # Half of a surrogate pair, of a request's own, becomes an escape as JSON has them.
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
