"""Orbax checkpoints: a tree of arrays under published names, each layer apart or stacked on a first
axis. Read and written one tensor at a time.

Uses tensorstore, as Orbax itself does, and imports neither Orbax nor JAX: their own functions hold
the whole tree in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.links import real_path
from jlayer.checkpoint.names import Names
from jlayer.checkpoint.orbax_errors import first_line
from jlayer.checkpoint.source import (
    SourceFile,
    Stored,
    json_of,
    names_in,
    refuse_different,
    regular_file,
)
from jlayer.convert.sources.files import (
    CHUNK_BYTES,
    Chunk,
    Place,
    Room,
    TensorInfo,
    are_same,
    row_bytes,
)
from jlayer.convert.sources.zarr import ChunkedArray, chunked_array
from jlayer.errors import CheckpointError
from jlayer.families.base import LAYER_PREFIX
from jlayer.interrupts import imported
from jlayer.strict import is_tensor_name, is_there, resolve

METADATA = "_METADATA"
ITEMS = ("default", "params", "items")  # names of the parameters in a CheckpointManager's step
UNFINISHED = ".orbax-checkpoint-tmp"
MAX_ARRAYS = 200_000
# The largest chunk, of whole rows, that is written.
CHUNK_ROWS_BYTES = 64 << 20
_STACKED = re.compile(r"model\.layers\.(?![0-9])(.+)")
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: the item of the source folder that holds it, and its arrays' names."""

    folder: str
    item: str
    metadata: SourceFile
    arrays: tuple[str, ...]
    uses_ocdbt: bool
    driver: str


def find_checkpoint(folder: str, names: Iterable[str]) -> Checkpoint | None:
    """The Orbax checkpoint in `folder` or in an item of it; None where there is none.

    Raises CheckpointError: an unfinished save, several steps to choose from, malformed metadata.
    """
    names = sorted(names)
    own = os.path.basename(os.path.abspath(folder))
    unfinished = [name for name in (own, *names) if UNFINISHED in name]
    if unfinished:
        raise CheckpointError(
            f"{folder}: {listed(unfinished)}: an unfinished Orbax save; name a finished one, or "
            "remove it"
        )
    if METADATA in names:
        return _read_metadata(folder, "")
    for item in ITEMS:
        if item in names and is_there(os.path.join(folder, item, METADATA)):
            return _read_metadata(folder, item)
    steps = [name for name in names if name.isdigit() and os.path.isdir(os.path.join(folder, name))]
    if steps and all(names_in(os.path.join(folder, step)) & {*ITEMS, METADATA} for step in steps):
        raise CheckpointError(
            f"{folder}: holds the steps {listed(steps)}; name one, as {folder}/{steps[-1]}"
        )
    return None


def _read_metadata(folder, item):
    file = regular_file(folder, os.path.join(item, METADATA))
    metadata = json_of(file)
    try:
        keys = [
            [str(step["key"]) for step in entry["key_metadata"]]
            for entry in metadata["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")
        ]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        arrays, uses_ocdbt = tuple(".".join(key) for key in keys), bool(metadata.get("use_ocdbt"))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.path}: not what Orbax writes ({error!r})") from None
    if len(arrays) > MAX_ARRAYS:
        raise CheckpointError(f"{file.path}: {len(arrays)} arrays, over the limit of {MAX_ARRAYS}")
    odd = [name for name in arrays if "/" in name or not is_tensor_name(name)]
    if odd:
        raise CheckpointError(f"{file.path}: not names that arrays may have: {listed(odd)}")
    return Checkpoint(folder, item, file, arrays, uses_ocdbt, driver)


