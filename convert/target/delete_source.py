"""The source's weight files, removed as soon as nothing needs them: what `--delete-source` does.

A file goes only after every file that is made of it is on disk, synced, and read again by its
hash; the last ones go after the manifest. The journal names it first, so that a run which is cut
off in between can be gone on with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from convert.sources.files import FileSource, Source, check_unchanged
from convert.target.disk import failure, remove, sync_folder
from convert.target.journal import Journal
from convert.transform.outputs import WeightFile, files_of
from jlayer.checkpoint.source import SourceFile
from jlayer.errors import StorageError
from jlayer.strict import is_there, resolve


@dataclass
class _Held:
    """One file on disk, under all the names that the source has for it, and the output after which
    nothing needs it."""

    files: list[SourceFile] = field(default_factory=list)
    last: str = ""

    @property
    def paths(self) -> set[str]:
        return {path for file in self.files for path in (file.real, file.path)}


class Shedder:
    """Removes what a source's tensors lie in, and nothing else of it.

    In a hub cache that is the blob and the link to it; a blob that another revision uses as well
    stays, with its link. Raises StorageError where removing is not allowed.
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
        self._final = outputs[-1].name
        self._goes_early = _is_plain(source)
        self._held: dict[str, _Held] = {}
        for output in outputs:
            for file in files_of(source, output):
                held = self._held.setdefault(file.real, _Held())
                held.last = output.name
                if file not in held.files:
                    held.files.append(file)
        for real, held in list(self._held.items()):
            user = _other_user(held.files[0])
            if user is not None:
                note(f"{held.files[0].path}: kept, since {user} leads to the same blob")
                del self._held[real]
            for path in held.paths:
                _check_removable(path)

    @property
    def names(self) -> list[str]:
        """The files that are to go, as the source names them."""
        return sorted(file.name for held in self._held.values() for file in held.files)

    def frees(self) -> dict[str, int]:
        """After which output how many bytes come free on the target's disk."""
        device, freed = _status(self._target).st_dev, {}
        for real, held in self._held.items():
            if self._goes_early and held.last != self._final and is_there(real):
                status = _status(real)
                if status.st_dev == device and status.st_nlink == 1:
                    freed[held.last] = freed.get(held.last, 0) + status.st_blocks * 512
        return freed

    def after(self, output: str) -> None:
        """Removes what only `output` and those before it needed, all of which are checked."""
        if self._goes_early and output != self._final:
            self._shed([held for held in self._held.values() if held.last == output])

    def rest(self) -> None:
        """Removes what is left, once the manifest is written."""
        self._shed(list(self._held.values()))

    def _shed(self, going):
        files = [file for held in going for file in held.files]
        for file in files:
            if is_there(file.real):
                check_unchanged(file)  # what has never been read is not to be lost
        new = sorted({file.name for file in files} - set(self._journal.removed))
        if new:
            self._journal.removed += new
            self._journal.write(self._target)
        if files:
            self._source.close()  # a file that is open takes its room until it is closed
        for held in going:
            for path in held.paths:
                remove(path)
            for folder in {os.path.dirname(path) for path in held.paths}:
                sync_folder(folder)
            del self._held[held.files[0].real]


def _status(path):
    try:
        return os.stat(path)
    except OSError as error:
        raise failure(path, error, "looked at") from None


def _is_plain(source):
    """Whether the journal can describe how its tensors are read, so that a later run can go on
    with some of its files gone. Not so for pickles: their files stay until the end."""
    return type(source) is FileSource and all(
        place.strided is None and place.checksum is None
        for name in source.tensors
        for place in source.places_of(name)
    )


def _other_user(file):
    """Another revision's link to the same blob of a hub cache, which is not ours to break."""
    if file.real == file.path or not os.path.islink(file.path):
        return None
    home = resolve(os.path.dirname(file.path))
    before, found, _ = home.rpartition(f"{os.sep}snapshots{os.sep}")
    shared = os.path.join(os.path.dirname(before), "blobs")
    if found and file.real.startswith(shared + os.sep):
        return "perhaps another model of the cache, whose store it is in,"
    for path in _links(os.path.join(before, "snapshots")) if found else ():
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
