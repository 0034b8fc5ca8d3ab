"""The weights of an export as safetensors files, and which of them an interrupted one has finished.

Every tensor is whole, and is checked on its way against the digest that the manifest has.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping

from jlayer.checkpoint.digest import TensorDigest
from jlayer.checkpoint.layout import encode_header
from jlayer.checkpoint.source import SINGLE, names_in, regular_file
from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import (
    Chunk,
    FileSource,
    Place,
    Room,
    Source,
    open_unchanged,
    read_bytes,
)
from jlayer.convert.transform.published import PublishedSource
from jlayer.errors import CheckpointError
from jlayer.sizes import counted
from jlayer.strict import close


class VerifiedSource:
    """The tensors of a layered folder; each is checked against its digest when it ends."""

    def __init__(self, source: Source, digests: Mapping[str, str]):
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


class ShardFile:
    """A safetensors file of an export; `tensors`: what it holds, in the order of the file."""

    def __init__(
        self,
        name: str,
        shapes: dict[str, tuple[int, ...]],
        source: PublishedSource,
        progress: Progress,
    ):
        self.name, self._source, self._progress = name, source, progress
        dtypes = {tensor: source.tensors[tensor].dtype for tensor in shapes}
        self.header, self.tensors = encode_header(shapes, dtypes)
        self.source_bytes = sum(entry.n_bytes for entry in self.tensors.values())
        self.n_bytes = len(self.header) + self.source_bytes

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        """The file's bytes. Raises CheckpointError where the layered folder is damaged."""
        yield self.header
        for tensor in self.tensors:
            for chunk in self._source.chunks(tensor, room):
                self._progress.advance(len(chunk))
                yield chunk


def shards_of(source: PublishedSource, shard_bytes: int, progress: Progress) -> list[ShardFile]:
    """Files of whole tensors in the order of the model, each of at most `shard_bytes`, or of one
    larger tensor."""
    groups, free = [], 0
    for name, info in source.tensors.items():
        if not groups or info.n_bytes > free:
            groups.append({})
            free = shard_bytes
        groups[-1][name] = info.shape
        free -= info.n_bytes
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return [
        ShardFile(name, shapes, source, progress)
        for name, shapes in zip(names if len(groups) > 1 else [SINGLE], groups, strict=True)
    ]


def finished_shards(
    aside: str, shards: list[ShardFile], source: PublishedSource, progress: Progress
) -> set[str]:
    """The names of the shards that an interrupted export has written as this one would."""
    names = names_in(aside)
    present = [shard for shard in shards if shard.name in names]
    if present:
        count = f"{len(present)} of {counted(len(shards), 'file')}"
        progress.note(f"{aside}: resuming: {count}; reading them again")
    progress.start(sum(shard.source_bytes for shard in present))
    return {shard.name for shard in present if _is_finished(aside, shard, source, progress)}


def _is_finished(aside, shard, source, progress):
    progress.file(shard.name)
    if not stat.S_ISREG(os.lstat(os.path.join(aside, shard.name)).st_mode):
        return False  # no export writes links, and what one leads to may not stay there
    file = regular_file(aside, shard.name)
    if file.n_bytes != shard.n_bytes or not _has(file, 0, [shard.header]):
        return False
    infos, places = _parts_in(file, shard, source)
    written = VerifiedSource(FileSource(infos, places), source.digests)
    try:
        for name in infos:
            for chunk in written.chunks(name):
                progress.advance(len(chunk))
    except CheckpointError:
        return False
    finally:
        written.close()
    return all(_is_made(file, name, entry, source) for name, entry in shard.tensors.items())


def _parts_in(file, shard, source):
    """(what each tensor of the layered folder is, where it lies in a shard), of those that lie
    there as they are."""
    infos, places = {}, {}
    for name, entry in shard.tensors.items():
        at, row = entry.offset, source.made[name]
        for part in row.parts if row.make is None else ():
            infos[part] = source.stored[part]
            places[part] = (Place(name, file, at),)
            at += infos[part].n_bytes
    return infos, places


def _is_made(file, name, entry, source):
    """Whether a tensor of a shard is what is made of others; those are read for it."""
    row = source.made[name]
    is_as_it_is = row.make is None and row.content is None
    return is_as_it_is or _has(file, entry.offset, source.chunks(name))


def _has(file, offset, chunks):
    """Whether these bytes are in a file. Compares every byte: two headers with the same tensors may
    differ in metadata that transformers needs."""
    fd = open_unchanged(file)
    try:
        for chunk in chunks:
            if read_bytes(fd, offset, len(chunk), file.path) != chunk:
                return False
            offset += len(chunk)
    finally:
        close(fd)
    return True
