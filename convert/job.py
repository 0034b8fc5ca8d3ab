"""One conversion from the first check to the manifest: doors, space, files, in this order."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from convert.doors import CheckedSource, open_source
from convert.outputs import Output, WeightFile, fingerprint, side_outputs, weight_outputs
from convert.progress import Progress
from convert.read import hash_stream
from convert.write import TargetWriter, check_space, check_target, remove_temporaries
from jlayer.config import parse_choice
from jlayer.errors import CheckpointError, UsageError
from jlayer.spec import ITEM_BYTES
from jlayer.weights.layout import MANIFEST, FileEntry, Manifest, encode_manifest, read_manifest


@dataclass(frozen=True)
class Summary:
    """What a conversion did. `status` is "converted", or "unchanged" where it was done already.

    `dtypes` counts tensors by their dtype in the target; `nonfinite` counts, by tensor, the NaN
    and infinite numbers that were let through.
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


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_extra: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Turns the published checkpoint in `source` into a layered one in `target`.

    Without `dtype` every tensor keeps its own, and its bytes. Raises the errors of jlayer.errors;
    the target is then without a manifest and without temporary files.
    """
    started = time.monotonic()
    source, target, progress = os.fspath(source), os.fspath(target), progress or Progress()
    if dtype is not None:
        parse_choice(dtype, tuple(ITEM_BYTES), option="dtype")
    if not source or not target:
        raise UsageError("source and target: found an empty path, expected two folders")
    present = remove_temporaries(target, check_target(target, source=source))
    checked = open_source(source, allow_extra=allow_extra)
    try:
        for note in checked.notes:
            progress.note(note)
        weights = weight_outputs(
            checked, dtype=dtype, allow_nonfinite=allow_nonfinite, progress=progress
        )
        job = _Job(checked, target, weights, side_outputs(checked, weights, dtype=dtype), progress)
        if MANIFEST in present and not overwrite and job.is_done():
            return job.summary("unchanged", started)
        job.write(present)
        return job.summary("converted", started)
    finally:
        checked.tensors.close()


@dataclass
class _Job:
    """A checked source, the files that it becomes, and where they go."""

    checked: CheckedSource
    target: str
    weights: list[WeightFile]
    sides: list[Output]
    progress: Progress
    fingerprint: str = ""

    def is_done(self) -> bool:
        """Whether the target is what this job would make, and whole as far as sizes tell.

        Raises UsageError where it holds anything else.
        """
        try:
            manifest = read_manifest(self.target)
        except CheckpointError as error:
            raise self._refusal(f"its manifest cannot be read: {error}") from None
        difference = self._planned_difference(manifest)
        if difference is None:
            self.progress.note(f"{self.target}: finished before; comparing it with the source")
            digests = self._pass(lambda output: hash_stream(output.chunks())[1])
            self._identify(digests)
            if self.fingerprint != manifest.source_fingerprint:
                difference = "other weights or another config"
        if difference is not None:
            raise self._refusal(difference)
        damaged = _incomplete(self.target, manifest)
        if damaged:
            self.progress.note(f"{self.target}: {damaged} is missing or cut off; converting anew")
        return not damaged

    def write(self, present: list[str]) -> None:
        """Writes every file and then the manifest; `present` is what lies in the target."""
        outputs = [*self.weights, *self.sides]
        blank = encode_manifest(self._manifest(dict.fromkeys([o.name for o in outputs], "0" * 64)))
        sizes = [*(output.n_bytes for output in outputs), len(blank)]
        check_space(self.target, sizes, replaced=present)
        with TargetWriter(self.target) as writer:
            writer.clear(present)

            def write(output):
                return writer.write(output.name, output.chunks(), n_bytes=output.n_bytes)

            digests = self._pass(write)
            digests |= {output.name: write(output) for output in self.sides}
            self.checked.tensors.check_unchanged()
            self._identify(digests)
            content = encode_manifest(self._manifest(digests))
            writer.write(MANIFEST, [content], n_bytes=len(content))

    def summary(self, status: str, started: float) -> Summary:
        outputs = [*self.weights, *self.sides]
        placed = [entry for file in self.weights for entry in file.tensors.values()]
        return Summary(
            source=self.checked.folder,
            target=self.target,
            status=status,
            fingerprint=self.fingerprint,
            n_layers=self.checked.cfg.num_hidden_layers,
            n_files=len(outputs) + 1,
            n_tensors=len(placed),
            dtypes=dict(Counter(entry.dtype for entry in placed)),
            source_bytes=self._source_bytes(),
            target_bytes=sum(output.n_bytes for output in outputs),
            elapsed_s=time.monotonic() - started,
            nonfinite={name: n for file in self.weights for name, n in file.nonfinite.items()},
            notes=self.checked.notes,
        )

    def _pass(self, work: Callable[[Output], str]) -> dict[str, str]:
        """Takes every weight file through `work`, which returns its SHA-256."""
        self.progress.start(self._source_bytes())
        digests = {}
        for output in self.weights:
            self.progress.file(output.name)
            digests[output.name] = work(output)
        return digests

    def _source_bytes(self):
        return sum(info.n_bytes for info in self.checked.tensors.tensors.values())

    def _identify(self, digests):
        in_source = {file.name: file.source_sha256(digests[file.name]) for file in self.weights}
        self.fingerprint = fingerprint(self.checked.config_bytes, in_source)

    def _manifest(self, digests):
        files = {
            output.name: FileEntry(output.n_bytes, digests[output.name], output.tensors)
            for output in [*self.weights, *self.sides]
        }
        source = self.fingerprint or "0" * 64
        return Manifest(self.checked.cfg.model_type, source, files)

    def _planned_difference(self, manifest):
        """The first thing known before the weights are read in which the target is another."""
        if manifest.family != self.checked.cfg.model_type:
            return f"family {manifest.family}"
        outputs = {output.name: output for output in [*self.weights, *self.sides]}
        for name in sorted(outputs.keys() ^ manifest.files.keys()):
            return f"{name} is in only one of them"
        for output in self.weights:
            for tensor, entry in output.tensors.items():
                there = manifest.files[output.name].tensors.get(tensor)
                if there != entry:
                    there = there and f"{there.dtype} {list(there.shape)}"
                    return f"{tensor} is {there} there, {entry.dtype} {list(entry.shape)} here"
        for output in self.sides:
            if hash_stream(output.chunks())[1] != manifest.files[output.name].sha256:
                return f"another {output.name}"
        return None

    def _refusal(self, difference):
        return UsageError(
            f"{self.target}: holds another model or other options than {self.checked.folder} gives "
            f"({difference}); name another folder, or replace it with --overwrite"
        )


def _incomplete(target, manifest):
    """The first file of a finished target that is not there in its full size."""
    for name, entry in manifest.files.items():
        path = os.path.join(target, name)
        if not os.path.isfile(path) or os.path.getsize(path) != entry.n_bytes:
            return name
    return None
