"""Adapters as they are used beside the weights of a model: what they add to which product, and
where their tensors lie.

Several stand beside each other: of a matrix all their A are one array, and all their B. What no
file has so, as such a pair, or B with its rows in another order, is in a file in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from jlayer.additions import Addition, Additions, Columns
from jlayer.checkpoint.adapter import Adapter, layer_matrices, read_adapter
from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.encodings.plain import FOR_ALL_ROWS
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.adapted import A_END, B_END, LENGTHS_END
from jlayer.families.registry import head_leaf
from jlayer.spec import ModelConfig

MERGE = "merge it: jlayer convert MODEL TARGET --merge ADAPTER"


@dataclass(frozen=True)
class Named:
    """The folders of the adapters of a model. `own`: of the one that the model has under its own
    name; None: that has none. `others`: (name, folder) of those that a request asks for by name."""

    own: str | None = None
    others: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str | None, ...]:
        """By the number of an adapter; None: the model's own. Where that is alone it has no number:
        all rows are computed with it."""
        if not self.others:
            return ()
        return (*([None] if self.own is not None else []), *(name for name, _ in self.others))

    @property
    def folders(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        own = () if self.own is None else (self.own,)
        return (*own, *(folder for _, folder in self.others))


@dataclass(frozen=True)
class Beside:
    """Adapters beside the weights of a model: their tensors by the names that they have there, each
    with the path of a file, and their encodings. `memory`: what holds a file that is in memory
    alone, if there is one, of `memory_bytes`."""

    adapters: tuple[Adapter, ...]
    additions: Additions
    tensors: dict[str, tuple[str, TensorEntry]]
    forms: dict[str, str]
    memory: BinaryIO | None
    memory_bytes: int
    digest: str


def beside(named: Named, cfg: ModelConfig) -> Beside:
    """Reads them, once. Raises CheckpointError, StorageError, or UnsupportedModelError for one that
    can only be merged."""
    adapters = tuple(read_adapter(folder, cfg) for folder in named.folders)
    for adapter in adapters:
        _check_beside(adapter, cfg, is_alone=not named.others)
        _check_finite(adapter)
    numbers = range(len(adapters)) if named.others else [None]
    of_matrix: dict[str, list] = {}
    for number, adapter in zip(numbers, adapters, strict=True):
        for name in adapter.matrices:
            of_matrix.setdefault(name, []).append((number, adapter))
    memory, found = Memory(), {}
    for name, own in of_matrix.items():
        stem = name.removesuffix("weight")
        found[stem + A_END], found[stem + B_END] = _arrays(name, [each for _, each in own], memory)
        if (adapter := own[0][1]).matrices[name].magnitude:
            found[stem + LENGTHS_END] = _lengths(name, adapter, memory)
    forms = {
        name: FOR_ALL_ROWS[entry.dtype].name if name.endswith(A_END) else entry.dtype
        for name, (_, entry) in found.items()
    }
    additions = {name: _addition(name, own) for name, own in of_matrix.items()}
    return Beside(
        *(adapters, Additions(tuple(sorted(additions.items()))), found, forms),
        *(memory.file, memory.n_bytes, _digest(named, adapters)),
    )


def _addition(name, own):
    matrices = [(number, adapter.matrices[name]) for number, adapter in own]
    columns = tuple(Columns(each.rank, each.scale, number) for number, each in matrices)
    return Addition(columns, has_lengths=any(each.magnitude for _, each in matrices))


def _digest(named, adapters):
    if not named.others:
        return adapters[0].digest
    both = [(name, each.digest) for name, each in zip(named.names, adapters, strict=True)]
    return hashlib.sha256(repr(both).encode()).hexdigest()


@dataclass
class Memory:
    """A file that is in memory alone, once something is written to it."""

    file: BinaryIO | None = field(default=None)

    def written(self, array) -> tuple[str, TensorEntry]:
        """Adds an array of numbers -> (the path there, its entry)."""
        if self.file is None:
            self.file = os.fdopen(os.memfd_create("jlayer-adapter"), "w+b")
        offset = self.file.seek(0, os.SEEK_END)
        self.file.write(array.tobytes())
        self.file.flush()
        entry = TensorEntry(str(array.dtype), array.shape, offset, array.nbytes)
        return f"/proc/self/fd/{self.file.fileno()}", entry

    @property
    def n_bytes(self) -> int:
        return 0 if self.file is None else os.fstat(self.file.fileno()).st_size


def _arrays(matrix: str, adapters: Sequence[Adapter], memory: Memory):
    """(path, entry) of A and of B of a matrix: as they lie in the adapter's file, where there is
    one adapter and its rows are in the model's order."""
    import numpy as np  # not for a command's help

    parts = [(adapter, adapter.matrices[matrix]) for adapter in adapters]
    found = []
    for axis, names in enumerate(([p.a for _, p in parts], [p.b for _, p in parts])):
        entries = [adapter.tensors[name] for (adapter, _), name in zip(parts, names, strict=True)]
        is_ordered = all(part.heads is None for _, part in parts)
        if len(parts) == 1 and (axis == 0 or is_ordered):
            found.append((parts[0][0].file.path, entries[0]))
            continue
        arrays = [array_of(each, name) for (each, _), name in zip(parts, names, strict=True)]
        if axis == 1:
            arrays = [part.ordered(each) for (_, part), each in zip(parts, arrays, strict=True)]
        if len({entry.dtype for entry in entries}) > 1:  # nothing is lost in float32
            arrays = [each.astype(np.float32) for each in arrays]
        found.append(memory.written(np.concatenate(arrays, axis=axis)))
    return found


def _lengths(matrix, adapter, memory):
    """(path, entry) of the lengths of a matrix's rows."""
    added = adapter.matrices[matrix]
    if added.heads is None:
        return adapter.file.path, adapter.tensors[added.magnitude]
    return memory.written(added.ordered(array_of(adapter, added.magnitude)))


def array_of(adapter: Adapter, tensor: str):
    """A tensor of an adapter, read: an array of numpy."""
    import ml_dtypes  # not for a command's help
    import numpy as np

    entry = adapter.tensors[tensor]
    with open(adapter.file.real, "rb") as file:
        file.seek(entry.offset)
        raw = file.read(entry.n_bytes)
    return np.frombuffer(raw, getattr(ml_dtypes, entry.dtype, entry.dtype)).reshape(entry.shape)


def _check_beside(adapter, cfg, *, is_alone):
    others = adapter.matrices.keys() - {head_leaf(cfg).published, *layer_matrices(cfg)}
    if others:
        raise UnsupportedModelError(
            f"{adapter.folder}: changes what is not multiplied row by row: "
            f"{listed(sorted(others))}, which is not done as layers stream; {MERGE}"
        )
    lengths = [name for name, added in adapter.matrices.items() if added.magnitude]
    if lengths and not is_alone:
        raise UnsupportedModelError(
            f"{adapter.folder}: scales the rows of {listed(sorted(lengths))} (DoRA), which is not "
            f"done for one of several adapters; give it alone, or {MERGE}"
        )


def _check_finite(adapter):
    """Reads it once: it is small."""
    import numpy as np

    for name in adapter.tensors.keys() - set(adapter.copies.values()):
        if not np.isfinite(array_of(adapter, name)).all():
            raise CheckpointError(
                f"{adapter.file.path}: {name} has NaN or infinite numbers, expected finite "
                "ones; fetch the file again, or take an earlier state of the adapter"
            )
