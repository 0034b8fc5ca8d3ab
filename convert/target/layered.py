"""The layered checkpoint that a conversion writes: which files are finished, and the rest.

Every finished weight file is noted in the journal, so that a run that was stopped at any moment can
be resumed. The manifest is written last.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from jlayer.checkpoint.layout import (
    EMBED_FILE,
    MANIFEST,
    FileEntry,
    Manifest,
    encode_manifest,
    is_weight_file,
    read_manifest,
)
from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.rows import Host
from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import check_unchanged, hash_stream
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.target.delete_source import SourceRemover
from jlayer.convert.target.disk import remove
from jlayer.convert.target.journal import (
    JOURNAL,
    FinishedFile,
    Journal,
    describe_source,
    remove_journal,
)
from jlayer.convert.target.measured import MEASURED
from jlayer.convert.target.resume import (
    first_difference,
    intact_files,
    may_resume,
    require_sources,
    sha256_on_disk,
    side_files_intact,
)
from jlayer.convert.target.space import check_space
from jlayer.convert.target.write import TargetWriter
from jlayer.convert.transform.outputs import (
    Output,
    WeightFile,
    files_of,
    fingerprint,
    side_outputs,
    weight_outputs,
)
from jlayer.convert.transform.pruned import Pruning
from jlayer.convert.transform.quantize import Quantizer
from jlayer.durable import LOCK
from jlayer.errors import CheckpointError, JlayerError, StorageError, UsageError
from jlayer.strict import is_there

_NO_SHA256 = "0" * 64  # has the length of a digest, which is all that a size depends on


@dataclass(frozen=True)
class Options:
    """What the caller of a conversion asked for; `dtype` and `quantize` None: as published; `host`
    None: all rows."""

    dtype: str | None
    quantize: str | None
    overwrite: bool
    delete_source: bool
    allow_extra: bool
    allow_nonfinite: bool
    follow_links: bool
    host: Host | None = None


class LayeredTarget:
    """A target folder, and the files that a checked source becomes there.

    `weights` and `sides` are the files in the order in which they are written. `n_resumed` counts
    the weight files that an interrupted run had finished. `removed` names the source files that
    `delete_source` has removed.
    """

    def __init__(
        self,
        folder: str,
        checked: CheckedSource,
        options: Options,
        *,
        quantization: Quantization | None,
        quantizer: Quantizer,
        progress: Progress,
        pruning: Pruning | None = None,
    ):
        self.quantization = quantization
        self.weights: list[WeightFile] = weight_outputs(
            checked,
            dtype=options.dtype,
            quantization=quantization,
            quantizer=quantizer,
            allow_nonfinite=options.allow_nonfinite,
            progress=progress,
            host=options.host,
        )
        self.sides: list[Output] = side_outputs(
            checked, self.weights, dtype=options.dtype, scheme=options.quantize
        )
        self.host, self.n_resumed = options.host, 0
        self.removed: list[str] = []
        self._folder, self._checked, self._options = folder, checked, options
        self._progress, self._pruning = progress, pruning
        self._journal = Journal({})
        self._names: list[str] = []

    def resume(self, names: list[str], journal: Journal | None) -> bool:
        """Finds the files that are finished; changes nothing. Returns whether all of them are.

        `names`: the files in the folder; `journal`: that of an interrupted run. Raises UsageError
        where the target holds another model, finished or not, or CheckpointError where the source
        has changed.
        """
        self._names = names
        options = self._options
        source = describe_source(
            self._checked,
            dtype=options.dtype,
            quantization=self.quantization,
            host=options.host,
            pruning=self._pruning,
            restorable=options.delete_source or (journal is not None and bool(journal.removed)),
        )
        self._journal = Journal(source)
        if journal and may_resume(
            journal, source, target=self._folder, overwrite=options.overwrite
        ):
            self._progress.note(
                f"{self._folder}: resuming: {len(journal.finished)} of {len(self.weights)} weight "
                "files were finished; reading them again"
            )
            self._journal.removed = journal.removed
            self._journal.finished = self._intact(journal.finished)
        elif MANIFEST in names and not options.overwrite:
            return self._is_complete()
        return False

    def write(self) -> None:
        """Writes the files that are not finished, then the manifest."""
        self.n_resumed = len(self._journal.finished)
        remover = self._source_remover()
        self._check_space(remover.freed_bytes() if remover else {})
        try:
            self._write_files(remover)
        except BaseException:
            with contextlib.suppress(OSError, JlayerError):
                # Nothing to resume from, but for what was measured.
                if set(os.listdir(self._folder)) <= {JOURNAL, LOCK, MEASURED}:
                    remove_journal(self._folder)
            raise

    def fingerprint(self) -> str:
        """What identifies the source, once all its weight files have been read."""
        in_source = {name: entry.source_sha256 for name, entry in self._journal.finished.items()}
        return fingerprint(self._checked.config_bytes, in_source)

    def _write_files(self, remover):
        finished = self._journal.finished
        with TargetWriter(self._folder) as writer:
            self._remove_unfinished(writer)
            self._progress.start(
                sum(file.source_bytes for file in self.weights if file.name not in finished)
            )
            for output in self.weights:
                if output.name not in finished:
                    self._write_weights(output, writer)
                if remover:
                    remover.remove_after(output.name)
            sides = {
                side.name: writer.write(side.name, side.chunks(), n_bytes=side.n_bytes)
                for side in self.sides
            }
            self._check_unchanged(self.weights)
            content = encode_manifest(self._manifest(finished, sides))
            writer.write(MANIFEST, [content], n_bytes=len(content))
            if remover:
                remover.remove_rest()
                self.removed = self._journal.removed
            remove(os.path.join(self._folder, MEASURED))
            remove_journal(self._folder)

    def _write_weights(self, output, writer):
        """Writes one weight file and notes it in the journal."""
        self._progress.file(output.name)
        sha256 = writer.write(output.name, output.chunks(writer.room), n_bytes=output.n_bytes)
        self._check_unchanged([output])
        if self._options.delete_source:
            reread = sha256_on_disk(self._folder, output, Progress())
            if reread != sha256:
                raise StorageError(
                    f"{os.path.join(self._folder, output.name)}: the bytes that were read back "
                    "differ from those that were written; check this disk"
                )
        self._journal.finished[output.name] = _finished(output, sha256)
        self._journal.write(self._folder)

    def _remove_unfinished(self, writer):
        """Removes files that are not finished, and writes the journal.

        At every moment one of manifest, embedding file and journal is there: by these a later run
        knows that the folder is a conversion's.
        """
        keeps = {*self._journal.finished, JOURNAL, MEASURED}
        if len(self._journal.finished) == len(self.weights):
            # A manifest that is there is right: it may stay until it is replaced.
            keeps |= {MANIFEST, *(side.name for side in self.sides)}
        unfinished = [name for name in self._names if name not in keeps]
        writer.remove([MANIFEST] * (MANIFEST in unfinished))
        writer.remove(name for name in unfinished if is_weight_file(name) and name != EMBED_FILE)
        self._journal.write(self._folder)
        writer.remove(unfinished)

    def _source_remover(self):
        if not self._options.delete_source:
            return None
        return SourceRemover(
            self._checked.tensors,
            self.weights,
            self._journal,
            target=self._folder,
            note=self._progress.note,
        )

    def _check_space(self, freed):
        finished = self._journal.finished
        # What the journal and the manifest will be: of that size, with digests still unknown.
        planned = {
            output.name: FinishedFile(
                _NO_SHA256, _NO_SHA256, dict.fromkeys(output.tensors, "0" * 32)
            )
            for output in self.weights
        } | finished
        sources = {f.name for o in self.weights for f in files_of(self._checked.tensors, o)}
        journal = Journal(self._journal.source, planned, sorted(sources))
        manifest = self._manifest(planned, {side.name: _NO_SHA256 for side in self.sides})
        sizes = [
            *[(JOURNAL, len(journal.encode()))] * 2,  # replaced by one that is written beside it
            *((o.name, o.n_bytes) for o in self.weights if o.name not in finished),
            *((side.name, side.n_bytes) for side in self.sides),
            (MANIFEST, len(encode_manifest(manifest))),
        ]
        replaced = [name for name in self._names if name not in finished]
        check_space(self._folder, sizes, freed=freed, replaced=replaced)

    def _check_unchanged(self, outputs):
        removed = self._journal.removed
        for file in {f for o in outputs for f in files_of(self._checked.tensors, o)}:
            if file.name not in removed or is_there(file.real):
                check_unchanged(file)

    def _intact(self, finished: dict[str, FinishedFile]) -> dict[str, FinishedFile]:
        """Those of the finished files that are still on disk, undamaged."""
        present = [o for o in self.weights if o.name in finished and o.name in self._names]
        if not self._options.allow_nonfinite:
            self._refuse_nonfinite(finished[output.name] for output in present)
        intact = intact_files(self._folder, present, finished, self._progress)
        for output in present:
            if output.name in intact:  # else it is counted when it is read from its source
                output.nonfinite.update(intact[output.name].nonfinite)
        missing = (output for output in self.weights if output.name not in intact)
        require_sources(self._folder, missing, self._checked.tensors)
        return intact

    def _refuse_nonfinite(self, entries):
        for entry in entries:
            for tensor, count in entry.nonfinite.items():
                raise CheckpointError(
                    f"{self._checked.folder}: tensor {tensor}: NaN or infinite numbers: {count}, "
                    "which --allow-nonfinite let through; give it again to resume"
                )

    def _is_complete(self) -> bool:
        """Whether a finished target is what this conversion would write, and undamaged."""
        self._progress.note(f"{self._folder}: finished before; comparing it with the source")
        manifest = self._compare()
        self._progress.note(f"{self._folder}: reading it again")
        self._journal.finished = self._intact(self._journal.finished)
        return (
            len(self._journal.finished) == len(self.weights)
            and side_files_intact(self._folder, manifest)
            and not self._options.delete_source
        )

    def _compare(self) -> Manifest:
        """The manifest of a finished target, compared with the source, all of which is read.

        Raises UsageError where it is not what this conversion would write.
        """
        try:
            manifest = read_manifest(self._folder)
        except CheckpointError as error:
            raise self._refusal(f"its manifest cannot be read: {error}") from None
        family = self._checked.cfg.model_type
        wanted = Manifest(family, "", {}, self.quantization, self._options.host)
        difference = first_difference(manifest, wanted, self.weights, self.sides)
        if difference is not None:
            raise self._refusal(difference)
        self._progress.start(sum(file.source_bytes for file in self.weights))
        for output in self.weights:
            self._progress.file(output.name)
            _, sha256 = hash_stream(output.chunks())
            self._journal.finished[output.name] = _finished(output, sha256)
        if self.fingerprint() != manifest.source_fingerprint:
            raise self._refusal("other weights or another config")
        return manifest

    def _refusal(self, difference):
        return UsageError(
            f"{self._folder}: holds another model or other options than {self._checked.folder} "
            f"gives ({difference}); name another folder, or replace it with --overwrite"
        )

    def _manifest(self, finished: dict[str, FinishedFile], sides: dict[str, str]) -> Manifest:
        """`finished`: every weight file; `sides`: the SHA-256 of every other file."""
        files = {
            output.name: FileEntry(
                output.n_bytes,
                finished[output.name].sha256,
                output.tensors,
                finished[output.name].digests,
                output.spans,
            )
            for output in self.weights
        }
        files |= {
            side.name: FileEntry(side.n_bytes, sides[side.name], {}, {}) for side in self.sides
        }
        family = self._checked.cfg.model_type
        return Manifest(family, self.fingerprint(), files, self.quantization, self._options.host)


def _finished(output: WeightFile, sha256: str) -> FinishedFile:
    return FinishedFile(sha256, output.source_sha256(sha256), output.digests, output.nonfinite)
