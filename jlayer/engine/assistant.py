"""transformers' `assistant_model`, which is the draft model here. That of a call takes the place of
the one that the model was opened with, if any, for the calls that name it: both share the device's
memory with the model."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jlayer.checkpoint.hub import local_folder
from jlayer.errors import UsageError

NAME = "assistant_model"
NO_OTHER_DRAFT = (
    f"{NAME}: {{folder}} cannot guess while other texts are generated, or where several processes "
    "run the model; wait until they have ended, or open the model with draft={folder!r}"
)


def folder_of(assistant) -> str:
    """The folder or hub id of an assistant: a path, a model of jlayer's, or one of transformers',
    which is not used itself. Raises UsageError."""
    for found in (
        assistant,
        getattr(assistant, "folder", None),
        getattr(assistant, "name_or_path", None),
    ):
        if isinstance(found, str | os.PathLike) and os.fspath(found):
            return os.fspath(found)
    found = type(assistant).__name__
    raise UsageError(f"{NAME}: found {found}, expected a folder, a hub id or a model of one")


def as_draft(options: Mapping, run: Mapping) -> tuple[dict, dict]:
    """(options, options of opening a model) with an assistant as the draft. Raises UsageError."""
    rest = {name: value for name, value in options.items() if name != NAME}
    if options.get(NAME) is None:
        return rest, dict(run)
    folder = folder_of(options[NAME])
    if run.get("draft") is not None:
        raise UsageError(f"{NAME}: found {folder}, but draft is {run['draft']}; keep one")
    return rest, {**run, "draft": folder}


def of_call(options: Mapping) -> tuple[dict, str | None]:
    """(the options without an assistant, its folder on this machine). Raises UsageError, also where
    it could guess nothing, and CheckpointError where there is no such folder."""
    rest = {name: value for name, value in options.items() if name != NAME}
    if options.get(NAME) is None:
        return rest, None
    folder = folder_of(options[NAME])
    local = local_folder(folder, offline=True, option=NAME)
    if (options.get("num_beams") or 1) > 1:
        raise UsageError(
            f"{NAME}: found {folder} with num_beams {options['num_beams']}, whose beams take the "
            "place of guesses; leave one of them out"
        )
    if options.get("speculate") in ("off", "lookup"):
        raise UsageError(
            f"{NAME}: found {folder}, but speculate is {options['speculate']!r}, which uses no "
            "draft model; leave one of them out"
        )
    return rest, local


def is_same_folder(one: str | None, other: str | None) -> bool:
    """Whether both lead to one folder, or are None."""
    if one is None or other is None:
        return one is other
    return os.path.realpath(one) == os.path.realpath(other)
