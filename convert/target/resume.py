"""What an earlier run has left: nothing, a beginning that can be gone on with, or all of it.

Looks and compares; changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from convert.sources.files import file_chunks, hash_stream
from convert.sources.open import CheckedSource, open_source
from convert.target.journal import JOURNAL, Journal, read_journal, refuse_another, restore_source
from convert.transform.outputs import Output, WeightFile, config_of
from jlayer.checkpoint.layout import CONFIG, MANIFEST, Manifest
from jlayer.checkpoint.source import names_in, regular_file
from jlayer.errors import CheckpointError, UsageError
from jlayer.strict import is_there, read_small_file, resolve


def journal_of(target: str, present: Sequence[str], *, overwrite: bool) -> Journal | None:
    """The journal of an earlier run, or None where there is none to go on with.

    Raises CheckpointError where it is damaged and may not be overwritten.
    """
    if JOURNAL not in present:
        return None
    try:
        return read_journal(target)
    except CheckpointError:
        if not overwrite:
            raise
        return None


def files_gone(journal: Journal, *folders: str) -> list[str]:
    """The source's files that an earlier run has removed, and that one of these folders lacks."""
    return [
        name
        for name in journal.removed
        if not all(is_there(os.path.join(folder, name)) for folder in folders)
    ]


def open_again(source: str, journal: Journal | None, *, allow_extra: bool) -> CheckedSource:
    """The source by its own doors or, once files of it are gone, as the journal has it."""
    gone = journal is not None and files_gone(journal, source)
    if gone and resolve(source, strict=False) != journal.source["folder"]:
        with contextlib.suppress(CheckpointError):
            return open_source(source, allow_extra=allow_extra)  # another one, and complete
    if gone:
        return restore_source(source, journal)
    return open_source(source, allow_extra=allow_extra)


def goes_on(journal: Journal, source: dict, *, target: str, anew: bool) -> bool:
    """Whether the conversion that the journal is of is that of `source`; False to start anew.

    Raises UsageError or CheckpointError where it is not and may not start anew: never where files
    are gone, since what they held is nowhere but in the target.
    """
    gone = files_gone(journal, source["folder"], journal.source["folder"])
    try:
        refuse_another(journal.source, source, target=target, gone=gone)
    except (UsageError, CheckpointError):
        if gone or not anew:
            raise
        return False
    return True


def was_shed(
    source: str, target: str, present: Sequence[str], *, dtype: str | None, scheme: str | None
) -> bool:
    """Whether a conversion with `delete_source` has come to its end here, source and all.

    Then the source has no weights any more, and the target is of its config.
    """
    names = names_in(source)
    left = [name for name in names if name.endswith((".safetensors", ".bin", ".pth"))]
    if left or MANIFEST not in present or CONFIG not in names:
        return False
    config = read_small_file(regular_file(source, CONFIG).real)
    expected = config_of(config, dtype=dtype, scheme=scheme)
    return expected == read_small_file(regular_file(target, CONFIG).real)


def planned_difference(
    manifest: Manifest, wanted: Manifest, weights: Sequence[WeightFile], sides: Sequence[Output]
) -> str | None:
    """The first thing known before the weights are read in which a finished target is another.

    `wanted`: what the manifest would be, but for its files.
    """
    if manifest.family != wanted.family:
        return f"family {manifest.family}"
    if manifest.quantization != wanted.quantization:
        return f"quantised as {scheme_name(manifest)} there, as {scheme_name(wanted)} here"
    for name in sorted({output.name for output in [*weights, *sides]} ^ manifest.files.keys()):
        return f"{name} is in only one of them"
    for output in weights:
        for tensor, entry in output.tensors.items():
            there = manifest.files[output.name].tensors.get(tensor)
            if there != entry:
                there = there and f"{there.dtype} {list(there.shape)}"
                return f"{tensor} is {there} there, {entry.dtype} {list(entry.shape)} here"
    for output in sides:
        if hash_stream(output.chunks())[1] != manifest.files[output.name].sha256:
            return f"another {output.name}"
    return None


def scheme_name(manifest: Manifest) -> str:
    return manifest.quantization.scheme if manifest.quantization else "published"


def sides_are_whole(target: str, manifest: Manifest) -> bool:
    """Whether the files of a finished target that hold no weights are there as they were made."""
    names = names_in(target)
    sides = {name: entry for name, entry in manifest.files.items() if not entry.tensors}
    return sides.keys() <= names and all(
        hash_stream(file_chunks(regular_file(target, name)))[1] == entry.sha256
        for name, entry in sides.items()
    )
