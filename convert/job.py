"""One conversion from the first check to the manifest: lock, doors, space, files, in this order.

Every file that is finished is noted in the journal, so that a run that is cut off at any moment is
gone on with by the same command.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from convert import RESUME
from convert.progress import Progress
from convert.sources.files import check_unchanged, file_chunks, hash_stream
from convert.sources.open import CheckedSource, regular_file
from convert.target.delete_source import Shedder
from convert.target.disk import is_there
from convert.target.journal import (
    JOURNAL,
    Finished,
    Journal,
    chosen_before,
    describe,
    remove_journal,
)
from convert.target.lock import LOCK, TargetLock
from convert.target.resume import (
    goes_on,
    journal_of,
    open_again,
    planned_difference,
    sides_are_whole,
    was_shed,
)
from convert.target.space import check_space
from convert.target.write import TargetWriter, check_target, remove_temporaries
from convert.transform.outputs import (
    Output,
    WeightFile,
    files_of,
    fingerprint,
    side_outputs,
    weight_outputs,
)
from convert.transform.quantize import Quantizer, sample_errors
from convert.verify import verify_folder
from jlayer.checkpoint.layout import (
    CONFIG,
    EMBED_FILE,
    MANIFEST,
    FileEntry,
    Manifest,
    encode_manifest,
    is_weight_file,
    read_manifest,
)
from jlayer.checkpoint.quantization import Quantization, block_matrices, quantization_of
from jlayer.config import own_quantization, parse_choice, read_config
from jlayer.encodings.int4 import INT4
from jlayer.encodings.registry import SCHEMES
from jlayer.errors import (
    CheckpointError,
    DoesNotFitError,
    JlayerError,
    StorageError,
    UnsupportedModelError,
    UsageError,
)
from jlayer.families.registry import published_tensors
from jlayer.spec import ITEM_BYTES
from jlayer.strict import read_json_object

_BLANK = "0" * 64  # stands for a SHA-256 where only its length counts


@dataclass(frozen=True)
class Summary:
    """What a conversion did. `status` is "converted", or "unchanged" where it was done already.

    `dtypes` counts tensors by their dtype in the target; `nonfinite` counts, by tensor, the NaN
    and infinite numbers that were let through; `n_resumed` counts the weight files that an earlier
    run had finished; `removed` names the source's files that `delete_source` removed;
    `quantization` is the manifest's, and `block_bits` a weight's bits on average over the layers'
    matrices.
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


@dataclass(frozen=True)
class _Options:
    dtype: str | None
    quantize: str | None
    overwrite: bool
    delete_source: bool
    allow_extra: bool
    allow_nonfinite: bool


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
    progress: Progress | None = None,
) -> Summary:
    """Turns the published checkpoint in `source` into a layered one in `target`.

    Without `dtype` every tensor keeps its own, and its bytes; with `quantize` ("int8" or "int4")
    matrices are kept in so many bits, and the rest as it would be without. With `delete_source` the
    files of the source that hold its weights are removed as soon as nothing needs them. Whatever
    stops it, the same call goes on from there: what is finished stays, without a manifest and
    without temporary files. Raises the errors of jlayer.errors.
    """
    started = time.monotonic()
    source, target, progress = os.fspath(source), os.fspath(target), progress or Progress()
    if dtype is not None:
        parse_choice(dtype, tuple(ITEM_BYTES), option="dtype")
    if quantize is not None:
        parse_choice(quantize, tuple(SCHEMES), option="quantize")
    if not source or not target:
        raise UsageError("source and target: found an empty path, expected two folders")
    if delete_source and allow_extra:
        raise UsageError(
            "delete_source and allow_extra: what is left out of the target would be lost with the "
            "source; choose one of them"
        )
    options = _Options(dtype, quantize, overwrite, delete_source, allow_extra, allow_nonfinite)
    with _resumable():
        check_target(target, source=source)
        with TargetLock(target, note=progress.note):
            return _convert(source, target, options, progress, started)


@contextlib.contextmanager
def _resumable():
    """Where the system or the space failed, nothing that is finished is lost: this says so."""
    try:
        yield
    except (StorageError, DoesNotFitError) as error:
        error.args = (f"{error}; {RESUME}", *error.args[1:])
        raise


