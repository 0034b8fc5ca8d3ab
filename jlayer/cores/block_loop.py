"""What kernels for the block types of GGUF have in common: the loop through a row's blocks, and how
bits become weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jlayer.cores.levels import Decode, by_level, evenly, numbers
from jlayer.cores.sums import Block, added, every, joined, zeros
from jlayer.cores.text import FLOATS, INTS, LANES
from jlayer.encodings.blocks import BLOCKS

BYTES, MANY_BYTES = f"<{LANES} x i8>", f"<{2 * LANES} x i8>"
_SHORTS = f"<{LANES} x i16>"


class BlockLoop:
    """The loop of a kernel through the blocks of some rows.

    `at`: bytes from a row's begin to the block. `item`: the block's first input.
    """

    def __init__(self, form: str, block: Block):
        self.block, self.code, self.row = block, block.code, BLOCKS[form]
        self.rows = range(len(block.rows))

    def sums(
        self, start: str, stop: str, body: Callable[[BlockLoop, list[str]], list[str]]
    ) -> list[str]:
        """`body(loop, sums)` -> the sums after one block of each row."""

        def turn(item, sums):
            self.item, weights = item, self.row.weights
            number = self.code.math("udiv", item, weights)
            self.at = self.code.math("mul", number, self.row.n_block_bytes)
            for line in range(0, self.row.n_block_bytes, 64):
                self.block.prefetch(self.at, line)
            return body(self, sums)

        sums = self.code.loop(start, stop, self.row.weights, turn, zeros(self.block))
        return joined(self.block, sums)

    def added(self, sums, weights: Sequence[str], first: int) -> list[str]:
        """The sums after 16 more inputs, from the block's input `first` on. `weights`: of each
        row."""
        item = self.code.math("add", self.item, first)
        return added(self.block, sums, weights, item, first // LANES)

    # What is read.

    def load(self, kind: str, row: int, first: int) -> str:
        """What a row's block has from a byte on."""
        return self.code.load(kind, self.block.rows[row], self.code.math("add", self.at, first))

    def integers(self, row: int, first: int, *, how: str = "zext") -> str:
        """16 bytes as integers."""
        return self.code.let(f"{how} {BYTES} {self.load(BYTES, row, first)} to {INTS}")

    def chosen(self, row: int, first: int, integers: str) -> str:
        """16 integers where the bits of two bytes are set, else zeros."""
        kind = f"<{LANES} x i1>"
        are_set = self.code.let(f"bitcast i16 {self.load('i16', row, first)} to {kind}")
        both = f"{INTS} {integers}, {INTS} zeroinitializer"
        return self.code.let(f"select {kind} {are_set}, {both}")

    def float16(self, row: int, first: int) -> str:
        """The number at a byte, in all lanes."""
        number = self.load("half", row, first)
        return self.code.spread(self.code.let(f"fpext half {number} to float"))

    def keep(self, row: int, scales: str, *, line: int = 0) -> None:
        """Writes 16 scales to one of a row's cache lines."""
        self.code.store(FLOATS, scales, self.code.at(self.block.room, 128 * row + 64 * line))

    def kept(self, row: int, number: int, *, line: int = 0) -> str:
        """One of the 16 scales, in all lanes."""
        at = 128 * row + 64 * line + 4 * number
        return self.code.spread(self.code.load("float", self.block.room, at, align=4))

    # What is computed of it.

    def floats(self, integers: str) -> str:
        return self.code.let(f"sitofp {INTS} {integers} to {FLOATS}")

    def bits(self, integers: str, shift: str | int, mask: int, *, up: int = 0) -> str:
        """Some bits of integers, `up` from the lowest place. `shift`: of all, or of each lane."""
        code = self.code
        if shift:
            by = every(shift) if isinstance(shift, int) else shift
            integers = code.math("lshr", integers, by, INTS)
        integers = code.math("and", integers, every(mask), INTS)
        return code.math("shl", integers, every(up), INTS) if up else integers

    def bytes_shifted(self, bytes_: str, by: int, mask: int) -> str:
        """32 bytes shifted to the right, or to the left by a negative number; then masked."""
        code = self.code
        if by:
            words = code.let(f"bitcast {MANY_BYTES} {bytes_} to {_SHORTS}")
            count = f"<{', '.join([f'i16 {abs(by)}'] * LANES)}>"
            words = code.math("lshr" if by > 0 else "shl", words, count, _SHORTS)
            bytes_ = code.let(f"bitcast {_SHORTS} {words} to {MANY_BYTES}")
        return code.math("and", bytes_, _all_bytes(mask), MANY_BYTES)

    def bytes_joined(self, low: str, high: str, less: int = 0) -> str:
        """The bits of both in 32 bytes, less a number."""
        bytes_ = self.code.math("or", low, high, MANY_BYTES)
        return self.code.math("sub", bytes_, _all_bytes(less), MANY_BYTES) if less else bytes_

    def half_of(self, bytes_: str, half: int) -> str:
        """16 of 32 bytes, with a sign, as floats."""
        lanes = numbers(range(LANES * half, LANES * half + LANES))
        words = f"{MANY_BYTES} {bytes_}, {MANY_BYTES} poison, {INTS} {lanes}"
        some = self.code.let(f"shufflevector {words}")
        return self.floats(self.code.let(f"sext {BYTES} {some} to {INTS}"))

    def evenly(self, mask: int, scale: str, minimum: str) -> Decode:
        """See `levels`."""
        return evenly(self.code, mask, scale, minimum, has_avx512=self.block.has_avx512)

    def by_level(self, levels: Sequence[float], scale: str) -> Decode:
        """See `levels`."""
        return by_level(self.code, levels, scale, has_avx512=self.block.has_avx512)


def _all_bytes(number):
    return f"<{', '.join([f'i8 {number}'] * 2 * LANES)}>"
