"""Exports a layered folder to a published form: Hugging Face shards, an Orbax checkpoint, or a
GGUF file.

Everything is written and synced in a folder beside the target, whose name marks it as unfinished;
then it is renamed. So an interrupted export leaves no target. The same command resumes: it keeps
the shards that are finished, after comparing the digests of their tensors; an Orbax checkpoint and
a GGUF file are written again from the start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from jlayer.checkpoint.digest import TensorDigest
from jlayer.checkpoint.layout import (
    CONFIG,
    INDEX,
    MANIFEST,
    encode_index,
    is_document,
    is_layered,
    read_manifest,
)
from jlayer.checkpoint.links import links_followed
from jlayer.checkpoint.sides import check_side_files
from jlayer.checkpoint.source import (
    SINGLE,
    names_in,
    read_published_config,
    regular_file,
)
from jlayer.config import own_quantization, parse_choice
from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import (
    Chunk,
    FileSource,
    Place,
    Room,
    Source,
    TensorInfo,
    open_unchanged,
    read_bytes,
)
from jlayer.convert.sources.open import CheckedSource, open_source
from jlayer.convert.sources.orbax import UNFINISHED, OrbaxWriter, first_line
from jlayer.convert.target.disk import (
    TEMPORARY,
    failure,
    make_folders,
    remove,
    sync_folder,
    uninterrupted,
)
from jlayer.convert.target.lock import LOCK, TargetLock
from jlayer.convert.target.space import check_space
from jlayer.convert.target.write import TargetWriter, refuse_inside
from jlayer.convert.transform.gguf_model import TYPES, gguf_file
from jlayer.convert.transform.outputs import SideFile, WeightFile
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError, UsageError
from jlayer.families.layout import FROM_GGUF
from jlayer.families.registry import published_tensors
from jlayer.gguf.parts import SUFFIX
from jlayer.small_files import FolderFiles
from jlayer.strict import close, is_there, read_json_object, resolve

FORMATS = ("huggingface", "orbax", "gguf")
SHARD_BYTES = 5_000_000_000
# The bytes that an Orbax checkpoint needs beside each array: metadata, and entries in two trees.
_ARRAY_BYTES = 16 << 10


@dataclass(frozen=True)
class Exported:
    """What an export did; `n_resumed` counts the files that an interrupted run had finished."""

    source: str
    target: str
    format: str
    n_files: int
    n_tensors: int
    target_bytes: int
    elapsed_s: float
    n_resumed: int = 0


def export_checkpoint(
    folder: str | os.PathLike,
    target: str | os.PathLike,
    *,
    format: str,
    type: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Writes the layered checkpoint in `folder` to the new folder `target`, or the new file of that
    name for GGUF. `type`: of the matrices of a GGUF, one of TYPES; None: as they are stored.

    Every tensor is checked against the digest in the manifest. Raises the errors of jlayer.errors.
    """
    started = time.monotonic()
    folder, target, progress = os.fspath(folder), os.fspath(target), progress or Progress()
    parse_choice(format, FORMATS, option="format")
    _check_type(format, type, target)
    refuse_inside(target, folder)
    _check_new(target, is_file=format == "gguf")
    source = _open_layered(folder)
    aside = os.path.normpath(target) + (UNFINISHED if format == "orbax" else TEMPORARY)
    try:
        with TargetLock(aside, note=progress.note):
            if format == "orbax":
                n_resumed, sizes = 0, _write_orbax(source, aside, progress)
            elif format == "gguf":
                n_resumed, sizes = 0, _write_gguf(source, type, aside, target, progress)
            else:
                n_resumed, sizes = _write_shards(source, aside, shard_bytes, progress)
            if format != "gguf":
                _put_in_place(aside, target)
        if format == "gguf":
            with contextlib.suppress(OSError):  # an interrupted export had left it
                uninterrupted(os.rmdir, aside)
    finally:
        source.tensors.close()
    return Exported(
        source=folder,
        target=target,
        format=format,
        n_files=len(sizes),
        n_tensors=len(source.tensors.tensors),
        target_bytes=sum(sizes.values()),
        elapsed_s=time.monotonic() - started,
        n_resumed=n_resumed,
    )


def _check_type(format, kind, target):
    if format != "gguf":
        if kind is not None:
            raise UsageError(f"type {kind} is of the format gguf alone; leave it out")
        return
    if kind is not None:
        parse_choice(kind, tuple(TYPES), option="type")
    if not target.endswith(SUFFIX):
        raise UsageError(f"{target}: expected the name of a file that ends in {SUFFIX}")


