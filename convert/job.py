"""One conversion from the first check to the manifest: lock, checks, space, files, in this order.

The public call, its options and its summary. `target.layered` writes the files.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jlayer.checkpoint.layout import CONFIG, is_layered, read_manifest
from jlayer.checkpoint.links import links_followed, links_note
from jlayer.checkpoint.quantization import (
    Quantization,
    block_matrices,
    quantization_of,
)
from jlayer.checkpoint.rows import FEWEST_HOSTS, Host, check_host
from jlayer.config import own_quantization, parse_choice, read_config
from jlayer.convert import RESUME
from jlayer.convert.progress import Progress
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.target.journal import Journal, quantization_to_resume
from jlayer.convert.target.layered import LayeredTarget, Options
from jlayer.convert.target.lock import TargetLock
from jlayer.convert.target.resume import (
    is_begun,
    journal_to_resume,
    reopen_source,
    source_was_deleted,
)
from jlayer.convert.target.write import check_target, remove_temporaries
from jlayer.convert.transform.merged import merged
from jlayer.convert.transform.pruned import Pruning, pruned
from jlayer.convert.transform.quantize import Quantizer, sample_errors
from jlayer.convert.verify import verify_folder
from jlayer.durable import LOCK
from jlayer.encodings.int4 import INT4
from jlayer.encodings.registry import SCHEMES
from jlayer.errors import (
    CheckpointError,
    DoesNotFitError,
    StorageError,
    UnsupportedModelError,
    UsageError,
)
from jlayer.families.layout import FROM_GGUF
from jlayer.families.registry import published_tensors
from jlayer.gguf.parts import is_gguf, model_at
from jlayer.spec import ITEM_BYTES
from jlayer.strict import read_json_object


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    `status`: "converted", or "unchanged" where the target was complete already.
    `dtypes`: the number of tensors of each dtype in the target.
    `nonfinite`: by tensor, how many NaN and infinite numbers were kept.
    `n_resumed`: the number of weight files that an interrupted run had finished.
    `removed`: the source files that `delete_source` removed.
    `quantization`: as in the manifest. `block_bits`: mean bits a weight over the layers' matrices.
    `rows`: the host whose rows alone the target has, as in the manifest; None: it has all.
    """

    source: str
    target: str
    status: str
    fingerprint: str
    n_layers: int
    n_files: int
    n_tensors: int
    dtypes: dict[str, int]
    source_bytes: int
    target_bytes: int
    elapsed_s: float
    nonfinite: dict[str, int]
    notes: tuple[str, ...]
    n_resumed: int = 0
    removed: tuple[str, ...] = ()
    quantization: dict | None = None
    block_bits: float | None = None
    rows: dict | None = None


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    delete_source: bool = False,
    allow_extra: bool = False,
    allow_nonfinite: bool = False,
    follow_links: bool = False,
    rows: tuple[int, int] | None = None,
    merge: str | os.PathLike | None = None,
    prune: Pruning | None = None,
    advise: Callable[[CheckedSource], Iterable[str]] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Converts the published checkpoint in `source` to a layered one in `target`.

    Without `dtype` every tensor keeps its dtype and its bytes. `quantize` ("int8" or "int4")
    quantizes the matrices and leaves the rest as it would be without. `delete_source` removes each
    weight file of the source as soon as nothing needs it. `follow_links` takes what links in the
    source, or in the folder of `merge`, lead to outside of it, and names them in a note. `rows`
    (host, hosts): keeps only the rows that the host of this number, from 0, reads where so many
    hosts run the model together.
    `merge`: a folder with an adapter as PEFT saves it, which is merged into the matrices before
    anything else is done with them.
    `prune`: the layers that are left out; the others get new numbers.
    `advise` is shown the source once it is checked, and returns further notes for the user.

    An interrupted conversion is resumed by the same call: the target then holds finished files and
    a journal, but no manifest. Raises the errors of jlayer.errors.
    """
    started = time.monotonic()
    source, target, progress = model_at(source), os.fspath(target), progress or Progress()
    if dtype is not None:
        parse_choice(dtype, tuple(ITEM_BYTES), option="dtype")
    if quantize is not None:
        parse_choice(quantize, tuple(SCHEMES), option="quantize")
    if not source or not target:
        raise UsageError("source and target: found an empty path, expected two folders")
    if delete_source and allow_extra:
        found = "the tensors that are left out would be lost with the source; choose one of them"
        raise UsageError(
            f"delete_source and allow_extra: {found}",
            command_line=f"--delete-source and --allow-extra: {found}",
        )
    if delete_source and is_gguf(source):
        raise UsageError(
            f"delete_source: {source} is a GGUF file, which is needed until the end; remove it "
            "yourself once it is converted",
            command_line=f"--delete-source: {source} is a GGUF file, which is needed until the "
            "end; remove it yourself once it is converted",
        )
    if delete_source and follow_links:
        found = "files outside the source would be removed; choose one of them"
        raise UsageError(
            f"delete_source and follow_links: {found}",
            command_line=f"--delete-source and --follow-links: {found}",
        )
    if delete_source and merge is not None:
        found = "the model without the adapter would be lost; choose one of them"
        raise UsageError(
            f"delete_source and merge: {found}",
            command_line=f"--delete-source and --merge: {found}",
        )
    if delete_source and prune is not None:
        found = "the layers that are left out would be lost with the source; choose one of them"
        raise UsageError(f"delete_source and prune: {found}")
    host = _host(rows)
    if delete_source and host:
        found = "the rows of the other hosts would be lost with the source; choose one of them"
        raise UsageError(
            f"delete_source and rows: {found}",
            command_line=f"--delete-source and --rows: {found}",
        )
    options = Options(
        dtype, quantize, overwrite, delete_source, allow_extra, allow_nonfinite, follow_links, host
    )
    with _advice_to_resume(target):
        check_target(target, source=source)
        with TargetLock(target, note=progress.note):
            return _convert(source, target, options, merge, prune, advise, progress, started)


def _host(rows):
    """The host of `rows`. Raises UsageError where there is none such."""
    if rows is None:
        return None
    try:
        number, n = rows
        return Host.from_dict({"host": number, "hosts": n})
    except (TypeError, ValueError):
        wanted = "expected the number of a host, from 0, and how many there are, such as"
        typed = "/".join(map(str, rows)) if isinstance(rows, tuple) else rows
        raise UsageError(
            f"rows: found {rows!a}, {wanted} (0, {FEWEST_HOSTS})",
            command_line=f"--rows: found {typed!a}, {wanted} 0/{FEWEST_HOSTS}",
        ) from None


@contextlib.contextmanager
def _advice_to_resume(target):
    """Adds to an error of the system, or of space, that the same command resumes, where something
    of an unfinished conversion is in the target."""
    try:
        yield
    except (StorageError, DoesNotFitError) as error:
        if is_begun(target):
            error.args = (f"{error}; {RESUME}", *error.args[1:])
        raise


def _convert(source, target, options, merge, prune, advise, progress, started):
    names = remove_temporaries(target)
    journal = journal_to_resume(target, names, overwrite=options.overwrite)
    refuse_rows(source)
    refuse_quantized(source)
    try:
        with links_followed(wanted=options.follow_links) as taken:
            checked = reopen_source(source, journal, allow_extra=options.allow_extra)
    except CheckpointError:
        if options.delete_source and journal is None:
            form = {"dtype": options.dtype, "scheme": options.quantize}
            if source_was_deleted(source, target, names, **form):
                return _verified_without_source(source, target, progress, started)
        raise
    try:
        further = links_note(source, taken)
        if merge is not None:
            with links_followed(wanted=options.follow_links) as taken:
                checked = merged(checked, merge)
            further += links_note(os.fspath(merge), taken)
        if prune is not None:
            checked = pruned(checked, prune)
        further += advise(checked) if advise else ()
        checked = replace(checked, notes=(*checked.notes, *further))
        for note in checked.notes:
            progress.note(note)
        quantization = choose_quantization(checked, options.quantize, journal, progress)
        with Quantizer() as quantizer:
            layered = LayeredTarget(
                target,
                checked,
                options,
                quantization=quantization,
                quantizer=quantizer,
                progress=progress,
                pruning=prune,
            )
            is_complete = layered.resume(names, journal)
            if not is_complete:
                layered.write()
        status = "unchanged" if is_complete else "converted"
        return _summary(layered, checked, target, status, started)
    finally:
        checked.tensors.close()


def refuse_quantized(source: str) -> None:
    """Raises UnsupportedModelError for a folder that this project has quantized, whose precision is
    lost already, or has made from a GGUF file: the types of its blocks are in its manifest alone.
    """
    try:
        config = read_json_object(os.path.join(source, CONFIG))
    except (CheckpointError, StorageError):
        return  # the checks of the source say what is wrong
    scheme = own_quantization(config)
    if scheme == FROM_GGUF:
        raise UnsupportedModelError(
            f"{source}: converted already, from a GGUF file; convert that file again"
        )
    if scheme is not None:
        raise UnsupportedModelError(
            f"{source}: quantized already ({scheme!a}); convert the checkpoint that it was made of"
        )


def refuse_rows(source: str) -> None:
    """Raises CheckpointError for a folder that holds the rows of one host alone."""
    if not is_layered(source):
        return
    try:
        host = read_manifest(source).host
    except (CheckpointError, StorageError):
        return  # its weights are checked as those of any other source
    check_host(source, host)


def choose_quantization(
    checked: CheckedSource, scheme: str | None, journal: Journal | None, progress: Progress
) -> Quantization | None:
    """Which matrix is stored in which form: as in the run that is resumed, else by the error that a
    sample of its rows has at int4. What is published in an encoding stays in it."""
    published = checked.quantization
    if scheme is None:
        return published
    if published is not None and not published.may_be_quantized:
        raise UnsupportedModelError(
            f"{checked.folder}: its weights are quantized as they are published "
            f"({', '.join(published.table.encodings)}), and stay so; convert without --quantize"
        )
    resumed = quantization_to_resume(journal, checked, scheme)
    if resumed is not None:
        return resumed
    shapes, errors = published_tensors(checked.cfg), None
    if scheme == INT4.name:
        progress.note(f"{checked.folder}: quantizing some rows of every matrix to measure errors")
        matrices = block_matrices(shapes, published)
        errors = sample_errors(checked.tensors, matrices)
    return quantization_of(scheme, shapes, errors, published=published)


def _summary(layered: LayeredTarget, checked, target, status, started) -> Summary:
    outputs = [*layered.weights, *layered.sides]
    entries = [entry for file in layered.weights for entry in file.tensors.values()]
    quantization = layered.quantization
    return Summary(
        source=checked.folder,
        target=target,
        status=status,
        fingerprint=layered.fingerprint(),
        n_layers=checked.cfg.num_hidden_layers,
        n_files=len(outputs) + 1,
        n_tensors=len(entries),
        dtypes=dict(Counter(entry.dtype for entry in entries)),
        source_bytes=sum(file.source_bytes for file in layered.weights),
        target_bytes=sum(output.n_bytes for output in outputs),
        elapsed_s=time.monotonic() - started,
        nonfinite={name: n for file in layered.weights for name, n in file.nonfinite.items()},
        notes=checked.notes,
        n_resumed=layered.n_resumed,
        removed=tuple(layered.removed),
        rows=layered.host and layered.host.as_dict(),
        quantization=quantization and quantization.as_dict(),
        block_bits=(
            quantization.block_bits(published_tensors(checked.cfg))
            if quantization and quantization.scheme
            else None
        ),
    )


def _verified_without_source(source, target, progress, started) -> Summary:
    """The summary of a finished target whose source `delete_source` has removed."""
    verdict = verify_folder(target, progress=progress, beside=[LOCK])
    if verdict.findings:
        raise CheckpointError(
            f"{target}: {'; '.join(verdict.findings)}; {verdict.advice}; {source} has no weights "
            "any more"
        )
    note = f"{source}: its weights were removed; {target} is complete and has the same config"
    progress.note(note)
    manifest = read_manifest(target)
    entries = [entry for file in manifest.files.values() for entry in file.tensors.values()]
    return Summary(
        source=source,
        target=target,
        status="unchanged",
        fingerprint=manifest.source_fingerprint,
        n_layers=read_config(target).num_hidden_layers,
        n_files=len(manifest.files) + 1,
        n_tensors=len(entries),
        dtypes=dict(Counter(entry.dtype for entry in entries)),
        source_bytes=0,
        target_bytes=sum(entry.n_bytes for entry in manifest.files.values()),
        elapsed_s=time.monotonic() - started,
        nonfinite={},
        notes=(note,),
    )
