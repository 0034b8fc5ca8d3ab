"""The target folder: checks whether it may be written, and writes files that appear whole or not.

A file is written under a temporary name, synced, renamed, and its folder synced, so that after a
power cut every name in the folder has complete bytes. Nothing here knows where they come from.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from jlayer.checkpoint.layout import (
    EMBED_FILE,
    INDEX,
    MANIFEST,
    TEMPLATES,
    is_side_file,
    is_weight_file,
)
from jlayer.checkpoint.sides import with_templates
from jlayer.convert.sources.files import Chunk
from jlayer.convert.target.blocks import BlockWriter
from jlayer.convert.target.disk import (
    TEMPORARY,
    failure,
    make_folders,
    remove,
    resolve,
    sync_folder,
    uninterrupted,
    written_aside,
)
from jlayer.convert.target.journal import JOURNAL
from jlayer.convert.target.measured import MEASURED
from jlayer.durable import LOCK
from jlayer.errors import StorageError, UsageError


def check_target(target: str, *, source: str) -> None:
    """Checks the target without changing it.

    Raises UsageError (it is the source or inside it, is no folder, or holds anything but a layered
    checkpoint) or StorageError (not writable).
    """
    refuse_inside(target, source)
    status = _status(target)
    if status is None:
        _check_writable(_existing_parent(target))
        return
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{target}: not a folder; name a new one, or an empty one")
    names = sorted(with_templates(target, _names_in(target)))
    begun = not {EMBED_FILE, MANIFEST, JOURNAL}.isdisjoint(names)
    foreign = [repr(name) for name in names if not _is_ours(name, begun)]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UsageError(
            f"{target}: holds files that are not of a layered checkpoint "
            f"({', '.join(foreign[:5])}{more}); name another folder for {source}"
        )
    _check_writable(target)


def remove_temporaries(target: str) -> list[str]:
    """Removes the half-written files of an interrupted run; returns the names of the other files.

    The caller holds the target's lock.
    """
    names = sorted(with_templates(target, _names_in(target)))
    for name in names:
        if name.endswith(TEMPORARY):
            remove(os.path.join(target, name))
    return [name for name in names if not name.endswith(TEMPORARY) and name != LOCK]


class TargetWriter:
    """Writes files into a folder that is locked. A context manager."""

    def __init__(self, folder: str):
        self.folder = folder
        self._blocks = BlockWriter()

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._blocks.close()

    def room(self, n_bytes: int) -> memoryview:
        """Lends memory for the next chunk of the file that is being written, to save a copy."""
        return self._blocks.room(n_bytes)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files of a previous run, the manifest first: it must not outlive its files."""
        names = list(names)
        if MANIFEST in names:
            remove(os.path.join(self.folder, MANIFEST))
            sync_folder(self.folder)
        for name in names:
            remove(os.path.join(self.folder, name))
        if any(name.startswith(f"{TEMPLATES}/") for name in names):
            with contextlib.suppress(OSError):  # where it is not empty, it stays
                uninterrupted(os.rmdir, os.path.join(self.folder, TEMPLATES))

    def write(self, name: str, chunks: Iterable[Chunk], *, n_bytes: int) -> str:
        """Writes one file of `n_bytes` bytes and returns its SHA-256.

        Raises DoesNotFitError or StorageError, and whatever `chunks` raises; then nothing of the
        file is left.
        """
        path = os.path.join(self.folder, name)
        if "/" in name:
            make_folders(os.path.dirname(path))
        with written_aside(path) as aside:
            written, sha256 = self._blocks.write(aside, chunks, called=path)
            assert written == n_bytes, (name, written, n_bytes)
        return sha256


OWN = (LOCK, JOURNAL, MEASURED)


def _is_ours(name, begun):
    """Whether a file may be a conversion's. Config and tokenizer alone are not: such a folder is a
    download that was cut off."""
    if name.endswith(TEMPORARY) or is_weight_file(name) or name in OWN:
        return True
    return begun and (is_side_file(name) or name in (MANIFEST, INDEX, TEMPLATES))


def _names_in(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise failure(folder, error, "read") from None


def _status(path):
    """The status of what `path` leads to; None where there is nothing of that name."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UsageError(f"{path}: a link that leads nowhere; name a folder") from None
        return None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise failure(path, error, "looked at") from None


def refuse_inside(target: str, source: str) -> None:
    """Raises UsageError where the target is the source, or inside it, or inside a conversion."""
    _refuse_inside_the_source(target, source)
    _refuse_inside_a_conversion(target)


def _refuse_inside_the_source(target, source):
    try:
        origin = os.stat(source)
    except OSError:
        return  # the checks of the source say what is wrong with it
    real = path = resolve(target, strict=False)
    while True:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), origin):
                word = "is the source" if path == real else "is inside the source"
                raise UsageError(f"{target}: {word} {source}; name a folder elsewhere")
        if path == os.path.dirname(path):
            return
        path = os.path.dirname(path)


def _refuse_inside_a_conversion(target):
    """A folder within a layered checkpoint would be a foreign file to its seal."""
    path = resolve(target, strict=False)
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        # A manifest.json alone is a common name that others use too.
        if _holds(path, JOURNAL) or (_holds(path, MANIFEST) and _holds(path, EMBED_FILE)):
            raise UsageError(
                f"{target}: is inside the layered checkpoint {path}; name a folder elsewhere"
            )


def _holds(folder, name):
    with contextlib.suppress(OSError):
        return stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode)
    return False


def _existing_parent(path):
    path = resolve(path, strict=False)
    while _status(path) is None:
        path = os.path.dirname(path)
    return path


def _check_writable(folder):
    if not stat.S_ISDIR(_status(folder).st_mode):
        raise UsageError(f"{folder}: not a folder; the target cannot lie in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: not writable (or read-only); name a folder elsewhere")
