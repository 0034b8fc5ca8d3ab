"""The small files beside the weights: which a folder has, and whether they are what its manifest
says.

They may be mended by hand, so they are checked apart from the weights, and `jlayer seal` takes a
changed one into the manifest. What they mean is left to their readers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from jlayer.checkpoint.layout import (
    CONFIG,
    MANIFEST,
    TEMPLATES,
    FileEntry,
    Manifest,
    is_document,
    is_side_file,
)
from jlayer.errors import CheckpointError, StorageError
from jlayer.strict import is_there, open_regular

SEAL_ADVICE = "if that is meant, run: jlayer seal {folder}"


def with_templates(folder: str | os.PathLike, names: Iterable[str]) -> frozenset[str]:
    """The names of a folder, with those in its folder of templates in place of that folder's own.

    Raises CheckpointError for a template whose name cannot be kept, or StorageError.
    """
    names = frozenset(names)
    home = os.path.join(folder, TEMPLATES)
    if TEMPLATES not in names or not os.path.isdir(home):
        return names
    try:
        inside = {f"{TEMPLATES}/{name}" for name in os.listdir(home)}
    except OSError as error:
        raise StorageError(f"{home}: cannot be read ({error.strerror})") from None
    for name in inside:
        if name.endswith(".jinja") and not is_side_file(name):
            raise CheckpointError(
                f"{os.fspath(folder)}: the name of the template {name!a} cannot be kept; rename it"
            )
    return names - {TEMPLATES} | inside


def side_names(folder: str | os.PathLike, names: Iterable[str]) -> list[str]:
    """The side files of a folder that holds `names`, in the order of their names."""
    return sorted(name for name in with_templates(folder, names) if is_side_file(name))


@dataclass(frozen=True)
class SideChanges:
    """How the side files of a folder differ from its manifest: what each is now, or is no more."""

    changed: dict[str, FileEntry]
    added: dict[str, FileEntry]
    removed: tuple[str, ...]


def side_changes(folder: str, manifest: Manifest, names: Iterable[str]) -> SideChanges:
    """Compares all side files; `names`: the files in the folder. Raises CheckpointError for one
    that is no regular file, or StorageError."""
    then = {name: entry for name, entry in manifest.files.items() if is_side_file(name)}
    now = {name: entry_of(os.path.join(folder, name)) for name in side_names(folder, names)}
    return SideChanges(
        changed={name: now[name] for name in now if name in then and now[name] != then[name]},
        added={name: entry for name, entry in now.items() if name not in then},
        removed=tuple(sorted(then.keys() - now.keys())),
    )


def is_side_changed(folder: str, name: str, manifest: Manifest) -> bool:
    """Whether a side file is another one than the manifest says. Raises what `entry_of` does."""
    return entry_of(os.path.join(folder, name)) != manifest.files.get(name)


def check_side_files(folder: str, manifest: Manifest) -> tuple[str, ...]:
    """Holds what a run reads beside the weights against the manifest; it is small.

    Returns notes on files that the manifest does not know. Raises CheckpointError where one was
    changed or is missing, or StorageError.
    """
    advice = SEAL_ADVICE.format(folder=folder)
    for name, listed in manifest.files.items():
        if listed.tensors or is_document(name):
            continue
        path = os.path.join(folder, name)
        if not is_there(path, follow=False):
            rest = "" if name == CONFIG else f"; {advice}"
            raise CheckpointError(f"{path}: missing, and {MANIFEST} has it; put it back{rest}")
        found = entry_of(path)
        if found != listed:
            raise CheckpointError(
                f"{path}: changed since it was converted or sealed (SHA-256 {found.sha256}, "
                f"expected {listed.sha256}); put back what was there; {advice}"
            )
    try:
        names = side_names(folder, os.listdir(folder))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None
    return tuple(
        f"{os.path.join(folder, name)}: added since the folder was converted; used as it is; "
        f"{advice}"
        for name in names
        if name not in manifest.files and not is_document(name)
    )


def entry_of(path: str) -> FileEntry:
    """What a manifest says of the side file at `path`. Raises what `open_regular` raises."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(file.tell(), digest, {}, {})
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
