"""What an interrupted or finished run has left in the target, and whether it can be resumed.

Reads and compares; changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence

from jlayer.checkpoint.layout import CONFIG, MANIFEST, Manifest, is_side_file
from jlayer.checkpoint.sides import with_templates
from jlayer.checkpoint.source import names_in, regular_file
from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import Source, file_chunks, hash_stream
from jlayer.convert.sources.open import CheckedSource, open_source
from jlayer.convert.target.journal import (
    JOURNAL,
    FinishedFile,
    Journal,
    check_same_conversion,
    read_journal,
    restore_source,
)
from jlayer.convert.target.measured import MEASURED
from jlayer.convert.transform.outputs import Output, WeightFile, config_of, files_of
from jlayer.errors import CheckpointError, UsageError
from jlayer.strict import is_there, read_small_file, resolve


def is_begun(target: str) -> bool:
    """Whether the target has the journal of an unfinished conversion, or what was measured for it.
    (One that stops before it has finished a file takes its journal away.)"""
    return any(os.path.exists(os.path.join(target, name)) for name in (JOURNAL, MEASURED))


def journal_to_resume(target: str, names: Sequence[str], *, overwrite: bool) -> Journal | None:
    """The journal of an interrupted run; None where there is none.

    `names`: the files in the target. Raises CheckpointError where the journal is damaged and must
    not be overwritten.
    """
    if JOURNAL not in names:
        return None
    try:
        return read_journal(target)
    except CheckpointError:
        if not overwrite:
            raise
        return None


def reopen_source(source: str, journal: Journal | None, *, allow_extra: bool) -> CheckedSource:
    """Opens and checks the source; where files of it were removed, as the journal describes it."""
    removed = journal is not None and _removed_files(journal, source)
    if removed and resolve(source, strict=False) != journal.source["folder"]:
        with contextlib.suppress(CheckpointError):
            return open_source(source, allow_extra=allow_extra)  # another folder, and complete
    if removed:
        return restore_source(source, journal)
    return open_source(source, allow_extra=allow_extra)


def _removed_files(journal: Journal, *folders: str) -> list[str]:
    """The source files that an interrupted run has removed and that any of the folders lacks."""
    return [
        name
        for name in journal.removed
        if not all(is_there(os.path.join(folder, name)) for folder in folders)
    ]


def may_resume(journal: Journal, source: dict, *, target: str, overwrite: bool) -> bool:
    """Whether the journal is of the conversion that `source` describes; False to start again.

    Raises UsageError or CheckpointError where it is of another one and a new start is not allowed:
    without `overwrite`, and always where source files were removed, whose weights only the target
    has.
    """
    removed = _removed_files(journal, source["folder"], journal.source["folder"])
    try:
        check_same_conversion(journal.source, source, target=target, removed=removed)
    except (UsageError, CheckpointError):
        if removed or not overwrite:
            raise
        return False
    return True


def source_was_deleted(
    source: str, target: str, names: Sequence[str], *, dtype: str | None, scheme: str | None
) -> bool:
    """Whether a conversion with `delete_source` has finished here: the source has no weights any
    more, and the target, which holds the files `names`, has the source's config."""
    in_source = names_in(source)
    weights = [name for name in in_source if name.endswith((".safetensors", ".bin", ".pth"))]
    if weights or MANIFEST not in names or CONFIG not in in_source:
        return False
    config = read_small_file(regular_file(source, CONFIG).real)
    there = read_small_file(regular_file(target, CONFIG).real)
    return any(
        config_of(config, dtype=dtype, scheme=scheme, is_tied=is_tied) == there
        for is_tied in (True, False)
    )


def intact_files(
    target: str,
    outputs: Sequence[WeightFile],
    finished: Mapping[str, FinishedFile],
    progress: Progress,
) -> dict[str, FinishedFile]:
    """The finished files, of these outputs, whose bytes on disk have the SHA-256 that was noted."""
    progress.start(sum(output.n_bytes for output in outputs))
    intact = {}
    for output in outputs:
        progress.file(output.name)
        if sha256_on_disk(target, output, progress) == finished[output.name].sha256:
            intact[output.name] = finished[output.name]
        else:
            progress.note(f"{target}: {output.name} is damaged; writing it again")
    return intact


def sha256_on_disk(target: str, output: WeightFile, progress: Progress) -> str | None:
    """The SHA-256 of a file as it is on disk; None where not even its size is right."""
    file = regular_file(target, output.name)
    if file.n_bytes != output.n_bytes:
        return None
    return hash_stream(file_chunks(file), lambda chunk: progress.advance(len(chunk)))[1]


def require_sources(target: str, outputs: Iterable[WeightFile], source: Source) -> None:
    """Raises CheckpointError where a file that has to be written again is made from a source file
    that was removed."""
    for output in outputs:
        for file in files_of(source, output):
            if not is_there(file.real):
                raise CheckpointError(
                    f"{os.path.join(target, output.name)}: missing or damaged, and {file.path}, "
                    "which it is made of, was removed by --delete-source; fetch that model again "
                    "and convert it with --overwrite"
                )


def first_difference(
    manifest: Manifest, wanted: Manifest, weights: Sequence[WeightFile], sides: Sequence[Output]
) -> str | None:
    """The first thing in which a finished target is not what would be written, as far as can be
    told without reading the weights; None where there is none.

    `wanted`: the manifest that would be written, without its files.
    """
    if manifest.family != wanted.family:
        return f"family {manifest.family}"
    if manifest.quantization != wanted.quantization:
        return f"quantized as {_scheme_of(manifest)} there, as {_scheme_of(wanted)} here"
    if manifest.host != wanted.host:
        there, here = (each.host or "of all hosts" for each in (manifest, wanted))
        return f"rows {there} there, {here} here"
    for name in sorted({output.name for output in [*weights, *sides]} ^ manifest.files.keys()):
        return f"{name} is in only one of them{_seal_advice(name)}"
    for output in weights:
        for tensor, entry in output.tensors.items():
            there = manifest.files[output.name].tensors.get(tensor)
            if there != entry:
                there = there and f"{there.dtype} {list(there.shape)}"
                return f"{tensor} is {there} there, {entry.dtype} {list(entry.shape)} here"
    for output in sides:
        if hash_stream(output.chunks())[1] != manifest.files[output.name].sha256:
            return f"another {output.name}{_seal_advice(output.name)}"
    return None


def _seal_advice(name):
    """Side files need no conversion, unless the config is another."""
    is_mendable = is_side_file(name) and name != CONFIG
    return ", which may be copied there and taken in by jlayer seal" if is_mendable else ""


def _scheme_of(manifest):
    return manifest.quantization.scheme if manifest.quantization else "published"


def side_files_intact(target: str, manifest: Manifest) -> bool:
    """Whether the files of a finished target that hold no weights are there, unchanged."""
    names = with_templates(target, names_in(target))
    sides = {name: entry for name, entry in manifest.files.items() if not entry.tensors}
    return sides.keys() <= names and all(
        hash_stream(file_chunks(regular_file(target, name)))[1] == entry.sha256
        for name, entry in sides.items()
    )