def _check_new(target, *, is_file):
    if not is_there(target, follow=False):
        return
    if is_file:
        raise UsageError(f"{target}: is there already; name a new file")
    if not os.path.isdir(target) or names_in(target):
        raise UsageError(f"{target}: is there already; name a new folder")


def _open_layered(folder) -> CheckedSource:
    names_in(folder)
    if not is_layered(folder):
        raise CheckpointError(f"{folder}: no {MANIFEST}: only a converted folder is exported")
    manifest = read_manifest(folder)
    if manifest.quantization is not None and manifest.quantization.scheme is not None:
        raise UnsupportedModelError(
            f"{folder}: quantized, and what was lost cannot be written back; export a folder that "
            "was converted without --quantize"
        )
    check_side_files(folder, manifest)
    if own_quantization(read_json_object(os.path.join(folder, CONFIG))) == FROM_GGUF:
        raise UnsupportedModelError(
            f"{folder}: converted from a GGUF file, whose rows and names are not the published "
            "ones, which is not exported; keep the file"
        )
    _refuse_stacks(folder)
    if manifest.quantization is not None:
        encodings = ", ".join(manifest.quantization.table.encodings)
        raise UnsupportedModelError(
            f"{folder}: its weights are encoded as they were published ({encodings}), which is not "
            "exported; keep the published folder, whose codes are the same"
        )
    digests = {
        tensor: digest
        for entry in manifest.files.values()
        for tensor, digest in entry.digests.items()
    }
    with links_followed():  # all that is read is held against the manifest
        source = open_source(folder)
    return replace(source, tensors=_VerifiedSource(source.tensors, digests))


def _refuse_stacks(folder):
    """Of a family whose experts are published as one tensor alone no other program would read what
    holds them one by one, as a layered folder does."""
    _, cfg = read_published_config(folder, [])
    if cfg.experts and any(stack.is_only for stack in cfg.experts.stacks):
        raise UnsupportedModelError(
            f"{folder}: a {cfg.model_type} cannot be exported: its experts are published as one "
            "tensor, and lie one by one here; keep the published folder"
        )


class _VerifiedSource:
    """The tensors of a layered folder; each is checked against its digest when it ends."""

    def __init__(self, source: Source, digests: dict[str, str]):
        self._source, self.digests = source, digests
        self.tensors = source.tensors
        self.where, self.places_of = source.where, source.places_of
        self.close = source.close

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        info = self.tensors[name]
        digest = TensorDigest(info.shape, info.n_bytes)
        for chunk in self._source.chunks(name, room):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != self.digests[name]:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name}: damaged: its digest is not that in the "
                "manifest; see jlayer verify"
            )


