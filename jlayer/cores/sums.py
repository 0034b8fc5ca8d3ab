"""What the sums of all kernels have in common: rows, columns, and their running sums."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from jlayer.cores.text import FLOATS, LANES, Function


@dataclass
class Block:
    """The rows and columns of a kernel as it runs: pointers.

    `zeros`: of each row, for forms that have some. `table`: what bytes of scales stand for.
    `length`: inputs of a row, of int4 those of a half. `next_rows`: bytes to the rows that follow.
    `room`: two cache lines of memory for each row.
    """

    code: Function
    rows: list[str]
    scales: list[str]
    zeros: list[str]
    table: str
    columns: list[str]
    length: str
    next_rows: str
    has_avx512: bool
    room: str

    def column(self, index: int, item: str) -> str:
        """16 inputs of a column, from the input `item` on."""
        return self.code.load(FLOATS, self.columns[index], self.code.math("shl", item, 2))

    def prefetch(self, n_bytes: str, more: int = 0) -> None:
        """Asks for the same bytes of the rows that follow."""
        ahead = self.code.math("add", self.next_rows, more)
        for row in self.rows:
            self.code.prefetch(row, self.code.math("add", n_bytes, ahead))


def end_of_steps(code, start, stop, step):
    """Where the last whole step ends."""
    return code.math("add", start, code.math("and", code.math("sub", stop, start), -step))


def n_chains(block):
    """Sums for each row and column: an addition takes four cycles, in which eight could begin."""
    return 2 if block.has_avx512 and len(block.rows) * len(block.columns) < 8 else 1


def zeros(block):
    return ["zeroinitializer"] * (len(block.rows) * len(block.columns) * n_chains(block))


def added(block, sums, weights, item, turn):
    """The running sums after 16 more inputs of all rows and columns."""
    code, chains, sums = block.code, n_chains(block), list(sums)
    inputs = [block.column(number, item) for number in range(len(block.columns))]
    for row, weight in enumerate(weights):
        for column, some in enumerate(inputs):
            at = (row * len(inputs) + column) * chains + turn % chains
            sums[at] = code.fma(weight, some, sums[at])
    return sums


def joined(block, sums):
    if n_chains(block) == 1:
        return sums
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [block.code.math("fadd", *pair, FLOATS) for pair in pairs]


def every(number):
    return f"<{', '.join([f'i32 {number}'] * LANES)}>"


def every_float(number):
    return f"<{', '.join([f'float {spelled(number)}'] * LANES)}>"


def spelled(number):
    """A float as LLVM spells it exactly: the bits of a double."""
    return "0x" + struct.pack(">d", float(number)).hex().upper()
