"""transformers' `assistant_model`, which is the draft model here. It is opened together with the
model, since both share the device's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jlayer.checkpoint.hub import local_folder
from jlayer.errors import UsageError

NAME = "assistant_model"


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


def without_assistant(options: Mapping, draft: str | None) -> dict:
    """The options without an assistant, which must be the `draft` that a model was opened with.
    Raises UsageError."""
    rest = {name: value for name, value in options.items() if name != NAME}
    if options.get(NAME) is None:
        return rest
    folder = folder_of(options[NAME])
    if draft is None:
        found = f"{NAME}: found {folder}, but the model was opened without a draft"
        raise UsageError(f"{found}; open it with draft={folder!r}")
    local = local_folder(folder, offline=True, option=NAME)
    if os.path.realpath(local) != os.path.realpath(draft):
        raise UsageError(
            f"{NAME}: found {folder}, but the model was opened with draft {draft}; open it with "
            f"draft={folder!r}, or leave this out"
        )
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
    return rest