def _empty(aside, *, but: Collection[str] = (), note) -> None:
    """Removes the files of an interrupted export, except `but`; the caller holds the lock."""
    unfinished = names_in(aside) - {LOCK, *but}
    if unfinished:
        note(f"{aside}: removing what an interrupted export has not finished")
    for name in unfinished:
        path = os.path.join(aside, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            remove(path)


def _write_shards(source, aside, shard_bytes, progress):
    shards = _shards(source, shard_bytes, progress)
    index = encode_index({file.name: file.tensors for file in shards})
    sides = [*_sides(source), *([SideFile(INDEX, index)] if len(shards) > 1 else [])]
    finished = _finished(aside, shards, source.tensors.digests, progress)
    _empty(aside, but=finished, note=progress.note)
    outputs = [*(shard for shard in shards if shard.name not in finished), *sides]
    check_space(aside, [(output.name, output.n_bytes) for output in outputs], freed={})
    progress.start(sum(shard.source_bytes for shard in shards if shard.name not in finished))
    with TargetWriter(aside) as writer:
        for output in outputs:
            progress.file(output.name)
            writer.write(output.name, output.chunks(), n_bytes=output.n_bytes)
    return len(finished), {output.name: output.n_bytes for output in (*shards, *sides)}


def _finished(aside, shards, digests, progress) -> set[str]:
    """The names of the shards that an interrupted export has written as this one would."""
    names = names_in(aside)
    present = [shard for shard in shards if shard.name in names]
    if present:
        count = f"{len(present)} of {len(shards)} files"
        progress.note(f"{aside}: resuming: {count}; reading them again")
    progress.start(sum(shard.source_bytes for shard in present))
    return {shard.name for shard in present if _is_finished(aside, shard, digests, progress)}


def _is_finished(aside, shard, digests, progress):
    progress.file(shard.name)
    if not stat.S_ISREG(os.lstat(os.path.join(aside, shard.name)).st_mode):
        return False  # no export writes links, and what one leads to may not stay there
    file = regular_file(aside, shard.name)
    infos = {name: TensorInfo(entry.dtype, entry.shape) for name, entry in shard.tensors.items()}
    places = {name: (Place(name, file, entry.offset),) for name, entry in shard.tensors.items()}
    written = _VerifiedSource(FileSource(infos, places), digests)
    try:
        if file.n_bytes != shard.n_bytes or not _begins_with(file, shard.header):
            return False
        for name in infos:
            for chunk in written.chunks(name):
                progress.advance(len(chunk))
    except CheckpointError:
        return False
    finally:
        written.close()
    return True


def _begins_with(file, header):
    """Compares every byte: two headers with the same tensors may differ in metadata that
    transformers needs."""
    fd = open_unchanged(file)
    try:
        return read_bytes(fd, 0, len(header), file.path) == header
    finally:
        close(fd)


def _shards(source, shard_bytes, progress) -> list[WeightFile]:
    """Files of whole tensors in the order of the model, each of at most `shard_bytes`, or of one
    larger tensor."""
    groups, free = [], 0
    for name, shape in published_tensors(source.cfg).items():
        n_bytes = source.tensors.tensors[name].n_bytes
        if not groups or n_bytes > free:
            groups.append({})
            free = shard_bytes
        groups[-1][name] = shape
        free -= n_bytes
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return [
        WeightFile(
            name,
            shapes,
            source.tensors,
            dtype=None,
            allow_nonfinite=True,
            progress=progress,
        )
        for name, shapes in zip(names if len(groups) > 1 else [SINGLE], groups, strict=True)
    ]


def _write_orbax(source, aside, progress):
    _empty(aside, note=progress.note)
    tensors = source.tensors.tensors
    sides = _sides(source)
    sizes = {name: info.n_bytes + _ARRAY_BYTES for name, info in tensors.items()}
    check_space(aside, [*sizes.items(), *((side.name, side.n_bytes) for side in sides)], freed={})
    progress.start(sum(info.n_bytes for info in tensors.values()))
    arrays = OrbaxWriter(os.path.abspath(aside))
    for name in published_tensors(source.cfg):
        progress.file(name)
        try:
            arrays.write(name, tensors[name], _counted(source.tensors.chunks(name), progress))
        except (ValueError, OSError) as error:
            raise _write_failure(aside, name, error) from None
    with TargetWriter(aside) as writer:
        for side in sides:
            writer.write(side.name, side.chunks(), n_bytes=side.n_bytes)
        for name, content in arrays.finish().items():
            writer.write(name, [content], n_bytes=len(content))
    written = {}
    for where, _, names in os.walk(aside):
        sync_folder(where)
        paths = [os.path.join(where, name) for name in names if name != LOCK]
        written |= {path: os.path.getsize(path) for path in paths}
    return written


def _write_gguf(source, kind, aside, target, progress):
    """Writes the file in the folder `aside`, and renames it to `target`."""
    _empty(aside, note=progress.note)
    files = FolderFiles(source.folder)
    small = {name: files.read(name) for name in source.side_files if not is_document(name)}
    file = gguf_file(source, small, kind=kind, progress=progress)
    name = os.path.basename(target)
    check_space(aside, [(name, file.n_bytes)], freed={})
    progress.start(file.source_bytes)
    progress.file(name)
    with TargetWriter(aside) as writer:
        writer.write(name, file.chunks(), n_bytes=file.n_bytes)
    _check_new(target, is_file=True)  # another process may have made it meanwhile
    try:
        uninterrupted(os.rename, os.path.join(aside, name), target)
    except OSError as error:
        raise failure(target, error, "put in place") from None
    sync_folder(os.path.dirname(resolve(target, strict=False)))
    return {name: file.n_bytes}


def _write_failure(aside, name, error):
    """The error to raise for one of tensorstore's, which has the system's error only as words."""
    full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
    if full:
        return failure(aside, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "written")
    return StorageError(f"{aside}: array {name} cannot be written ({first_line(error)})")


def _counted(chunks, progress):
    for chunk in chunks:
        progress.advance(len(chunk))
        yield chunk


def _sides(source):
    """Config and tokenizer files, as they are in the layered folder."""
    others = [SideFile(name, file) for name, file in source.side_files.items() if name != CONFIG]
    return [*others, SideFile(CONFIG, source.config_bytes)]


def _put_in_place(aside, target):
    sync_folder(aside)
    parent = os.path.dirname(resolve(target, strict=False))
    make_folders(parent)
    try:
        uninterrupted(os.rename, aside, target)
    except OSError as error:
        raise failure(target, error, "put in place") from None
    remove(os.path.join(target, LOCK))
    sync_folder(parent)
