"""Digests of a tensor's rows that can be taken in any order: how the runtime knows that what it
streams is what was converted.

A tensor's digest is the sum, modulo 2^128, of XXH3-128 of each row, seeded with the row's number.
So tiles may come by as the plan likes, in several threads, and a row that is damaged, missing or in
another's place changes it. It guards against accidents, at a tenth of the price of SHA-256, which
the manifest has of every file for all else.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from jlayer.errors import CheckpointError

_MODULUS = 1 << 128


def rows_of(shape: tuple[int, ...]) -> int:
    """How many rows a tensor is hashed as: a vector is one."""
    return shape[0] if len(shape) > 1 else 1


def rows_digest(data, row_bytes: int, *, first_row: int = 0) -> int:
    """The part that consecutive rows have in their tensor's digest."""
    view = memoryview(data).cast("B")
    hash_row = xxhash.xxh3_128_intdigest
    found = 0
    for number, at in enumerate(range(0, len(view), row_bytes), first_row):
        found += hash_row(view[at : at + row_bytes], number)
    return found % _MODULUS


class TensorDigest:
    """The digest of a tensor whose bytes come in order, in chunks of any size."""

    def __init__(self, shape: tuple[int, ...], n_bytes: int):
        self._row_bytes = n_bytes // rows_of(shape)
        self._next_row, self._sum, self._rest = 0, 0, b""

    def update(self, chunk) -> None:
        view = memoryview(chunk).cast("B")
        if self._rest:
            needed = self._row_bytes - len(self._rest)
            self._rest += bytes(view[:needed])
            view = view[needed:]
            if len(self._rest) == self._row_bytes:
                self._take(self._rest)
                self._rest = b""
        whole = len(view) // self._row_bytes * self._row_bytes
        self._take(view[:whole])
        self._rest += bytes(view[whole:])

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        assert not self._rest
        return f"{self._sum % _MODULUS:032x}"

    def _take(self, rows):
        self._sum += rows_digest(rows, self._row_bytes, first_row=self._next_row)
        self._next_row += len(rows) // self._row_bytes


@dataclass(frozen=True)
class Expected:
    """What a tensor in `file` must be: a digest as `TensorDigest` gives it, over so many rows."""

    file: str
    digest: str
    n_rows: int


class Checks:
    """Tensors held against their digests as their rows come by, from any thread.

    Each row is to be given once; after its last one a tensor is known to be sound, or is refused
    from then on. A tensor that nothing is expected of is let through.
    """

    def __init__(self, expected: Mapping[str, Expected]):
        self._awaited = dict(expected)
        self._damaged: dict[str, str] = {}
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Begins anew with what was seen in part: its rows will all come again."""
        self._found = dict.fromkeys(self._awaited, 0)
        self._rows_left = {tensor: entry.n_rows for tensor, entry in self._awaited.items()}

    def add(self, tensor: str, rows, *, n_rows: int, first_row: int = 0) -> None:
        """Takes the bytes of some rows. Raises CheckpointError, by the file's name, once they are
        not what was converted."""
        if tensor in self._awaited:
            part = rows_digest(rows, len(rows) // n_rows, first_row=first_row)
            with self._lock:
                self._found[tensor] += part
                self._rows_left[tensor] -= n_rows
                if self._rows_left[tensor] == 0:
                    self._settle(tensor, self._awaited.pop(tensor))
        if tensor in self._damaged:
            raise CheckpointError(self._damaged[tensor])

    def _settle(self, tensor, expected):
        if f"{self._found[tensor] % _MODULUS:032x}" != expected.digest:
            self._damaged[tensor] = (
                f"{expected.file}: tensor {tensor}: damaged, or of another model: its digest is "
                "not that of what was converted; see jlayer verify, and convert the source again"
            )
