"""`Cores`: the product of some columns with rows of matrices, on all cores of the host."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jlayer.cores import decode, kernels, packing, wide
from jlayer.cores.crew import Crew
from jlayer.cores.grouped import EXTRA
from jlayer.cores.jobs import FIELDS, address, aligned
from jlayer.cores.native import Compiler, missing
from jlayer.cores.sharing import SPIN_S
from jlayer.cores.topology import topology
from jlayer.encodings.grouped import SCALE
from jlayer.encodings.int4 import INT4
from jlayer.encodings.registry import encoding
from jlayer.errors import UsageError

# What a thread takes at a time: at least so many bytes (it then streams from memory), and small
# enough that each thread takes several times, so that unequal cores balance.
LEAST_BYTES, TURNS = 64 << 10, 12
# Rows are taken by the most that a kernel has, so that no row is computed twice inside a matrix.
ROWS = kernels.MOST_ROWS
# Bytes (for four columns) that one core multiplies in the time in which another one wakes up.
WORTH_WAKING = 1 << 20
# From so many columns on, so many rows at least share each part of the columns while it is near.
MANY_COLUMNS, MANY_ROWS = 8, 64
# From so many bfloat16 columns on, rows are decoded once for all of them: with AMX and without; by
# form where measured. Other forms decode as int8 does.
WIDE_COLUMNS = {
    True: {"bfloat16": 2, INT4.name: 4},
    False: {"bfloat16": 12},
}
WIDE_ANYWAY = {True: 6, False: 9}
# Packed bytes that are multiplied by all columns before the next: they stay in a core's own cache.
CHUNK_BYTES = 128 << 10


@dataclass(frozen=True)
class Matrix:
    """Some rows of a matrix where they lie.

    `form`: the name of an encoding. `pieces`: by name as the encoding has them, rows contiguous,
    of any alignment. `width`: the inputs.
    """

    form: str
    pieces: Mapping[str, np.ndarray]
    width: int

    @property
    def n_rows(self) -> int:
        return self.main.shape[0]

    @property
    def main(self) -> np.ndarray:
        return self.pieces[encoding(self.form).main]

    @property
    def n_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())


class Cores:
    """Threads that multiply; thread-safe, one product at a time. `close` ends them.

    `n_threads`: as `topology` finds by default. `features`: LLVM's names of what the processor
    should be taken not to have ("-avx512f"), for tests; `native=False`: numpy alone. `spin_s`: how
    long a thread without work watches for some before it sleeps.
    """

    def __init__(
        self,
        n_threads: int | None = None,
        *,
        native: bool | None = None,
        features: str = "",
        spin_s: float = SPIN_S,
    ):
        self._spin_s = spin_s
        self.n_threads = topology().threads if n_threads is None else n_threads
        self.is_native = missing() is None if native is None else native
        self.code = _code(features) if self.is_native else None
        self._is_closed, self._rooms = False, {}
        self._begin()

    def multiply(self, matrices: Sequence[Matrix], x: np.ndarray) -> list[np.ndarray]:
        """x float32 or bfloat16 [C, in] -> float32 [C, rows] of each; all matrices have this width.

        Runs without the interpreter's lock. The results are fresh. After `close` it raises
        UsageError.
        """
        n_columns = x.shape[0]
        results = _results([m.n_rows for m in matrices], padded_columns(n_columns))
        self.begin(self.jobs(matrices, results, n_columns, x.dtype), x).finish()
        return [y[:n_columns] for y in results]

    def jobs(
        self,
        matrices: Sequence[Matrix],
        results: Sequence[np.ndarray],
        n_columns: int,
        dtype=np.float32,
    ) -> Jobs:
        """What the products of these matrices with C = `n_columns` columns of a dtype need to know:
        it can be used again and again.

        `results`: float32 [`padded_columns` of C, rows] of each matrix, whose rows are contiguous:
        there the products are written; what is beyond C may be overwritten.
        """
        assert len({matrix.width for matrix in matrices}) <= 1, "they have one input"
        for matrix, y in zip(matrices, results, strict=True):
            _check(matrix)
            assert y.shape == (padded_columns(n_columns), matrix.n_rows), y.shape
        native = [self.is_native and kernels.is_native(m.form, m.width) for m in matrices]
        shared = [m for m, is_native in zip(matrices, native, strict=True) if is_native]
        is_wide = tuple(self._is_wide(matrix, n_columns, dtype) for matrix in shared)
        ys = [y for y, is_native in zip(results, native, strict=True) if is_native]
        table, n_blocks = None, 0
        if n_columns and shared:
            table, n_blocks = self._table(shared, is_wide, n_columns)
            table[:, _FIELD["y"]] = [address(y) for y in ys]
            table[:, _FIELD["y_stride"]] = [y.strides[0] for y in ys]
        work = sum(m.n_bytes for m in shared) * max(1, n_columns // 4)
        is_short = work < WORTH_WAKING
        others = tuple(
            (matrix, y)
            for matrix, y, is_native in zip(matrices, results, native, strict=True)
            if not is_native
        )
        width = matrices[0].width if matrices else None
        kept, wide_ones = (tuple(matrices), tuple(results)), np.array(is_wide, bool)
        return Jobs(n_columns, width, table, n_blocks, is_short, wide_ones, others, kept)

    def begin(self, jobs: Jobs, x: np.ndarray) -> Product:
        """Begins to multiply, in other threads: x float32 or bfloat16 [C, in], of the number and
        the dtype of the jobs. All is written once the product's `finish` returns, which must be
        called; until then no other product begins. Raises UsageError after `close`.
        """
        assert x.dtype in (np.float32, ml_dtypes.bfloat16), x.dtype
        assert x.shape == (jobs.n_columns, jobs.width or x.shape[1]), (x.shape, jobs)
        if self._pid != os.getpid():
            self._begin()
        self._refuse_closed()
        for matrix, y in jobs.others:
            x32 = x.astype(np.float32)
            y[: jobs.n_columns] = decode.product(x32, matrix.form, matrix.pieces, matrix.width)
        if jobs.table is None:
            return Product()
        self._lock.acquire()
        try:
            self._refuse_closed()
            table = jobs.table.copy()
            self._place_columns(table, jobs.is_wide, x)
            self._crew.begin(table, jobs.n_blocks, is_short=jobs.is_short)
        except BaseException:
            self._lock.release()
            raise
        return Product(self._crew, self._lock, (table, jobs))

    def _place_columns(self, table, is_wide, x):
        """Writes into the list of jobs where the columns are, as the kernels of each take them.
        They are copied to memory that stays: fresh memory takes longer than to multiply."""
        if is_wide.any():
            n_bytes = 2 * math.prod(packing.packed_shape(*x.shape))
            packed = self._room("packed", n_bytes)
            self.code.pack(x, packed)
            table[is_wide, _FIELD["x"]] = address(packed)
        if not is_wide.all():
            stride = _stride(x.shape[1])
            n_columns = padded_columns(x.shape[0])
            room = self._room("columns", 4 * n_columns * stride).view(np.float32)
            room = room[: n_columns * stride].reshape(n_columns, stride)
            room[: len(x), : x.shape[1]], room[len(x) :] = x, 0
            table[~is_wide, _FIELD["x"]] = address(room)
            table[~is_wide, _FIELD["x_stride"]] = room.strides[0]

    def _room(self, name, n_bytes):
        """Memory of these threads, for one product after another."""
        if name not in self._rooms or self._rooms[name].nbytes < n_bytes:
            self._rooms[name] = aligned(n_bytes)
        return self._rooms[name]

    def close(self) -> None:
        """Ends the threads; waits for a product that runs. Closing twice is fine."""
        if self._pid != os.getpid():  # the child of a fork has none of them
            self._begin()
        with self._lock:
            self._is_closed = True
            self._stop()

    def __enter__(self) -> Cores:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _begin(self):
        """A crew of this process: the child of a fork has none of its parent's threads."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._crew = Crew(self.n_threads, self._spin_s)
        # Also when this object is collected, and before the interpreter ends.
        self._stop = weakref.finalize(self, _stop, self._crew, self._pid)

    def _refuse_closed(self):
        if self._is_closed:
            raise UsageError("these cores are closed: make new ones with Cores()")

    def _is_wide(self, matrix, n_columns, dtype):
        """Whether all columns are multiplied at a time by rows that are decoded once."""
        if dtype != ml_dtypes.bfloat16 or not self.code.has_wide:
            return False
        has_amx = self.code.has_amx
        least = WIDE_COLUMNS[has_amx].get(matrix.form, WIDE_ANYWAY[has_amx])
        is_native = wide.is_native(matrix.form, matrix.n_rows, matrix.width)
        return is_native and n_columns >= least

    def _table(self, matrices, is_wide, n_columns):
        """(the list of jobs, without x and y; the number of blocks)"""
        jobs, block = [], 0
        total = sum(m.n_bytes for m in matrices)
        block_bytes = max(LEAST_BYTES, total // (self.n_threads * TURNS))
        for matrix, is_wide_one in zip(matrices, is_wide, strict=True):
            rows, main = matrix.n_rows, matrix.main
            scale = matrix.pieces.get(SCALE, main)
            row_bytes = max(1, matrix.n_bytes // max(1, rows))
            columns = n_columns if is_wide_one else padded_columns(n_columns)
            steps = self.code.steps(matrix.form, columns, is_wide_one)
            job = dict.fromkeys(FIELDS, 0)
            job |= {"n_steps": len(steps), "steps": address(steps), "rows": rows}
            length = kernels.length(matrix.form, matrix.width)
            part = length if is_wide_one else min(length, kernels.part(matrix.form, columns))
            job |= {"length": length, "part": part, "columns": columns}
            at_once = wide.ROWS if is_wide_one else ROWS
            least_rows = MANY_ROWS if columns >= MANY_COLUMNS else at_once
            job["block_rows"] = max(least_rows, -(-block_bytes // row_bytes // at_once) * at_once)
            near_rows = CHUNK_BYTES * length // (row_bytes * part) // ROWS * ROWS
            job["chunk_rows"] = max(ROWS, near_rows) if part < length else job["block_rows"]
            job["first_block"], block = block, block + -(-rows // job["block_rows"])
            job["end_block"] = block
            job |= {"main": address(main), "main_stride": main.strides[0]}
            job |= {"scale": address(scale), "scale_stride": scale.strides[0]}
            extra = next((matrix.pieces[n] for n in EXTRA if n in matrix.pieces), None)
            if extra is not None:
                job |= {"extra": address(extra), "extra_stride": extra.strides[0]}
            jobs.append([job[field] for field in FIELDS])
        return np.array(jobs, np.int64).reshape(-1, len(FIELDS)), block


_FIELD = {name: number for number, name in enumerate(FIELDS)}


def padded_columns(n_columns: int) -> int:
    """The columns that are multiplied: a column of zeros joins where it is sooner done than kernels
    for two columns and for one: 3, 7."""
    return n_columns + (n_columns % 4 == 3)


@dataclass(frozen=True)
class Jobs:
    """See `Cores.jobs`.

    `table`: the list of jobs of the matrices that have a kernel, None without one; `is_wide`: which
    of them multiply many columns at a time. `others`: (matrix, its result) without a kernel.
    `kept`: what the table points into.
    """

    n_columns: int
    width: int | None  # without a matrix any
    table: np.ndarray | None
    n_blocks: int
    is_short: bool
    is_wide: np.ndarray
    others: tuple[tuple[Matrix, np.ndarray], ...]
    kept: tuple


class Product:
    """A product that was begun."""

    def __init__(self, crew: Crew | None = None, lock=None, kept=()):
        self._crew, self._lock, self._kept = crew, lock, kept

    def finish(self) -> None:
        """Works too, without the interpreter's lock, until it is done; once is enough."""
        if self._crew is None:
            return
        crew, self._crew = self._crew, None
        try:
            crew.finish()
        finally:
            self._kept = ()
            self._lock.release()


class _Code:
    """Kernels, compiled when they are first needed."""

    def __init__(self, features):
        self._compiler, self._kernels, self._steps = Compiler(features), {}, {}
        self._pack = None  # compiled when it is first needed, as the kernels are
        self._lock = threading.Lock()

    @property
    def has_wide(self):
        return self._compiler.has_bfloat16

    @property
    def has_amx(self):
        return self._compiler.has_amx

    def pack(self, x, room):
        """Writes columns bfloat16 [C, in] to `room` as kernels for many take them."""
        x = np.ascontiguousarray(x)
        if self._pack is None:
            self._pack = _PACK(self._compiled(packing.NAME, packing.module, packing.NAME))
        self._pack(address(x), address(room), x.strides[0], x.shape[0], x.shape[1] // 2)

    def steps(self, form, n_columns, is_wide):
        """The kernels for so many columns [n, 2]: the address, and the first column. Kept."""
        key = (form, n_columns, is_wide)
        if key not in self._steps and is_wide:
            found = [(self._wide(form, n), column) for n, column in wide.steps(n_columns)]
            self._steps[key] = np.array(found, np.int64)
        elif key not in self._steps:
            found, column = [], 0
            for size in sorted(kernels.BLOCKS[self._compiler.has_avx512], reverse=True):
                while n_columns - column >= size:
                    found.append((self._kernel(form, size), column))
                    column += size
            self._steps[key] = np.array(found, np.int64)
        return self._steps[key]

    def _wide(self, form, n_groups):
        has_amx = self._compiler.has_amx
        return self._compiled(
            (form, "wide", n_groups), lambda: wide.kernel(form, n_groups, has_amx=has_amx)
        )

    def _kernel(self, form, n_columns):
        has_avx512 = self._compiler.has_avx512
        return self._compiled(
            (form, n_columns), lambda: kernels.kernel(form, n_columns, has_avx512=has_avx512)
        )

    def _compiled(self, key, text, name=kernels.NAME):
        with self._lock:
            if key not in self._kernels:
                (self._kernels[key],) = self._compiler.compiled(text(), name)
            return self._kernels[key]


_PACK = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)
_CODES: dict[str, _Code] = {}  # by features: the code is never freed, so all share it


def _code(features):
    return _CODES.setdefault(features, _Code(features))


def _stop(crew, pid):
    if pid == os.getpid():
        crew.stop()


def _check(matrix):
    shape = (matrix.n_rows, matrix.width)
    for name, (dtype, piece_shape) in encoding(matrix.form).pieces(shape).items():
        found = matrix.pieces[name]
        assert found.shape == piece_shape, (name, found.shape, piece_shape)
        assert found.dtype == dtype, (name, found.dtype, dtype)
        assert found.flags.c_contiguous, name


def _stride(width):
    """Inputs from one column to the next, so that every 16 inputs are on one cache line and columns
    do not push each other out.

    Lines at a multiple of 4096 bytes of each other share the same few places of a core's cache. The
    next column begins half of that further: int4 uses 2 KiB from each of two places of a column.
    """
    return (-(-width // 1024) * 1024 + 512 if width >= 1024 else -(-width // 16) * 16) + 16


def _results(rows, n_columns):
    """An array [C, rows] for each, all in one piece of memory."""
    starts = np.cumsum([0, *(-(-n * n_columns // 16) * 16 for n in rows)])
    memory = aligned(4 * int(starts[-1])).view(np.float32)
    return [
        memory[start : start + n * n_columns].reshape(n_columns, n)
        for start, n in zip(starts, rows, strict=False)
    ]
