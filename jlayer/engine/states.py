"""States on disk: the arrays of a run as Orbax writes them, a part at a time, and the facts of it.

A state is a folder that appears whole or not at all: it is written beside, synced and renamed, and
the one before it is removed after that. Its arrays come in parts, one after another, so that host
memory holds one part more, and not the state. Orbax does not check the numbers that it reads; a
digest of each part is among the facts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash

from jlayer.checkpoint.orbax_errors import first_line, quiet_orbax, system_code
from jlayer.durable import FULL, LOCK, open_lock, sync_folder, sync_tree
from jlayer.errors import CheckpointError, LockedError, StorageError, UsageError
from jlayer.interrupts import imported, uninterrupted
from jlayer.strict import close, read_small_file

FACTS = "facts.json"
UNFINISHED = ".jlayer-tmp"
MOST_FACTS_BYTES = 1 << 30  # the tokens of many long texts
SPARE_BYTES = 1 << 20  # of a disk, for what Orbax writes beside the numbers
CHUNK_BYTES = 64 << 20  # written at once
# The errors of file systems without such locks.
_UNLOCKABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

Part = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class State:
    """A state that is whole. `facts`: what was said of it, from JSON."""

    path: str
    facts: dict
    digests: tuple[str, ...]

    def parts(self) -> Iterator[dict[str, np.ndarray]]:
        """Its arrays by name, a part at a time, as they were written. Raises CheckpointError for
        one that is damaged, or StorageError."""
        for number, digest in enumerate(self.digests):
            part = read_part(os.path.join(self.path, _part_name(number)))
            if _digest(part) != digest:
                raise _damaged(self.path, f"{_part_name(number)} is not that of its digest")
            yield part


def write_state(path: str, facts: Mapping, parts: Iterable[Part], *, n_bytes: int) -> None:
    """Writes a state; it is whole and on the disk when this returns. Nothing may be at `path`.
    `parts`: an array without elements is left out, since Orbax has none. `n_bytes`: of all parts.
    Raises StorageError; then nothing is left of it."""
    aside = path + UNFINISHED
    parent = os.path.dirname(path)
    try:
        os.makedirs(parent, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run has left
        check_room(parent, n_bytes)
        os.mkdir(aside)
        digests = []
        for part in parts:
            part = {name: array for name, array in part.items() if array.size}
            if part:
                write_part(os.path.join(aside, _part_name(len(digests))), part)
                digests.append(_digest(part))
        own = {"facts": dict(facts), "parts": digests}
        with open(os.path.join(aside, FACTS), "w", encoding="utf-8") as file:
            json.dump(own | {"digest": _digest_of(own)}, file, ensure_ascii=False)
        sync_tree(aside)
        os.rename(aside, path)
        sync_folder(parent)
    except (ValueError, OSError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        code = system_code(error)
        why = first_line(error) if code is None else os.strerror(code)
        room = "; free some space, or name a folder on another disk" if code in FULL else ""
        raise StorageError(f"{path}: cannot be saved ({why}){room}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_state(path: str) -> State:
    """The state at a path; its arrays are read later. Raises CheckpointError where it is damaged
    or missing, or StorageError."""
    raw = read_small_file(os.path.join(path, FACTS), limit=MOST_FACTS_BYTES)
    try:
        found = json.loads(raw)
        own = {"facts": found["facts"], "parts": found["parts"]}
        if found["digest"] != _digest_of(own):
            raise ValueError("its facts are not those of their digest")
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, first_line(error)) from None
    return State(path, own["facts"], tuple(own["parts"]))


class StateFolder:
    """A folder that holds the newest state of one run. `path`: as the user wrote it.

    Inside, states are numbered: the next one is there before the last one goes. Only one process
    at a time saves to it, and none while another reads.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._inside = os.path.abspath(self.path)

    def newest(self) -> State | None:
        """None where there is none. Raises CheckpointError or StorageError."""
        numbers = self._numbers()
        return read_state(self._at(numbers[-1])) if numbers else None

    def check(self) -> None:
        """Raises UsageError where the folder holds something else, or is no folder, and
        StorageError where none can be made: before hours are spent on what is to be saved."""
        if os.path.lexists(self._inside) and not os.path.isdir(self._inside):
            raise UsageError(f"{self.path}: is there and no folder, expected one for a saved run")
        others = sorted(name for name in self._names() if not _is_own(name))
        if others:
            raise UsageError(
                f"{self.path}: has {others[0]!a:.80}, which is no part of a saved run; nothing was "
                "changed, name another folder"
            )
        above = self._inside
        while not os.path.exists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
            raise StorageError(
                f"{self.path}: cannot be written, since {above} is not a folder to write in"
            )

    @property
    def holds_one(self) -> bool:
        """Whether there is a state."""
        return bool(self._numbers())

    def is_at(self, path: str | os.PathLike) -> bool:
        """Whether this is the folder at a path."""
        return os.path.realpath(path) == os.path.realpath(self.path)

    def save(self, facts: Mapping, parts: Iterable[Part], *, n_bytes: int) -> None:
        """Writes a state in the place of what is there: until it is whole, the old one stands.
        Raises UsageError, LockedError or StorageError."""
        self.check()
        with uninterrupted(), self._locked(fcntl.LOCK_EX):
            numbers = self._numbers()
            for name in self._names():
                if UNFINISHED in name:
                    shutil.rmtree(os.path.join(self._inside, name), ignore_errors=True)
            number = numbers[-1] + 1 if numbers else 1
            write_state(self._at(number), facts, parts, n_bytes=n_bytes)
            for old in numbers:
                remove_state(self._at(old))

    @contextmanager
    def reading(self) -> Iterator[State]:
        """The newest state, which no other process replaces meanwhile. Raises UsageError where
        there is none, and what `newest` raises."""
        if not os.path.isdir(self._inside):
            raise UsageError(f"{self.path}: does not exist, expected the folder of a saved run")
        with self._locked(fcntl.LOCK_SH):
            state = self.newest()
            if state is None:
                raise UsageError(
                    f"{self.path}: holds no saved run; a run that was killed before its first save "
                    "has left nothing, begin it anew"
                )
            yield state

    def _numbers(self):
        return sorted(int(name) for name in self._names() if _is_number(name))

    def _names(self):
        try:
            return os.listdir(self._inside)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _at(self, number):
        return os.path.join(self._inside, str(number))

    @contextmanager
    def _locked(self, how):
        fd = -1
        try:
            try:
                os.makedirs(self._inside, exist_ok=True)
                lock = os.path.join(self._inside, LOCK)
                fd = open_lock(lock)
                fcntl.flock(fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(
                    f"{self.path}: another process saves or reads the run; wait until it is done"
                ) from None
            except OSError as error:
                # One that may only be read, or has no locks, is read all the same.
                read_only = how == fcntl.LOCK_SH and error.errno in (errno.EACCES, errno.EROFS)
                if error.errno not in _UNLOCKABLE and not read_only:
                    raise StorageError(
                        f"{self.path}: cannot be written ({error.strerror})"
                    ) from None
            yield
        finally:
            if fd >= 0:
                close(fd)


def remove_state(path: str) -> None:
    """Removes a state: all at once by its name, since a part of it would look like a damaged one.
    What a kill leaves of it is removed with the next save."""
    aside = path + UNFINISHED
    with contextlib.suppress(OSError):  # another process may have removed it
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _part_name(number):
    return f"part-{number:05d}"


def _is_number(name):
    return name.isascii() and name.isdigit()


def _is_own(name):
    return _is_number(name.removesuffix(UNFINISHED)) or name == LOCK


def write_part(path, part):
    ocp, checkpointer = _orbax()
    how = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in part}
    with quiet_orbax():
        checkpointer.save(path, args=ocp.args.PyTreeSave(dict(part), save_args=how))


def read_part(path):
    ocp, checkpointer = _orbax()
    try:
        with quiet_orbax():
            names = checkpointer.metadata(path).item_metadata.tree
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            return dict(checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=how)))
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        code = system_code(error)
        if code not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise StorageError(f"{path}: cannot be read ({os.strerror(code)})") from None
        raise _damaged(os.path.dirname(path), first_line(error)) from None


def _orbax():
    """Compressed, numbers like these lose a tenth, for twice the time and the memory."""
    ocp = imported("orbax.checkpoint")
    return ocp, ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _damaged(path, why):
    return CheckpointError(f"{path}: a damaged state ({why}); remove it")


def _digest(part):
    digest = xxhash.xxh3_128()
    for name in sorted(part):
        array = np.ascontiguousarray(part[name])
        digest.update(repr((name, array.dtype.name, array.shape)).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest_of(words):
    return xxhash.xxh3_128(json.dumps(words, sort_keys=True).encode()).hexdigest()


def check_room(folder, n_bytes):
    """A disk that fills up meanwhile is told of by tensorstore, and not in one line."""
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < n_bytes + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
