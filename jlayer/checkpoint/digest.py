"""Digests of tensors whose rows arrive in any order: the runtime checks that it streams the bytes
that were converted.

A tensor's digest is the sum, modulo 2^128, of XXH3-128 of each row, seeded with the row's number.
So rows may be hashed in any order, in several threads, and a damaged, missing or misplaced row
changes the digest. It protects against accidents, not attacks, at a tenth of the cost of SHA-256.
The manifest also has the SHA-256 of every file.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from jlayer.errors import CheckpointError

_MODULUS = 1 << 128


def rows_of(shape: tuple[int, ...]) -> int:
    """The number of rows that a tensor is hashed in: a vector is one row."""
    return shape[0] if len(shape) > 1 else 1


def rows_digest(data, row_bytes: int, *, first_row: int = 0) -> int:
    """The contribution of consecutive rows to their tensor's digest."""
    view = memoryview(data).cast("B")
    hash_row = xxhash.xxh3_128_intdigest
    total = 0
    for number, at in enumerate(range(0, len(view), row_bytes), first_row):
        total += hash_row(view[at : at + row_bytes], number)
    return total % _MODULUS


class TensorDigest:
    """Computes the digest of a tensor whose bytes arrive in order, in chunks of any size.

    `first_row`: the number of its first row, where it is some rows of another one. So the digests
    of ranges that make up a matrix add up to that of the matrix.
    """

    def __init__(self, shape: tuple[int, ...], n_bytes: int, *, first_row: int = 0):
        self._row_bytes = n_bytes // rows_of(shape)
        self._next_row, self._sum, self._rest = first_row, 0, b""

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
        """The digest as 32 hexadecimal digits."""
        assert not self._rest
        return f"{self._sum % _MODULUS:032x}"

    def _take(self, rows):
        self._sum += rows_digest(rows, self._row_bytes, first_row=self._next_row)
        self._next_row += len(rows) // self._row_bytes


@dataclass(frozen=True)
class Expected:
    """The expected digest (see `TensorDigest`) and number of rows of a tensor in `file`."""

    file: str
    digest: str
    n_rows: int


class Checks:
    """Checks tensors against their digests while their rows arrive, from any thread.

    Each row must be added once. After its last row a tensor is valid, or is refused from then on. A
    tensor without an expected digest is not checked.
    """

    def __init__(self, expected: Mapping[str, Expected]):
        self._awaited = dict(expected)
        self._damaged: dict[str, str] = {}
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Starts over with incomplete tensors: all their rows will be added again."""
        self._sums = dict.fromkeys(self._awaited, 0)
        self._rows_left = {tensor: entry.n_rows for tensor, entry in self._awaited.items()}

    def add(self, tensor: str, rows, *, n_rows: int, first_row: int = 0) -> None:
        """Adds the bytes of some rows.

        Raises CheckpointError, with the file's name, once the tensor is known to differ.
        """
        if tensor in self._awaited:
            part = rows_digest(rows, len(rows) // n_rows, first_row=first_row)
            with self._lock:
                self._sums[tensor] += part
                self._rows_left[tensor] -= n_rows
                if self._rows_left[tensor] == 0:
                    self._settle(tensor, self._awaited.pop(tensor))
        if tensor in self._damaged:
            raise CheckpointError(self._damaged[tensor])

    def _settle(self, tensor, expected):
        if f"{self._sums[tensor] % _MODULUS:032x}" != expected.digest:
            self._damaged[tensor] = (
                f"{expected.file}: tensor {tensor}: damaged, or of another model: its digest is "
                "not that of what was converted; see jlayer verify, and convert the source again"
            )
