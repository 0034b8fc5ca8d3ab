"""The hub's cache as it lies on disk: its models, their revisions, and what is being fetched.

Asks nothing of the hub, whose library only says where the cache is. What the folders hold is for
others to find out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jlayer.errors import CheckpointError, StorageError
from jlayer.strict import close, is_relative_path, read_small_file

MODELS = "models--"
BLOBS, SNAPSHOTS, REFS, LOCKS = "blobs", "snapshots", "refs", ".locks"
MAIN = "main"
INCOMPLETE = ".incomplete"
_PARTS = "--"  # stands for "/" in the name of a model's folder
_LONGEST_REF = 200  # bytes of a file that names a commit
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Revision:
    """A commit of a model in the cache, and the names (branches, tags) that lead to it.

    `folder`: of its files; it is missing where a removal or a download was cut off.
    """

    commit: str
    folder: str
    refs: tuple[str, ...]


@dataclass(frozen=True)
class Repository:
    """A model in the cache. `problem`: why its folder cannot be read; it has no revisions then."""

    folder: str
    repo: str
    revisions: tuple[Revision, ...]
    problem: str | None = None

    @property
    def name(self) -> str:
        """What a user writes to mean it: a hub id, or its folder where that is none."""
        return self.repo if _ID.fullmatch(self.repo) else self.folder

    def name_of(self, revision: Revision) -> str:
        """What a user writes to mean this revision."""
        if self.name == self.folder:
            return revision.folder
        if MAIN in revision.refs:
            return self.repo
        return f"{self.repo}@{(*revision.refs, revision.commit)[0]}"


def cache_folder() -> str:
    """Where the hub's library keeps what it fetches: HF_HUB_CACHE, else in HF_HOME."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE or os.curdir


def repositories(cache: str) -> list[Repository]:
    """The models in a cache, by the names of their folders; none where there is no cache.

    Raises StorageError where the folder of the cache cannot be read.
    """
    try:
        names = sorted(os.listdir(cache))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{cache}: cannot be read ({error.strerror})") from None
    return [repository(cache, name) for name in names if name.startswith(MODELS)]


def repository(cache: str, name: str) -> Repository:
    """The model in the folder `name` of a cache."""
    folder = os.path.join(cache, name)
    repo = name.removeprefix(MODELS).replace(_PARTS, "/")
    try:
        commits = _names_in(os.path.join(folder, SNAPSHOTS))
        refs = dict(_refs(os.path.join(folder, REFS)))
        if not os.path.isdir(folder):
            os.listdir(folder)  # raises what is wrong with it
    except OSError as error:
        return Repository(folder, repo, (), f"{folder}: cannot be read ({error.strerror})")
    revisions = []
    for commit in sorted({*commits, *refs.values()}):
        leading = sorted((ref for ref, to in refs.items() if to == commit), key=_main_first)
        path = os.path.join(folder, SNAPSHOTS, commit)
        revisions.append(Revision(commit, path, tuple(leading)))
    order = {ref: at for at, ref in enumerate(sorted(refs, key=_main_first))}
    revisions.sort(key=lambda one: (order[one.refs[0]] if one.refs else len(order), one.commit))
    return Repository(folder, repo, tuple(revisions))


def folder_name(repo: str) -> str:
    """The name of a model's folder in a cache."""
    return MODELS + repo.replace("/", _PARTS)


def is_being_fetched(cache: str, repo_folder: str) -> bool:
    """Whether a process holds one of the locks under which files of a model are fetched."""
    for path in lock_files(cache, repo_folder):
        fd = _locked(path, fcntl.LOCK_SH)
        if fd is None:
            return True
        close(fd)
    return False


@contextlib.contextmanager
def held_back(cache: str, repo_folder: str) -> Iterator[bool]:
    """Takes the locks of a model, so that nobody fetches the files that they are for meanwhile.
    Yields False, and holds none, where another process has one."""
    fds: list[int] = []
    try:
        for path in lock_files(cache, repo_folder):
            fd = _locked(path, fcntl.LOCK_EX)
            if fd is None:
                break
            fds.append(fd)
        else:
            yield True
            return
        while fds:
            close(fds.pop())
        yield False
    finally:
        for fd in fds:
            close(fd)


def lock_files(cache: str, repo_folder: str) -> list[str]:
    """The files by which the library locks the blobs of a model: one a blob, which stay."""
    folder = os.path.join(cache, LOCKS, os.path.basename(repo_folder))
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(folder))
        return [os.path.join(folder, name) for name in names if name.endswith(".lock")]
    return []


def partial_files(repo_folder: str) -> list[str]:
    """What interrupted downloads left of files, or what one is writing."""
    folder = os.path.join(repo_folder, BLOBS)
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(folder))
        return [os.path.join(folder, name) for name in names if name.endswith(INCOMPLETE)]
    return []


def _locked(path, kind):
    """A descriptor that holds a lock on the file; None where another process holds one. -1 where
    the system cannot lock or open it, which says nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        close(fd)
        return None
    except OSError:  # a file system without such locks
        pass
    return fd


def _names_in(folder):
    """The names in a folder; none where it is not there. Raises OSError."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def _refs(folder):
    """(name, commit) of each ref that names a commit; what else lies there is none."""
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            with contextlib.suppress(CheckpointError, StorageError, UnicodeDecodeError):
                commit = read_small_file(path, limit=_LONGEST_REF).decode("ascii").strip()
                if is_relative_path(commit) and "/" not in commit:
                    yield os.path.relpath(path, folder), commit


def _main_first(ref):
    return ref != MAIN, ref.startswith("refs/"), ref
