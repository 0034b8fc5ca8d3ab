"""Blocks of kept prompts on disk: a safetensors file each, with a digest of every array.

A block has the cache entries of some tokens, of all layers. Blocks are written, and read, some
together, a layer of all of them at a time: so the pools are called once a layer, however many
blocks a prompt has, several threads have the disk, and host memory holds two layers of them more.

Orbax, which saved runs are written with, takes 2 to 3 ms for each array it reads (2 cores), and a
block of an 80-layer model has 160 of one MiB or less.
"""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from jlayer.checkpoint.safetensors import TensorEntry, encode_tensors, read_header
from jlayer.durable import FULL, sync_folder, write_all
from jlayer.engine.caches import Caches
from jlayer.engine.entries import LAYER, PART_BYTES, Where
from jlayer.engine.states import UNFINISHED, check_room
from jlayer.errors import CheckpointError, StorageError
from jlayer.streaming.direct import n_readers
from jlayer.strict import close, open_regular, parse_json_object

SUFFIX = ".safetensors"
MOST_TOGETHER = 64  # files that are open at a time
REQUEST_BYTES = 4 << 20
_FACTS, _SUM = "jlayer-block", "jlayer-digest"  # in the header's metadata
_NO_SUM = "0" * 32


@dataclass(frozen=True)
class NewBlock:
    """A block that is to be written. `facts`: what is said of it, for JSON. `where`: its entries in
    the pools of `caches`."""

    path: str
    facts: Mapping
    where: Where
    caches: Caches

    @cached_property
    def structs(self) -> dict[str, tuple]:
        """The dtype and shape of each of its arrays, by name."""
        return _structs(self.caches, self.where)

    @cached_property
    def n_bytes(self) -> int:
        """Of its file."""
        header, tensors = self.header(dict.fromkeys(self.structs, _NO_SUM))
        return len(header) + sum(entry.n_bytes for entry in tensors.values())

    @property
    def layer_bytes(self) -> int:
        """Of the layer that has most of it."""
        return bytes_of_layer(self.caches, self.where)

    def header(self, digests: Mapping[str, str]) -> tuple[bytes, dict[str, TensorEntry]]:
        """What its file begins with, as long whatever the digests are; and where each array is."""
        facts = json.dumps({"facts": dict(self.facts), "digests": dict(digests)}, sort_keys=True)
        return encode_tensors(self.structs, {_FACTS: facts, _SUM: _digest(facts.encode())})


@dataclass(frozen=True)
class Block:
    """A block that is open for reading. `facts`: as they were written."""

    path: str
    facts: dict
    tensors: Mapping[str, TensorEntry]
    digests: Mapping[str, str]
    fd: int

    def read(self, name: str, into: np.ndarray) -> None:
        """Fills an array with one of the block. Raises CheckpointError where it is damaged, or
        StorageError."""
        view, entry = memoryview(into.reshape(-1).view(np.uint8)), self.tensors[name]
        done = 0
        try:
            while done < entry.n_bytes:
                request = view[done : done + REQUEST_BYTES]
                count = os.preadv(self.fd, [request], entry.offset + done)
                if not count:
                    raise _damaged(self.path, f"it ends in {name}")
                done += count
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None
        if _digest(view) != self.digests.get(name):
            raise _damaged(self.path, f"{name} is not that of its digest")


@dataclass(frozen=True)
class Wanted:
    """A block, and who wants it: each the pool rows of its entries without so many of the first
    ones, which it has."""

    block: Block
    targets: Sequence[tuple[Where, int]]


@contextmanager
def opened(paths: Iterable[str]) -> Iterator[list[Block]]:
    """Opens blocks. Raises CheckpointError for one that is damaged or missing, or StorageError."""
    with ExitStack() as stack:
        blocks = []
        for path in paths:
            blocks.append(_opened(path))
            stack.callback(close, blocks[-1].fd)
        yield blocks


def bytes_of_layer(caches: Caches, where: Where, n_there: int = 0) -> int:
    """Of a block's entries of the layer that has most, of which `n_there` are not listed."""
    counts = [len(where(spec)) for spec in caches.specs]
    sizes = [(n + n_there) * caches.entry_bytes(layer) for layer, n in enumerate(counts) if n]
    return max(sizes, default=0)


