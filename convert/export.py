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
import json
import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from jlayer.checkpoint.encoded import form_of
from jlayer.checkpoint.layout import (
    BESIDE,
    CONFIG,
    INDEX,
    MANIFEST,
    encode_index,
    is_document,
    is_layered,
    read_manifest,
)
from jlayer.checkpoint.links import links_followed
from jlayer.checkpoint.orbax_errors import first_line
from jlayer.checkpoint.rows import check_host
from jlayer.checkpoint.sides import check_side_files
from jlayer.checkpoint.source import names_in, read_published_config, regular_file, side_files
from jlayer.checkpoint.store import locate
from jlayer.config import own_quantization, parse_choice
from jlayer.convert.progress import Progress
from jlayer.convert.sources.beside import decode_beside
from jlayer.convert.sources.files import FileSource, Place, TensorInfo
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.sources.orbax import UNFINISHED, OrbaxWriter
from jlayer.convert.target.disk import (
    TEMPORARY,
    failure,
    make_folders,
    remove,
    sync_folder,
    uninterrupted,
)
from jlayer.convert.target.lock import TargetLock
from jlayer.convert.target.shards import VerifiedSource, finished_shards, shards_of
from jlayer.convert.target.space import check_space
from jlayer.convert.target.write import TargetWriter, refuse_inside
from jlayer.convert.transform.gguf_model import TYPES, gguf_file
from jlayer.convert.transform.outputs import SideFile
from jlayer.convert.transform.published import PublishedSource, made_of
from jlayer.durable import LOCK
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError, UsageError
from jlayer.families.layout import FROM_GGUF
from jlayer.families.registry import is_of_another_part, published_tensors
from jlayer.gguf.parts import SUFFIX
from jlayer.small_files import FolderFiles
from jlayer.strict import is_there, resolve

FORMATS = ("huggingface", "orbax", "gguf")
SHARD_BYTES = 5_000_000_000
# What chooses the tokens that a layer attends to (DeepSeek V3.2): a tensor of it.
_INDEXER = "model.layers.0.self_attn.indexer.wk.weight"
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
    source = _open_layered(folder, format)
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


def _open_layered(folder, format) -> CheckedSource:
    names_in(folder)
    if not is_layered(folder):
        raise CheckpointError(f"{folder}: no {MANIFEST}: only a converted folder is exported")
    manifest = read_manifest(folder)
    check_host(folder, manifest.host)
    if manifest.quantization is not None and manifest.quantization.scheme is not None:
        raise UnsupportedModelError(
            f"{folder}: quantized, and what was lost cannot be written back; export a folder that "
            "was converted without --quantize"
        )
    check_side_files(folder, manifest)
    config_bytes, cfg = read_published_config(folder, [])
    said = own_quantization(json.loads(config_bytes))
    _refuse_others(folder, format, cfg, manifest.quantization, is_from_gguf=said == FROM_GGUF)
    with links_followed():  # all that is read is held against the manifest
        tensors, sides = _stored(folder, cfg, manifest), side_files(folder, names_in(folder))
    source = CheckedSource(folder, cfg, config_bytes, tensors, sides, (), manifest.quantization)
    return _as_published(source) if format == "huggingface" else source


def _stored(folder, cfg, manifest) -> VerifiedSource:
    """The tensors and pieces that a layered folder holds."""
    located, _ = locate(folder, cfg, manifest)
    files = {path: regular_file(folder, os.path.basename(path)) for path, _ in located.values()}
    infos = {name: TensorInfo(entry.dtype, entry.shape) for name, (_, entry) in located.items()}
    places = {
        name: (Place(name, files[path], entry.offset),) for name, (path, entry) in located.items()
    }
    digests = {
        tensor: digest
        for entry in manifest.files.values()
        for tensor, digest in entry.digests.items()
    }
    return VerifiedSource(FileSource(infos, places), digests)


def _as_published(source):
    tensors, beside = source.tensors, {}
    if BESIDE in source.side_files:
        raw = FolderFiles(source.folder).read(BESIDE)
        beside = decode_beside(raw, where=os.path.join(source.folder, BESIDE))
    made = made_of(source.cfg, source.quantization, tensors.tensors, beside, where=source.folder)
    return replace(source, tensors=PublishedSource(tensors, tensors.digests, made))


def _refuse_others(folder, format, cfg, quantization, *, is_from_gguf):
    """Raises UnsupportedModelError for what the form to write has no place for."""
    if is_from_gguf:
        if format != "gguf":
            raise UnsupportedModelError(
                f"{folder}: converted from a GGUF file, whose rows and names are not the published "
                "ones; export with --format gguf"
            )
        return
    form, what = form_of(cfg), cfg.model_type
    if is_of_another_part(cfg, _INDEXER):
        raise UnsupportedModelError(
            f"{folder}: a {what} cannot be exported: its indexer, which texts beyond some length "
            "need, was left out when it was converted; keep the published folder"
        )
    encodings = ", ".join(quantization.table.encodings) if quantization else ""
    if encodings and form is None:
        raise CheckpointError(
            f"{os.path.join(folder, CONFIG)}: says nothing of the encodings ({encodings}) that "
            "weights have; put back its quantization_config"
        )
    if encodings and not form.is_exported:
        how = "repacked" if form.is_repacked else "taken"
        raise UnsupportedModelError(
            f"{folder}: {how} from {form.method} when it was converted ({encodings}), and its "
            "own layout is not written back; keep the published folder"
        )
    if encodings and format != "huggingface":
        raise UnsupportedModelError(
            f"{folder}: its weights are encoded as they were published ({encodings}), which "
            f"{format} has no place for; export with --format huggingface"
        )
    if format == "orbax" and cfg.experts and any(one.is_only for one in cfg.experts.stacks):
        raise UnsupportedModelError(
            f"{folder}: a {what} cannot be exported to Orbax: its experts are published as one "
            "tensor, and lie one by one here; export with --format huggingface"
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
    shards = shards_of(source.tensors, shard_bytes, progress)
    index = encode_index({file.name: file.tensors for file in shards})
    sides = [*_sides(source), *([SideFile(INDEX, index)] if len(shards) > 1 else [])]
    finished = finished_shards(aside, shards, source.tensors, progress)
    _empty(aside, but=finished, note=progress.note)
    outputs = [*(shard for shard in shards if shard.name not in finished), *sides]
    check_space(aside, [(output.name, output.n_bytes) for output in outputs], freed={})
    progress.start(sum(shard.source_bytes for shard in shards if shard.name not in finished))
    with TargetWriter(aside) as writer:
        for output in outputs:
            progress.file(output.name)
            writer.write(output.name, output.chunks(), n_bytes=output.n_bytes)
    return len(finished), {output.name: output.n_bytes for output in (*shards, *sides)}


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
    own = (CONFIG, BESIDE)
    others = [SideFile(name, file) for name, file in source.side_files.items() if name not in own]
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