def _convert(source, target, options, progress, started):
    present = remove_temporaries(target)
    journal = journal_of(target, present, overwrite=options.overwrite)
    _refuse_quantized(source)
    try:
        checked = open_again(source, journal, allow_extra=options.allow_extra)
    except CheckpointError:
        shed = options.delete_source and journal is None
        form = {"dtype": options.dtype, "scheme": options.quantize}
        if shed and was_shed(source, target, present, **form):
            return _unchanged_without_source(source, target, progress, started)
        raise
    try:
        for note in checked.notes:
            progress.note(note)
        quantization = _choose(checked, options.quantize, journal, progress)
        with Quantizer() as quantizer:
            job = _Job(checked, target, options, progress, quantization, quantizer)
            done = job.prepare(present, journal)
            if not done:
                job.run()
        return job.summary("unchanged" if done else "converted", started)
    finally:
        checked.tensors.close()


def _refuse_quantized(source):
    """A folder that we quantised is no source: what was lost there is lost."""
    try:
        config = read_json_object(os.path.join(source, CONFIG))
    except (CheckpointError, StorageError):
        return  # the source's own doors say what is wrong
    scheme = own_quantization(config)
    if scheme is not None:
        raise UnsupportedModelError(
            f"{source}: quantised already ({scheme!a}); convert the checkpoint that it was made of"
        )


def _choose(checked, scheme, journal, progress) -> Quantization | None:
    """Which matrix is kept in which form: as before where that was begun, else by their errors."""
    if scheme is None:
        return None
    before = chosen_before(journal, checked, scheme)
    if before is not None:
        return before
    shapes, errors = published_tensors(checked.cfg), None
    if scheme == INT4.name:
        progress.note(f"{checked.folder}: looking at some rows of every matrix")
        errors = sample_errors(checked.tensors, block_matrices(shapes))
    return quantization_of(scheme, shapes, errors)


def _unchanged_without_source(source, target, progress, started):
    verdict = verify_folder(target, progress=progress, beside=[LOCK])
    if verdict.findings:
        raise CheckpointError(
            f"{target}: {'; '.join(verdict.findings)}; and {source} has no weights any more"
        )
    note = f"{source}: its weights are removed; {target} is whole, of the same config"
    progress.note(note)
    manifest = read_manifest(target)
    placed = [entry for file in manifest.files.values() for entry in file.tensors.values()]
    return Summary(
        source=source,
        target=target,
        status="unchanged",
        fingerprint=manifest.source_fingerprint,
        n_layers=read_config(target).num_hidden_layers,
        n_files=len(manifest.files) + 1,
        n_tensors=len(placed),
        dtypes=dict(Counter(entry.dtype for entry in placed)),
        source_bytes=0,
        target_bytes=sum(entry.n_bytes for entry in manifest.files.values()),
        elapsed_s=time.monotonic() - started,
        nonfinite={},
        notes=(note,),
    )