def together(blocks: Sequence, layer_bytes: Sequence[int]) -> Iterator[Sequence]:
    """Blocks in groups that are open at a time, of which a layer takes about PART_BYTES at most.
    `layer_bytes`: of each."""
    first = 0
    while first < len(blocks):
        most, end, n_bytes = _most_open(), first + 1, layer_bytes[first]
        while end < min(first + most, len(blocks)) and n_bytes + layer_bytes[end] <= PART_BYTES:
            n_bytes += layer_bytes[end]
            end += 1
        yield blocks[first:end]
        first = end


def _most_open():
    """So many files as leave half of the descriptors of this process that are free to others."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return MOST_TOGETHER
    return max(1, min(MOST_TOGETHER, (most - len(os.listdir("/dev/fd"))) // 2))


def place_blocks(caches: Caches, wanted: Sequence[Wanted]) -> None:
    """Reads blocks into the pools. Raises CheckpointError for one that is damaged, or
    StorageError; then any of the rows may have been written."""
    for one in wanted:
        _check(caches, one)
    with ThreadPoolExecutor(n_readers(), thread_name_prefix="jlayer-kept-block") as pool:
        coming = None
        for layer in range(len(caches.specs)):
            following = _Coming(caches, layer, wanted, pool)
            if coming is not None:
                coming.place()
            coming = following
        if coming is not None:
            coming.place()


class _Coming:
    """A layer of some blocks, which is being read."""

    def __init__(self, caches, layer, wanted, pool):
        self._caches, self._layer = caches, layer
        self._spec = caches.specs[layer]
        self._parts = []  # (targets, the first of a block's entries in the arrays, how many)
        n_entries = 0
        for one in wanted:
            n_own = _length(self._spec, one)
            self._parts.append((one.targets, n_entries, n_own))
            n_entries += n_own
        structs = caches.struct(layer, n_entries) if n_entries else {}
        self._arrays = {name: np.empty(*how) for name, how in structs.items()}
        self._reads = [
            pool.submit(
                one.block.read,
                f"{LAYER.format(layer)}.{name}",
                array[first : first + count],
            )
            for one, (_, first, count) in zip(wanted, self._parts, strict=True)
            for name, array in self._arrays.items()
            if count
        ]

    def place(self):
        """Waits for it, and writes it into the layer's pool."""
        _settled(self._reads)
        if not self._arrays:
            return
        rows, places = [], []
        for targets, first, count in self._parts:
            for where, n_there in targets if count else ():
                rows.append(where(self._spec))
                places.append(slice(first + n_there, first + count))
        arrays = self._arrays
        if not _are_all(places, sum(count for _, _, count in self._parts)):
            arrays = {
                name: np.concatenate([array[place] for place in places])
                for name, array in arrays.items()
            }
        self._caches.place(self._layer, np.concatenate(rows), arrays)


def _length(spec, wanted: Wanted) -> int:
    """How many entries a block has of a layer."""
    where, n_there = wanted.targets[0]
    n_own = len(where(spec))
    return n_own + n_there if n_own else 0


def write_blocks(blocks: Sequence[NewBlock]) -> None:
    """Writes blocks into one folder: each appears whole, the first ones first, and all are on the
    disk when this returns. Raises StorageError; nothing is left then of those that are not
    whole."""
    if not blocks:
        return
    parent = os.path.dirname(blocks[0].path)
    with _kept_at(blocks[0].path), ExitStack() as stack:
        os.makedirs(parent, exist_ok=True)
        check_room(parent, sum(block.n_bytes for block in blocks))
        files = [stack.enter_context(_writing(block)) for block in blocks]
        with ThreadPoolExecutor(n_readers(), thread_name_prefix="jlayer-kept-block") as pool:
            _write_layers(files, pool)
            _settled([pool.submit(file.finish) for file in files])
        for file in files:
            file.appear()
        sync_folder(parent)


