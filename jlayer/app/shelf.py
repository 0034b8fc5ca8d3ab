"""Where models are looked for: in a hub's cache, and in folders, which are models or hold some.

Names what is there; what it is, `models` finds out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jlayer.app.forms import holds_ours, holds_weights
from jlayer.checkpoint import cache as hub_cache
from jlayer.checkpoint.cache import Repository, Revision
from jlayer.checkpoint.layout import CONFIG
from jlayer.checkpoint.source import names_in
from jlayer.errors import JlayerError
from jlayer.gguf.parts import is_gguf, models_in
from jlayer.strict import read_json_object

HUB, FOLDER = "hub", "folder"
SHORT = 12  # characters of a commit that are shown


@dataclass(frozen=True)
class Entry:
    """A model, or what is left of one. `name`: what a user writes to mean it. `repository`,
    `revision`: in a hub's cache. `problem`: why there is nothing to look at in `folder`."""

    name: str
    folder: str
    where: str
    repository: Repository | None = None
    revision: Revision | None = None
    problem: str | None = None

    @property
    def shown(self) -> str:
        """The name, with a commit in short."""
        commit = self.revision and self.revision.commit
        return self.name.replace(commit, commit[:SHORT]) if commit else self.name


def hub_entries(cache: str) -> Iterator[Entry]:
    """Each revision of each model in the hub's cache. Raises StorageError."""
    for repository in hub_cache.repositories(cache):
        if not repository.revisions:
            problem = repository.problem or f"{repository.folder}: nothing was fetched to its end"
            yield Entry(
                repository.name, repository.folder, HUB, repository=repository, problem=problem
            )
        for revision in repository.revisions:
            problem = None
            if not os.path.lexists(revision.folder):
                problem = f"{revision.folder}: no files of this revision are there"
            yield Entry(
                repository.name_of(revision),
                revision.folder,
                HUB,
                repository=repository,
                revision=revision,
                problem=problem,
            )


def folder_entries(folder: str) -> Iterator[Entry]:
    """The model that a folder is, else those in it: in folders, or in another hub's cache."""
    if is_gguf(folder):
        yield Entry(folder, folder, FOLDER)
        return
    try:
        names = names_in(folder)
        files = [] if holds_ours(folder, names) else models_in(names)
        is_one = not files and (CONFIG in names or holds_weights(folder, names))
    except JlayerError as error:
        yield Entry(folder, folder, FOLDER, problem=error.command_line)
        return
    if is_one:
        yield Entry(folder, folder, FOLDER)
    if holds_ours(folder, names):
        return
    if any(name.startswith(hub_cache.MODELS) for name in names):
        for entry in hub_entries(folder):  # an id means the model in the hub's own cache
            yield replace(entry, name=entry.folder, where=FOLDER)
    for name in sorted(names):
        if name in files:
            yield Entry(os.path.join(folder, name), os.path.join(folder, name), FOLDER)
        elif not name.startswith((".", hub_cache.MODELS)):
            yield from _inside(os.path.join(folder, name))


def _inside(path):
    """An entry for a folder in a given one, if it is a model's or cannot be read."""
    if os.path.islink(path) and not os.path.exists(path):
        yield Entry(path, path, FOLDER, problem=f"{path}: a link to what is not there")
    if not os.path.isdir(path):
        return
    try:
        names = names_in(path)
        if holds_weights(path, names) or (CONFIG in names and _describes_a_model(path)):
            yield Entry(path, path, FOLDER)
    except JlayerError as error:
        yield Entry(path, path, FOLDER, problem=error.command_line)


def _describes_a_model(folder):
    """Whether a config.json, which other programs have as well, is a model's."""
    raw = read_json_object(os.path.join(folder, CONFIG))
    return bool(raw.get("model_type") or raw.get("architectures"))