class _Job:
    """A checked source, the files that it becomes, and where they go."""

    def __init__(
        self,
        checked: CheckedSource,
        target: str,
        options: _Options,
        progress: Progress,
        quantization: Quantization | None,
        quantizer: Quantizer,
    ):
        self.checked, self.target, self.options = checked, target, options
        self.progress, self.quantization = progress, quantization
        self.weights: list[WeightFile] = weight_outputs(
            checked,
            dtype=options.dtype,
            quantization=quantization,
            quantizer=quantizer,
            allow_nonfinite=options.allow_nonfinite,
            progress=progress,
        )
        self.sides: list[Output] = side_outputs(
            checked, self.weights, dtype=options.dtype, scheme=options.quantize
        )
        self.journal = Journal({})
        self.n_resumed = 0
        self.removed: list[str] = []
        self._present: list[str] = []

    def prepare(self, present: list[str], journal: Journal | None) -> bool:
        """Finds out what is done already, without changing anything; returns whether all is.

        Raises UsageError where the target holds another model, or the beginning of one, and
        CheckpointError where the source has changed since.
        """
        self._present = present
        anew, shed = self.options.overwrite, self.options.delete_source
        whole = shed or (journal is not None and bool(journal.removed))
        source = describe(
            self.checked, dtype=self.options.dtype, quantization=self.quantization, whole=whole
        )
        self.journal = Journal(source)
        if journal and goes_on(journal, source, target=self.target, anew=anew):
            self.progress.note(
                f"{self.target}: resuming: {len(journal.finished)} of {len(self.weights)} weight "
                "files were finished; reading them again"
            )
            self.journal.removed = journal.removed
            self.journal.finished = self._recheck(journal.finished)
        elif MANIFEST in present and not anew:
            self.progress.note(f"{self.target}: finished before; comparing it with the source")
            manifest = self._compare()
            self.progress.note(f"{self.target}: reading it again")
            self.journal.finished = self._recheck(self.journal.finished)
            whole = len(self.journal.finished) == len(self.weights)
            return whole and sides_are_whole(self.target, manifest) and not shed
        return False

    def run(self) -> None:
        """Writes every file that is not finished, and then the manifest."""
        self.n_resumed = len(self.journal.finished)
        shedder = self._shedder()
        self._check_space(shedder.frees() if shedder else {})
        try:
            self._write(shedder)
        except BaseException:
            with contextlib.suppress(OSError, JlayerError):
                if set(os.listdir(self.target)) <= {JOURNAL, LOCK}:  # nothing to go on with
                    remove_journal(self.target)
            raise

    def _write(self, shedder):
        finished = self.journal.finished
        with TargetWriter(self.target) as writer:
            self._clear(writer)
            self.progress.start(
                sum(file.source_bytes for file in self.weights if file.name not in finished)
            )
            for output in self.weights:
                if output.name not in finished:
                    self._finish(output, writer)
                if shedder:
                    shedder.after(output.name)
            sides = {
                o.name: writer.write(o.name, o.chunks(), n_bytes=o.n_bytes) for o in self.sides
            }
            self._check_unchanged(self.weights)
            content = encode_manifest(self._manifest(sides))
            writer.write(MANIFEST, [content], n_bytes=len(content))
            if shedder:
                shedder.rest()
                self.removed = self.journal.removed
            remove_journal(self.target)

    def summary(self, status: str, started: float) -> Summary:
        outputs = [*self.weights, *self.sides]
        placed = [entry for file in self.weights for entry in file.tensors.values()]
        quantization = self.quantization
        shapes = published_tensors(self.checked.cfg)
        return Summary(
            source=self.checked.folder,
            target=self.target,
            status=status,
            fingerprint=self._fingerprint(),
            n_layers=self.checked.cfg.num_hidden_layers,
            n_files=len(outputs) + 1,
            n_tensors=len(placed),
            dtypes=dict(Counter(entry.dtype for entry in placed)),
            source_bytes=sum(file.source_bytes for file in self.weights),
            target_bytes=sum(output.n_bytes for output in outputs),
            elapsed_s=time.monotonic() - started,
            nonfinite={name: n for file in self.weights for name, n in file.nonfinite.items()},
            notes=self.checked.notes,
            n_resumed=self.n_resumed,
            removed=tuple(self.removed),
            quantization=quantization and quantization.as_dict(),
            block_bits=quantization and quantization.block_bits(shapes),
        )

    def _recheck(self, finished: dict[str, Finished]) -> dict[str, Finished]:
        """Those that are on disk as they must be, by their hash."""
        there = [o for o in self.weights if o.name in finished and o.name in self._present]
        self.progress.start(sum(output.n_bytes for output in there))
        found = {}
        for output in there:
            self.progress.file(output.name)
            entry = finished[output.name]
            if self._digest_of(output, self.progress) == entry.sha256:
                found[output.name] = entry
                self._count_nonfinite(output, entry)
            else:
                self.progress.note(f"{self.target}: {output.name} is damaged; making it anew")
        self._require_sources(o for o in self.weights if o.name not in found)
        return found

    def _digest_of(self, output, progress):
        """The SHA-256 of what is on disk, or None where not even its size is right."""
        file = regular_file(self.target, output.name)
        if file.n_bytes != output.n_bytes:
            return None
        return hash_stream(file_chunks(file), lambda chunk: progress.advance(len(chunk)))[1]

    def _count_nonfinite(self, output, entry):
        if entry.nonfinite and not self.options.allow_nonfinite:
            tensor, count = next(iter(entry.nonfinite.items()))
            raise CheckpointError(
                f"{self.checked.folder}: tensor {tensor}: NaN or infinite numbers: {count}, which "
                "--allow-nonfinite let through; give it again to resume"
            )
        output.nonfinite.update(entry.nonfinite)

    def _require_sources(self, outputs: Iterable[WeightFile]):
        for output in outputs:
            for file in files_of(self.checked.tensors, output):
                if not is_there(file.real):
                    raise CheckpointError(
                        f"{os.path.join(self.target, output.name)}: missing or damaged, and "
                        f"{file.path}, which it is made of, was removed by --delete-source; fetch "
                        "that model again and convert it with --overwrite"
                    )

    def _clear(self, writer):
        """Removes what is not finished, and begins (or goes on with) the journal.

        At every moment something tells that the folder is ours: the manifest, the embedding's file,
        the journal.
        """
        keeps = {*self.journal.finished, JOURNAL}
        if len(self.journal.finished) == len(self.weights):
            # All that a manifest that is there says is so: it may stay until it is replaced.
            keeps |= {MANIFEST, *(side.name for side in self.sides)}
        going = [name for name in self._present if name not in keeps]
        writer.remove([MANIFEST] * (MANIFEST in going))
        writer.remove(name for name in going if is_weight_file(name) and name != EMBED_FILE)
        self.journal.write(self.target)
        writer.remove(going)

    def _shedder(self):
        if not self.options.delete_source:
            return None
        return Shedder(
            self.checked.tensors,
            self.weights,
            self.journal,
            target=self.target,
            note=self.progress.note,
        )

    def _check_space(self, freed):
        """The journal counts twice: it is written aside, too."""
        finished = self.journal.finished
        blank = {output.name: _blank(output) for output in self.weights}
        journal = Journal(
            self.journal.source,
            blank | finished,
            sorted(
                {f.name for output in self.weights for f in files_of(self.checked.tensors, output)}
            ),
        )
        sizes = [(JOURNAL, len(journal.encode()))] * 2
        sizes += [(o.name, o.n_bytes) for o in self.weights if o.name not in finished]
        sizes += [(side.name, side.n_bytes) for side in self.sides]
        manifest = self._manifest({side.name: _BLANK for side in self.sides}, blank=blank)
        sizes.append((MANIFEST, len(encode_manifest(manifest))))
        replaced = [name for name in self._present if name not in finished]
        check_space(self.target, sizes, freed=freed, replaced=replaced)

    def _finish(self, output, writer):
        """Writes one weight file and notes it, so that no later run needs to."""
        self.progress.file(output.name)
        digest = writer.write(output.name, output.chunks(writer.room), n_bytes=output.n_bytes)
        self._check_unchanged([output])
        if self.options.delete_source and self._digest_of(output, Progress()) != digest:
            raise StorageError(
                f"{os.path.join(self.target, output.name)}: reads back otherwise than it was "
                "written; look after this disk"
            )
        self.journal.finished[output.name] = Finished(
            digest, output.source_sha256(digest), output.digests, output.nonfinite
        )
        self.journal.write(self.target)

    def _check_unchanged(self, outputs):
        removed = self.journal.removed
        for file in {f for o in outputs for f in files_of(self.checked.tensors, o)}:
            if file.name not in removed or is_there(file.real):
                check_unchanged(file)

    def _compare(self) -> Manifest:
        """The manifest of a finished target, which is what this job would make.

        Notes the files as finished. Raises UsageError where it is anything else.
        """
        try:
            manifest = read_manifest(self.target)
        except CheckpointError as error:
            raise self._refusal(f"its manifest cannot be read: {error}") from None
        wanted = Manifest(self.checked.cfg.model_type, "", {}, self.quantization)
        difference = planned_difference(manifest, wanted, self.weights, self.sides)
        if difference is not None:
            raise self._refusal(difference)
        self.progress.start(sum(file.source_bytes for file in self.weights))
        for output in self.weights:
            self.progress.file(output.name)
            digest = hash_stream(output.chunks())[1]
            self.journal.finished[output.name] = Finished(
                digest, output.source_sha256(digest), output.digests, output.nonfinite
            )
        if self._fingerprint() != manifest.source_fingerprint:
            raise self._refusal("other weights or another config")
        return manifest

    def _fingerprint(self):
        in_source = {name: entry.source_sha256 for name, entry in self.journal.finished.items()}
        return fingerprint(self.checked.config_bytes, in_source)

    def _manifest(self, sides: dict[str, str], *, blank: dict[str, Finished] | None = None):
        """Of what is finished; `blank` stands for what is not, where only the size counts."""
        finished = (blank or {}) | self.journal.finished
        files = {
            output.name: FileEntry(
                output.n_bytes,
                finished[output.name].sha256,
                output.tensors,
                finished[output.name].digests,
            )
            for output in self.weights
        }
        files |= {
            side.name: FileEntry(side.n_bytes, sides[side.name], {}, {}) for side in self.sides
        }
        return Manifest(self.checked.cfg.model_type, self._fingerprint(), files, self.quantization)

    def _refusal(self, difference):
        return UsageError(
            f"{self.target}: holds another model or other options than {self.checked.folder} gives "
            f"({difference}); name another folder, or replace it with --overwrite"
        )


def _blank(output):
    """Stands for a file that is not finished, where only the length of what is noted counts."""
    return Finished(_BLANK, _BLANK, dict.fromkeys(output.tensors, "0" * 32))