@contextmanager
def _kept_at(path):
    """Says of an error where a block cannot be kept, and what to do."""
    try:
        yield
    except OSError as error:
        advice = ""
        if error.errno in FULL:
            advice = "; free some space, or name a folder on another disk"
        elif error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
            advice = "; remove it"
        raise StorageError(f"{path}: cannot be kept ({error.strerror}){advice}") from None


def _write_layers(files, pool):
    caches = files[0].block.caches
    writes = []
    for layer, spec in enumerate(caches.specs):
        rows = [file.block.where(spec) for file in files]
        arrays = caches.entries(layer, np.concatenate(rows)) if any(map(len, rows)) else {}
        _settled(writes)
        writes, first = [], 0
        for file, own in zip(files, rows, strict=True):
            for name, array in arrays.items() if len(own) else ():
                part = array[first : first + len(own)]
                writes.append(pool.submit(file.write, f"{LAYER.format(layer)}.{name}", part))
            first += len(own)
    _settled(writes)


@contextmanager
def _writing(block):
    """A file beside the block's, which is gone afterwards if it has not become it."""
    aside = block.path + UNFINISHED
    with _kept_at(aside):
        with suppress(FileNotFoundError):
            os.unlink(aside)  # what a killed process has left, or a link or FIFO
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    file = None
    try:
        file = _File(block, fd)
        yield file
    finally:
        close(fd)
        if file is None or not file.is_whole:
            with suppress(OSError):  # the error that came before is told of
                os.unlink(aside)


class _File:
    """The file of a block that is being written."""

    def __init__(self, block: NewBlock, fd: int):
        self.block, self.is_whole = block, False
        self._fd = fd
        self._digests = dict.fromkeys(block.structs, _NO_SUM)
        _, self._tensors = block.header(self._digests)

    def write(self, name, array):
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        with _kept_at(self.block.path):
            write_all(self._fd, data, self._tensors[name].offset)
        self._digests[name] = _digest(data)

    def finish(self):
        header, _ = self.block.header(self._digests)
        with _kept_at(self.block.path):
            write_all(self._fd, header, 0)
            os.fsync(self._fd)

    def appear(self):
        with _kept_at(self.block.path):
            os.rename(self.block.path + UNFINISHED, self.block.path)
        self.is_whole = True


def _opened(path):
    try:
        header = read_header(path)
        said = header.metadata[_FACTS].encode()
        if header.metadata[_SUM] != _digest(said):
            raise ValueError("its facts are not those of their digest")
        found = parse_json_object(said, what="its facts")
        facts, digests = found["facts"], found["digests"]
        if not isinstance(facts, dict) or not isinstance(digests, dict):
            raise ValueError("its facts are of another form")
        fd = open_regular(path)
    except KeyError as error:
        raise _damaged(path, f"it has no {error.args[0]}") from None
    except (CheckpointError, ValueError) as error:
        # What to do with a file that was fetched does not help with one that was written here.
        raise _damaged(path, str(error).removeprefix(f"{path}: ").partition(";")[0]) from None
    return Block(path, facts, header.tensors, digests, fd)


def _check(caches, wanted):
    """Whether a block has the arrays that its place has."""
    for where, n_there in wanted.targets:
        expected = _structs(caches, where, n_there)
        tensors = wanted.block.tensors.items()
        if {name: (entry.dtype, entry.shape) for name, entry in tensors} != expected:
            raise _damaged(wanted.block.path, "its arrays are not those of this model")


def _structs(caches, where, n_there=0):
    found = {}
    for layer, spec in enumerate(caches.specs):
        if n_own := len(where(spec)):
            for name, (shape, dtype) in caches.struct(layer, n_own + n_there).items():
                found[f"{LAYER.format(layer)}.{name}"] = np.dtype(dtype).name, shape
    return found


def _are_all(places, count):
    """Whether these are all of so many, in order."""
    ends = [0, *(place.stop for place in places)]
    return ends[-1] == count and [place.start for place in places] == ends[:-1]


def _settled(futures: Sequence[Future]) -> None:
    """Waits for all; raises the error of the first that has one."""
    errors = [future.exception() for future in futures]
    for error in filter(None, errors):
        raise error


def _digest(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def _damaged(path, why):
    return CheckpointError(f"{path}: a damaged block of a kept prompt ({why}); remove it")
