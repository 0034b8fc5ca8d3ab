"""Removes the source's weight files as soon as nothing needs them: what `--delete-source` does.

A file is removed only after every output that is made from it is on disk, synced, and has been read
back and compared by its hash; the last ones only after the manifest. The journal names a file
before it is removed, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jlayer.checkpoint.source import SourceFile
from jlayer.convert.sources.files import FileSource, Source, check_unchanged
from jlayer.convert.target.disk import failure, remove, sync_folder
from jlayer.convert.target.journal import Journal
from jlayer.convert.transform.outputs import WeightFile, files_of
from jlayer.errors import StorageError
from jlayer.strict import is_there, resolve


@dataclass
class _StoredFile:
    """One file on disk: all names that the source has for it, and the last output that needs it."""

    files: list[SourceFile] = field(default_factory=list)
    last_output: str = ""

    @property
    def paths(self) -> set[str]:
        return {path for file in self.files for path in (file.real, file.path)}


class SourceRemover:
    """Removes the files that hold a source's tensors, and nothing else.

    In a hub cache these are the blob and the link to it. A blob that another revision uses stays,
    and so does its link. Raises StorageError where a file may not be removed.
    """

    def __init__(
        self,
        source: Source,
        outputs: Sequence[WeightFile],
        journal: Journal,
        *,
        target: str,
        note: Callable[[str], None],
    ):
        self._source, self._journal, self._target = source, journal, target
        self._final_output = outputs[-1].name
        self._removes_early = _can_be_restored(source)
        self._stored: dict[str, _StoredFile] = {}  # by the path without links
        for output in outputs:
            for file in files_of(source, output):
                stored = self._stored.setdefault(file.real, _StoredFile())
                stored.last_output = output.name
                if file not in stored.files:
                    stored.files.append(file)
        for real, stored in list(self._stored.items()):
            user = _other_user(stored.files[0])
            if user is not None:
                note(f"{stored.files[0].path}: kept, since {user} leads to the same blob")
                del self._stored[real]
            for path in stored.paths:
                _check_removable(path)

    def freed_bytes(self) -> dict[str, int]:
        """By output: how many bytes its completion frees on the target's disk."""
        device, freed = _status(self._target).st_dev, {}
        for real, stored in self._stored.items():
            output = stored.last_output
            if self._removes_early and output != self._final_output and is_there(real):
                status = _status(real)
                if status.st_dev == device and status.st_nlink == 1:
                    freed[output] = freed.get(output, 0) + status.st_blocks * 512
        return freed

    def remove_after(self, output: str) -> None:
        """Removes the files that no output after this one needs; it and those before are on disk
        and checked."""
        if self._removes_early and output != self._final_output:
            self._remove([file for file in self._stored.values() if file.last_output == output])

    def remove_rest(self) -> None:
        """Removes the files that are left; the manifest is on disk."""
        self._remove(list(self._stored.values()))

    def _remove(self, unneeded):
        files = [file for stored in unneeded for file in stored.files]
        for file in files:
            if is_there(file.real):
                check_unchanged(file)  # new content, which was never read, must not be lost
        new = sorted({file.name for file in files} - set(self._journal.removed))
        if new:
            self._journal.removed += new
            self._journal.write(self._target)
        if files:
            self._source.close()  # an open file takes its space until it is closed
        for stored in unneeded:
            for path in stored.paths:
                remove(path)
            for folder in {os.path.dirname(path) for path in stored.paths}:
                sync_folder(folder)
            del self._stored[stored.files[0].real]


def _status(path):
    try:
        return os.stat(path)
    except OSError as error:
        raise failure(path, error, "looked at") from None


def _can_be_restored(source):
    """Whether the journal can describe where the tensors lie, so that a later run can do without
    the removed files. It cannot for pickles: their files stay until the end."""
    return type(source) is FileSource and all(
        place.strided is None and place.checksum is None
        for name in source.tensors
        for place in source.places_of(name)
    )


def _other_user(file):
    """What else in a hub cache uses the same blob, as words for a message; None where nothing
    does."""
    if file.real == file.path or not os.path.islink(file.path):
        return None
    home = resolve(os.path.dirname(file.path))
    repository, snapshots, _ = home.rpartition(f"{os.sep}snapshots{os.sep}")
    shared = os.path.join(os.path.dirname(repository), "blobs")
    if snapshots and file.real.startswith(shared + os.sep):
        return "perhaps another model of the cache, whose store it is in,"
    for path in _links(os.path.join(repository, "snapshots")) if snapshots else ():
        leads_there = resolve(path, strict=False) == file.real
        if leads_there and resolve(os.path.dirname(path)) != home:
            return path
    return None


def _links(folder) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            if os.path.islink(path):
                yield path


def _check_removable(path):
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder}: not writable, so {path} cannot be removed; convert without --delete-source"
        )
