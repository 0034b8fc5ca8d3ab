"""Removes a model, or one revision of it, from the hub's cache, and nothing outside of it.

A revision's config.json goes first, then blobs that nothing else uses, then its links and the names
that lead to it. So a removal that is cut off leaves a model as it was, or one that is seen to be
incomplete and can be removed again. No link is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from jlayer.checkpoint import sharing
from jlayer.checkpoint.cache import (
    BLOBS,
    MODELS,
    REFS,
    SNAPSHOTS,
    Repository,
    Revision,
    folder_name,
    held_back,
    repositories,
    repository,
)
from jlayer.checkpoint.layout import CONFIG
from jlayer.checkpoint.users import user_of
from jlayer.config import closest
from jlayer.errors import CheckpointError, LockedError, StorageError, UsageError
from jlayer.strict import resolve

# Beside the snapshots the library keeps by commit what is not on the hub, and lists of files.
_BY_COMMIT = (".no_exist", "trees")
_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@\s]+))?", re.ASCII)
_SHORTEST = 4  # characters of a commit that name it, where no other begins so


@dataclass(frozen=True)
class Removal:
    """What is to be removed. `whole`: the model's folder with all that is in it; else `revisions`
    alone. `blobs`: those of the model that nothing else of it uses, `shared`: what some of them
    lead to in the store that all models share, and no other one uses. `freed_bytes`: of both, each
    counted once; `kept_bytes`: of what others use as well."""

    cache: str
    repository: Repository
    revisions: tuple[Revision, ...]
    whole: bool
    blobs: tuple[str, ...]
    shared: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int

    @property
    def name(self) -> str:
        if self.whole:
            return self.repository.name
        return self.repository.name_of(self.revisions[0])


def find_removal(cache: str, what: str) -> Removal:
    """What `what` means in a cache: `owner/name[@revision]`, or a folder of the cache.

    Raises UsageError (no such name, or a folder outside the cache), CheckpointError (not there) or
    StorageError.
    """
    cache = resolve(cache, strict=False)
    found, revision = _named(cache, what)
    _refuse_links(found, revision)
    if found.problem is not None:
        raise StorageError(found.problem)
    revisions = found.revisions if revision is None else (_revision(found, revision),)
    try:
        return _sized(cache, found, revisions)
    except OSError as error:
        raise StorageError(f"{found.folder}: cannot be read ({error.strerror})") from None


def check_unused(removal: Removal) -> None:
    """Raises LockedError where a process fetches the model or reads what is to be removed."""
    with held_back(removal.cache, removal.repository.folder) as is_free:
        _refuse_used(removal, is_free)


def remove(removal: Removal) -> None:
    """Removes it. Raises LockedError, or StorageError where something cannot be removed."""
    with held_back(removal.cache, removal.repository.folder) as is_free:
        _refuse_used(removal, is_free)
        try:
            _remove(removal)
        except OSError as error:
            raise StorageError(
                f"{error.filename}: cannot be removed ({error.strerror}), and what else was to be "
                f"removed of {removal.name} stays; mend that, and the same command goes on"
            ) from None


def _remove(removal):
    folder = removal.repository.folder
    for revision in removal.revisions:
        if os.path.realpath(revision.folder) == revision.folder:
            _unlink(os.path.join(revision.folder, CONFIG))
    for path in removal.shared:
        sharing.release(removal.cache, path, removal.blobs)
    for path in removal.blobs:
        _unlink(path)
    if removal.whole:
        _remove_tree(folder)
        return
    for revision in removal.revisions:
        _remove_tree(revision.folder)
        for kept in _BY_COMMIT:
            for name in (revision.commit, f"{revision.commit}.json"):
                _remove_tree(os.path.join(folder, kept, name))
        for ref in reversed(revision.refs):  # the one that it is listed by last
            _unlink(os.path.join(folder, REFS, ref))


def _named(cache, what) -> tuple[Repository, str | None]:
    """The model that `what` names, and the revision where it names one."""
    if not what:
        raise UsageError("ID: found an empty name, expected owner/name[@revision]")
    if os.path.lexists(what) or os.path.isabs(what) or what.startswith("."):
        return _at(cache, what)
    match = _NAME.fullmatch(what)
    if match is None:
        raise UsageError(f"{what!a}: no hub id; expected owner/name or owner/name@revision")
    name = folder_name(match["repo"])
    if not os.path.lexists(os.path.join(cache, name)):
        known = [one.name for one in repositories(cache)]
        raise CheckpointError(
            f"{match['repo']}: not in the cache, {cache}{closest(match['repo'], known)}; "
            "jlayer list shows what is there"
        )
    return repository(cache, name), match["revision"]


def _at(cache, path):
    """The model of the cache, and the revision, whose folder `path` is."""
    parent, name = os.path.split(path.rstrip(os.sep))
    parent, real = resolve(parent, strict=False), resolve(path, strict=False)
    home = os.path.dirname(parent)
    if name in ("", ".", ".."):
        parent = home = ""  # a name by way of others, which may be a slip
    if parent == cache and name.startswith(MODELS):
        return repository(cache, name), None
    if os.path.basename(parent) == SNAPSHOTS and os.path.dirname(home) == cache:
        return repository(cache, os.path.basename(home)), name
    if os.path.commonpath([cache, real]) == real:
        raise UsageError(f"{path}: the whole cache is there; name one model of it")
    if os.path.commonpath([cache, real]) == cache:
        raise UsageError(
            f"{path}: not the folder of a model in the cache; jlayer list shows those that are"
        )
    also = f", or the hub's {path} from another folder" if _NAME.fullmatch(path) else ""
    raise UsageError(
        f"{path}: outside the hub's cache, {cache}, and nothing else is removed; remove a folder "
        f"of your own yourself (rm -r){also}"
    )


def _refuse_links(found, revision):
    """Raises UsageError where what is to be removed lies outside the cache, behind a link; for a
    model as a whole links inside of it do not matter, which are removed themselves."""
    folder = found.folder
    parts = [folder]
    if revision is not None:
        parts += [os.path.join(folder, part) for part in (SNAPSHOTS, BLOBS, REFS, *_BY_COMMIT)]
    for path in parts:
        if os.path.islink(path):
            raise UsageError(
                f"{path}: a link to {os.path.realpath(path)}, and nothing outside the cache is "
                "removed; remove that folder and the link yourself"
            )
    if not os.path.lexists(folder):
        raise CheckpointError(f"{folder}: not there; jlayer list shows what is")
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: not a model's folder; remove the file yourself (rm)")


def _revision(found, wanted):
    """The revision of this name, commit, or beginning of a commit."""
    named = [one for one in found.revisions if wanted in (one.commit, *one.refs)]
    begun = [one for one in found.revisions if one.commit.startswith(wanted)]
    if not named and len(wanted) >= _SHORTEST and len(begun) == 1:
        named = begun
    if not named:
        names = [(*one.refs, one.commit)[0] for one in found.revisions]
        has = f"; there {'are' if len(names) > 1 else 'is'} {', '.join(names)}" if names else ""
        raise CheckpointError(f"{found.name}: no revision {wanted!a} in the cache{has}")
    return named[0]


def _sized(cache, found, revisions):
    """The Removal with its bytes. Raises OSError."""
    folder = found.folder
    whole = len(revisions) == len(found.revisions)
    others = [one for one in found.revisions if one not in revisions]
    used = {blob for one in others for blob in _blobs_of(folder, one)}
    blobs = tuple(path for path in _entries(os.path.join(folder, BLOBS)) if path not in used)
    shared, kept = sharing.unused_with(cache, blobs)
    places = [folder] if whole else [one.folder for one in revisions]
    links, sizes = {}, {}
    for path in {*blobs, *shared, *(path for place in places for path in _files(place))}:
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            key = status.st_dev, status.st_ino
            links[key] = links.get(key, 0) + 1
            sizes[key] = status.st_size if links[key] == status.st_nlink else 0
    mine = {blob for one in revisions for blob in _blobs_of(folder, one)}
    kept_bytes = sum(os.path.getsize(path) for path in mine & used if os.path.exists(path))
    return Removal(
        cache=cache,
        repository=found,
        revisions=tuple(revisions),
        whole=whole,
        blobs=blobs,
        shared=shared,
        freed_bytes=sum(sizes.values()),
        kept_bytes=kept_bytes + sum(map(os.path.getsize, kept)),
    )


def _blobs_of(folder, revision) -> Iterator[str]:
    """The blobs of a model that links of a revision lead to, whether they are there or not."""
    for path in _files(revision.folder):
        if os.path.islink(path):
            blob = os.path.abspath(os.path.join(os.path.dirname(path), os.readlink(path)))
            if os.path.dirname(blob) == os.path.join(folder, BLOBS):
                yield blob


def _files(folder) -> Iterator[str]:
    """Every file and link below a folder; links to folders are not followed."""
    if os.path.islink(folder):
        return
    for where, folders, names in os.walk(folder):
        links = (name for name in folders if os.path.islink(os.path.join(where, name)))
        for name in (*names, *links):
            yield os.path.join(where, name)


def _entries(folder):
    if os.path.islink(folder) or not os.path.isdir(folder):
        return []
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def _refuse_used(removal, is_free):
    name = removal.name
    if not is_free:
        raise LockedError(
            f"{name}: another process is fetching it; wait for it, or stop it, and run the same "
            "command again"
        )
    paths = {os.path.realpath(path) for path in (*removal.blobs, *removal.shared)}
    folders = [removal.repository.folder] if removal.whole else []
    folders += [one.folder for one in removal.revisions]
    used = user_of(paths, folders)
    if used is not None:
        pid, path = used
        raise LockedError(
            f"{name}: process {pid} has {path} open; end it, or wait for it, and run the same "
            "command again"
        )


def _unlink(path):
    """Removes a file or link; a folder where no folder belongs too."""
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except IsADirectoryError:
        shutil.rmtree(path)


def _remove_tree(path):
    """Removes a folder with all that is in it, or a link; follows none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
