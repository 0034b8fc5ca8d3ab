"""Verifies a converted folder: manifest, tensors, headers, sizes, digests, and no other files.

Lists everything that is wrong. Stops early only where manifest or config cannot be read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from jlayer.checkpoint.gguf import open_gguf
from jlayer.checkpoint.layout import (
    CONFIG,
    INDEX,
    MANIFEST,
    FileEntry,
    Manifest,
    encode_header,
    encode_index,
    is_side_file,
    is_weight_file,
    read_manifest,
    weight_files,
)
from jlayer.checkpoint.links import links_followed
from jlayer.checkpoint.safetensors import read_header
from jlayer.checkpoint.sides import SEAL_ADVICE, with_templates
from jlayer.checkpoint.source import names_in, regular_file
from jlayer.config import read_config
from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import file_chunks, hash_stream
from jlayer.convert.target.journal import JOURNAL
from jlayer.convert.transform.rows import host_spans, stored_spans
from jlayer.errors import CheckpointError
from jlayer.families.registry import published_tensors
from jlayer.gguf.parts import is_gguf, model_at
from jlayer.spec import ModelConfig
from jlayer.strict import read_small_file


@dataclass(frozen=True)
class Verdict:
    """The result of a verification; `findings` is empty where nothing is wrong.

    `side_files`: those beside the weights that were changed, added or removed since the manifest
    was written. `foreign`: files that are no part of the folder. `is_damaged`: anything else is
    wrong. `has_checksums`: a GGUF file has none, so only its structure was checked.
    """

    folder: str
    findings: tuple[str, ...]
    n_files: int
    n_layers: int
    folder_bytes: int
    side_files: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    is_damaged: bool = False
    has_checksums: bool = True

    @property
    def advice(self) -> str:
        """What to do about the findings; empty where there are none."""
        ways = {
            "convert the source again": self.is_damaged,
            f"remove {', '.join(self.foreign)}": self.foreign,
            f"put back what was beside the weights; {SEAL_ADVICE.format(folder=self.folder)}": (
                self.side_files
            ),
        }
        return "; ".join(way for way, is_due in ways.items() if is_due)


def verify_folder(
    folder: str | os.PathLike, *, progress: Progress | None = None, beside: Collection[str] = ()
) -> Verdict:
    """Reads every byte of a layered folder and compares it with its manifest and its config; of a
    GGUF file the head alone.

    `beside`: names of other files that may be in the folder. Raises CheckpointError where the
    manifest or the config is missing or malformed, or StorageError.
    """
    folder, progress = model_at(folder), progress or Progress()
    if is_gguf(folder):
        return _of_gguf(folder)
    names = with_templates(folder, names_in(folder))
    if MANIFEST not in names:
        begun = JOURNAL in names or any(map(is_weight_file, names))
        advice = "run its conversion again, which resumes it" if begun else "convert it first"
        said = "its conversion has not ended" if begun else "no converted folder"
        raise CheckpointError(f"{folder}: no {MANIFEST}: {said}; {advice}")
    manifest, cfg = read_manifest(folder), read_config(folder)
    total = sum(entry.n_bytes for entry in manifest.files.values())
    unknown = sorted(names - manifest.files.keys() - {MANIFEST, *beside})
    foreign = [name for name in unknown if not is_side_file(name)]
    sides = {
        name: [f"{name} was added, and is not in the manifest"]
        for name in unknown
        if is_side_file(name)
    }
    damages = []
    progress.start(total)
    for name, entry in manifest.files.items():
        progress.file(name)
        found = list(_file_findings(folder, name, entry, progress))
        if entry.tensors:
            damages += found
        elif found:
            sides[name] = found
    by_config = list(_disagreements(manifest, cfg))
    if CONFIG not in sides:
        damages += by_config
    if INDEX in manifest.files and INDEX in names and not (damages or sides or foreign):
        damages += _index_findings(folder, manifest)
    return Verdict(
        folder,
        findings=(
            *(f"{name!a} is not part of it" for name in foreign),
            *(line for found in sides.values() for line in found),
            *(by_config if CONFIG in sides else ()),
            *damages,
        ),
        n_files=len(manifest.files) + 1,
        n_layers=cfg.num_hidden_layers,
        folder_bytes=total,
        side_files=tuple(sorted(sides)),
        foreign=tuple(ascii(name) for name in foreign),
        is_damaged=bool(damages),
    )


def _of_gguf(path) -> Verdict:
    """What a run checks of a GGUF file before it reads weights: all that is wrong is raised."""
    source = open_gguf(path)
    files = {file.path: file.n_bytes for file, _ in source.tensors.values()}
    return Verdict(
        path,
        findings=(),
        n_files=len(files),
        n_layers=source.cfg.num_hidden_layers,
        folder_bytes=sum(files.values()),
        has_checksums=False,
    )


def _disagreements(manifest: Manifest, cfg: ModelConfig) -> Iterator[str]:
    """In what the manifest is not that of a complete model of this config."""
    if manifest.family != cfg.model_type:
        yield f"the manifest is of family {manifest.family!a}, {CONFIG} of {cfg.model_type}"
    expected = weight_files(cfg, manifest.quantization)
    spans = _expected_spans(manifest, cfg)
    for name in (CONFIG, INDEX, *expected):
        if name not in manifest.files:
            yield f"{name} is not in the manifest"
    for name, entry in manifest.files.items():
        shapes = {tensor: place.shape for tensor, place in entry.tensors.items()}
        if entry.whole_shapes != expected.get(name, {}):
            yield f"{name} holds other tensors or shapes in the manifest than by {CONFIG}"
        elif entry.spans != {tensor: spans[tensor] for tensor in shapes if tensor in spans}:
            yield f"{name} holds other rows in the manifest than those of {manifest.host.words}"
        elif shapes:
            dtypes = {tensor: place.dtype for tensor, place in entry.tensors.items()}
            if encode_header(shapes, dtypes, whole=entry.whole_shapes)[1] != entry.tensors:
                yield f"{name} is not laid out as this format lays out files"


def _expected_spans(manifest, cfg):
    """Which rows of its tensors a folder should hold, of those of which not all."""
    if manifest.host is None:
        return {}
    spans = host_spans(cfg, manifest.quantization, manifest.host)
    return stored_spans(spans, manifest.quantization, published_tensors(cfg))


def _file_findings(folder, name, entry: FileEntry, progress) -> Iterator[str]:
    try:
        with links_followed():  # to another disk, say: its bytes are held against the manifest
            file = regular_file(folder, name)
        if entry.tensors and file.n_bytes != entry.n_bytes:
            yield f"{name} has {file.n_bytes} bytes, expected {entry.n_bytes}"
            return
        if entry.tensors and read_header(file.real).tensors != entry.tensors:
            yield f"{name} holds other tensors than the manifest says"
    except CheckpointError as error:
        yield str(error)
        return
    _, digest = hash_stream(file_chunks(file), lambda chunk: progress.advance(len(chunk)))
    if digest != entry.sha256:
        state = "is damaged" if entry.tensors else "was changed"
        yield f"{name} {state}: its SHA-256 is {digest}, expected {entry.sha256}"


def _index_findings(folder, manifest):
    tensors = {name: entry.tensors for name, entry in manifest.files.items() if entry.tensors}
    if read_small_file(os.path.join(folder, INDEX)) != encode_index(tensors):
        yield f"{INDEX} does not agree with the manifest"