class OrbaxSource:
    """Tensors of a checkpoint, each streamed from the chunks of its array.

    An array in an encoding that Orbax does not write is read whole, by tensorstore.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._path = os.path.join(checkpoint.folder, checkpoint.item)
        self._files = tuple(_files(checkpoint))
        self._stores = _open_arrays(checkpoint, self._path)
        self._chunked: dict[str, ChunkedArray | None] = {}
        self._copies: dict[str, list[str]] = {}
        self.tensors: dict[str, TensorInfo] = {}

    def table(
        self, n_layers: int, spelling: Names
    ) -> tuple[dict[str, tuple[Stored, TensorInfo]], list[str]]:
        """The tensors by published name, a stacked array as its layers; and what is wrong."""
        table, problems = {}, []
        self._at = {}
        where = self._checkpoint.metadata.path
        for name_here, (key, store) in spelling.renamed(
            {key: (key, store) for key, store in self._stores.items()}, where=where
        ).items():
            stacked = _STACKED.fullmatch(name_here)
            shape, dtype = tuple(store.shape), store.dtype.name
            if stacked and shape[:1] != (n_layers,):
                problems.append(
                    f"{key} is {list(shape)}, stacked layers, of which config.json has {n_layers}"
                )
                continue
            layers = range(n_layers) if stacked else [None]
            for layer in layers:
                name = name_here if layer is None else LAYER_PREFIX.format(layer=layer) + stacked[1]
                if name in table:
                    problems.append(f"{name} is there by itself and in the stacked {key}")
                info = TensorInfo(dtype, shape if layer is None else shape[1:])
                table[name] = (Stored(name, self._checkpoint.metadata), info)
                self._at[name] = (key, layer)
        return table, problems

    def take(self, checked: Mapping[str, list[tuple[Stored, TensorInfo]]]) -> None:
        """Sets the model's tensors, each with its copies, as the checks have found them."""
        self.tensors = {name: copies[0][1] for name, copies in checked.items()}
        self._copies = {name: [at.name for at, _ in copies] for name, copies in checked.items()}

    def are_equal(self, one: tuple[Stored, TensorInfo], other: tuple[Stored, TensorInfo]) -> bool:
        """Whether two of the table's tensors, of one dtype and shape, hold the same bytes."""
        self.take({place.name: [(place, info)] for place, info in (one, other)})
        return are_same(*(self.chunks(place.name) for place, _ in (one, other)))

    def where(self, name: str) -> str:
        return self._path

    def places_of(self, name: str) -> tuple[Place, ...]:
        """Every file of the checkpoint: only tensorstore knows which of them hold a tensor."""
        return tuple(Place(name, file, 0) for file in self._files)

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        info, (taken, *copies) = self.tensors[name], self._copies[name]
        tensors = [self._tensor(copy) for copy in (taken, *copies)]
        step = CHUNK_BYTES
        if not all(tensor.in_order for tensor in tensors):
            step = max(1, CHUNK_BYTES // row_bytes(info)) * row_bytes(info)
            room = None  # lent memory may end within a row
        at, memory = 0, room or _memory
        while at < info.n_bytes:
            view = memory(min(step, info.n_bytes - at))
            tensors[0].read_into(view, at)
            for copy, tensor in zip(copies, tensors[1:], strict=True):
                other = _memory(len(view))
                tensor.read_into(other, at)
                if not np.array_equal(np.frombuffer(view, np.uint8), other):
                    metadata = self._checkpoint.metadata
                    refuse_different(Stored(copy, metadata), Stored(taken, metadata))
            yield view
            at += len(view)

    def _tensor(self, name):
        key, layer = self._at[name]
        if key not in self._chunked:
            self._chunked[key] = chunked_array(self._stores[key], is_stacked=layer is not None)
        return _Tensor(self._path, key, layer, self._stores[key], self._chunked[key])

    def close(self) -> None:
        for array in self._chunked.values():
            if array is not None:
                array.close()


class _Tensor:
    """An array of a checkpoint, or one layer of a stacked array.

    `in_order` is False where only whole rows can be read.
    """

    def __init__(self, path, key, layer, store, chunked: ChunkedArray | None):
        self._path, self._key, self._layer = path, key, layer
        self._store, self._chunked, self._whole = store, chunked, None
        self.in_order = chunked is None or chunked.in_order

    def read_into(self, view: memoryview, at: int) -> None:
        with _refused(self._path, self._key, "read"):
            if self._chunked is not None:
                self._chunked.read_into(view, at, self._layer or 0)
            else:
                view[:] = self._bytes()[at : at + len(view)]

    def _bytes(self):
        if self._whole is None:
            store = self._store if self._layer is None else self._store[self._layer]
            array = np.ascontiguousarray(store.read().result())
            self._whole = memoryview(array.reshape(-1).view(np.uint8))
        return self._whole


def _memory(n_bytes):
    return memoryview(bytearray(n_bytes))


def _files(checkpoint):
    """Every file of the checkpoint, checked to be a regular file inside it."""
    top = os.path.join(checkpoint.folder, checkpoint.item)
    for where, folders, names in os.walk(top, followlinks=True):  # tensorstore follows them, too
        folders.sort()
        for name in folders:
            path = os.path.join(where, name)
            real = real_path(checkpoint.folder, path)
            if f"{resolve(where)}{os.sep}".startswith(f"{real}{os.sep}"):
                raise CheckpointError(f"{path}: a loop of links, to {real}; expected a folder")
        for name in sorted(names):
            path = os.path.relpath(os.path.join(where, name), checkpoint.folder)
            yield regular_file(checkpoint.folder, path)


def _open_arrays(checkpoint, path):
    """Opens every array, which reads its shape and dtype only."""
    ts = imported("tensorstore")

    spec = {"driver": checkpoint.driver, "fill_missing_data_reads": False}
    opening = {}
    for name in checkpoint.arrays:
        kvstore = _kvstore(path, name, uses_ocdbt=checkpoint.uses_ocdbt)
        opening[name] = ts.open({**spec, "kvstore": kvstore}, open=True, read=True)
    stores = {}
    for name, future in opening.items():
        with _refused(path, name, "opened"):
            stores[name] = future.result()
    return stores


@contextlib.contextmanager
def _refused(path, name, verb):
    """Raises what tensorstore says of an array's files as a CheckpointError."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: array {name} cannot be {verb} ({first_line(error)}); "
            "fetch the checkpoint again"
        ) from None


def _kvstore(path, name, *, uses_ocdbt):
    base = f"file://{os.path.abspath(path)}"
    if uses_ocdbt:
        return {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
    return {"driver": "file", "path": f"{os.path.abspath(path)}/{name}/"}


class OrbaxWriter:
    """Writes a checkpoint into a folder, one array at a time, under nested published names."""

    def __init__(self, folder: str):
        self._folder = folder
        self._names: list[str] = []

    def write(self, name: str, info: TensorInfo, chunks: Iterable[Chunk]) -> None:
        """Writes one array from its bytes in order; it is on disk when this returns.

        Raises ValueError or OSError, as tensorstore does, and whatever `chunks` raises.
        """
        ts = imported("tensorstore")

        width = row_bytes(info)
        height = min(info.shape[0], max(1, CHUNK_ROWS_BYTES // width))
        spec = {
            "driver": "zarr",
            "kvstore": _kvstore(self._folder, name, uses_ocdbt=True),
            "metadata": {
                "shape": info.shape,
                "chunks": [height, *info.shape[1:]],
                "compressor": None,
            },
            "dtype": info.dtype,
            # Chunks of zeros are written too, so that a missing chunk is known to be damage.
            "store_data_equal_to_fill_value": True,
        }
        store = ts.open(spec, create=True).result()
        row = 0
        for rows in _rows(chunks, height * width):
            n_rows = len(rows) // width
            block = np.frombuffer(rows, np.dtype(info.dtype)).reshape(n_rows, *info.shape[1:])
            store[row : row + n_rows].write(block).result()
            row += n_rows
        assert row == info.shape[0], name
        self._names.append(name)

    def finish(self) -> dict[str, bytes]:
        """The files that describe the tree to Orbax, to be written last: name -> content."""
        tree = {
            str(tuple(name.split("."))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in self._names
        }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        checkpoint = {
            "item_handlers": _HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": None,
            "commit_timestamp_nsecs": None,
            "custom_metadata": {},
        }
        contents = {METADATA: metadata, "_CHECKPOINT_METADATA": checkpoint}
        return {name: json.dumps(content).encode() for name, content in contents.items()}


def _rows(chunks, n_bytes):
    """The same bytes in pieces of `n_bytes`, the last of them shorter."""
    gathered = bytearray()
    for chunk in chunks:
        gathered += chunk
        while len(gathered) >= n_bytes:
            yield bytes(gathered[:n_bytes])
            del gathered[:n_bytes]
    if gathered:
        yield bytes(gathered)
