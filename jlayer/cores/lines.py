"""How rows of every form become lines of 32 weights in bfloat16, which kernels for many columns
multiply. A weight is decoded to float32 as elsewhere, then rounded; where a table has the weights
of some codes, the table is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jlayer.cores.block_loop import BYTES, BlockLoop
from jlayer.cores.block_sums import BLOCK_SUMS
from jlayer.cores.decode import levels, scale_values
from jlayer.cores.grouped import GROUPED, Form, HalfBytes, Row
from jlayer.cores.sums import Block, every
from jlayer.cores.text import FLOATS, INTS, LANES, Function
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.int4 import INT4

LINE = 2 * LANES  # weights
LINE_BYTES = 64
PAIRS, SHORTS = f"<{LINE} x bfloat>", f"<{LINE} x i16>"


class Lines(ABC):
    """How rows of a form become lines.

    `unit`: inputs of a row that are decoded together. `n_lines`: what they become; each line has
    the next 32 inputs, or with `is_in_halves` the same ones of the next half of a row.
    `room_bytes`: what a row needs while it is decoded.
    """

    unit = LINE
    is_in_halves = False
    room_bytes = LINE_BYTES

    @property
    def n_lines(self) -> int:
        return self.unit // LINE * (2 if self.is_in_halves else 1)

    def begin(self, code: Function, extra: str) -> str:
        """See `grouped.Form`."""
        return "null"

    @abstractmethod
    def n_bytes(self, n_inputs: int) -> int:
        """Bytes of a row for some inputs, a multiple of `unit`; of int4 for those of a half."""

    @abstractmethod
    def bytes_of(self, code: Function, item: str) -> str:
        """The same, as a kernel computes it."""

    @abstractmethod
    def write(
        self, code: Function, row: Row, item: str, lines: Sequence[str], *, length: str, room: str
    ) -> None:
        """Writes the lines of the inputs from `item` on, where the pointers say. `length`: inputs
        of a row, of int4 those of a half."""


class _Plain(Lines):
    def n_bytes(self, n_inputs):
        return 2 * n_inputs

    def bytes_of(self, code, item):
        return code.math("shl", item, 1)

    def write(self, code, row, item, lines, *, length, room):
        code.store(INTS, code.load(INTS, row.main, self.bytes_of(code, item)), *lines)


class _Int4(Lines):
    """32 bytes: a group of the first half of the inputs, and one of the second."""

    is_in_halves = True

    def n_bytes(self, n_inputs):
        return n_inputs

    def bytes_of(self, code, item):
        return item

    def write(self, code, row, item, lines, *, length, room):
        raw = code.load(f"<{LINE} x i8>", row.main, item)
        codes = code.let(f"zext <{LINE} x i8> {raw} to {SHORTS}")
        number = code.math("lshr", item, 5)
        other = code.math("add", number, code.math("lshr", length, 5))
        low = code.math("and", codes, every_short(15), SHORTS)
        high = code.math("lshr", codes, every_short(4), SHORTS)
        half_shorts = f"<{LANES} x i16>"
        names = [str(lane) if lane < LANES else "poison" for lane in range(LINE)]
        lanes = ", ".join(f"i32 {name}" for name in names)
        for group, some, line in zip((number, other), (low, high), lines, strict=True):
            byte = code.let(f"zext i8 {code.load('i8', row.scale, group)} to i64")
            table = code.load(half_shorts, "@rounded", code.math("shl", byte, 5), align=32)
            words = f"{half_shorts} {table}, {half_shorts} poison, <{LINE} x i32> <{lanes}>"
            table = code.let(f"shufflevector {words}")
            code.store(SHORTS, looked_up(code, some, table), line)


class _Grouped(Lines):
    """Codes with scales. Two lines share a scale where a group is large enough."""

    def __init__(self, form: Form):
        self.form = form
        self.unit = LINE if 0 < form.group < 2 * LINE else 2 * LINE

    def begin(self, code, extra):
        return self.form.begin(code, extra)

    def n_bytes(self, n_inputs):
        return self.form.n_bytes(n_inputs)

    def bytes_of(self, code, item):
        return self.form.bytes_of(code, item)


class _Bytes(_Grouped):
    def write(self, code, row, item, lines, *, length, room):
        decode = self.form.decoder_of(code, row, item, is_scaled=True, has_avx512=True)
        for number, line in enumerate(lines):
            here = code.math("add", item, LINE * number)
            found = self.form.codes(code, row, here, 2, is_checked=True)
            both = [self.form.last(code, decode(some)) for some in found]
            code.store(PAIRS, rounded(code, *both), line)


class _HalfBytes(_Grouped):
    """A line of 16 bytes: in words, each half byte comes to lie in the lowest bits of its input's,
    and a table has the weights of 16 codes of the first 16 inputs, then those of the others."""

    def write(self, code, row, item, lines, *, length, room):
        table = self._table(code, row, item)
        for number, line in enumerate(lines):
            codes = self._codes(code, row, code.math("add", item, LINE * number))
            code.store(SHORTS, looked_up(code, codes, table), line)

    def _codes(self, code, row, item):
        bytes_ = code.load(BYTES, row.main, self.bytes_of(code, item))
        raw = code.let(f"zext {BYTES} {bytes_} to {INTS}")
        shifts = (("lshr", 4), ("shl", 16)) if self.form.is_high_first else (None, ("shl", 12))
        both = [code.math(s[0], raw, every(s[1]), INTS) if s else raw for s in shifts]
        codes = code.let(f"bitcast {INTS} {code.math('or', *both, INTS)} to {SHORTS}")
        if self.form.group != LANES:
            return codes
        codes = code.math("and", codes, every_short(15), SHORTS)
        halves = ", ".join(f"i16 {LANES * (lane // LANES)}" for lane in range(LINE))
        return code.math("or", codes, f"<{halves}>", SHORTS)

    def _table(self, code, row, item):
        first = second = self._of_group(code, row, item)
        if self.form.group == LANES:
            second = self._of_group(code, row, code.math("add", item, LANES))
        return code.let(f"bitcast {PAIRS} {rounded(code, first, second)} to {SHORTS}")

    def _of_group(self, code, row, item):
        scale, zero = self.form.group_scale(code, row, item), self.form.group_zero(code, row, item)
        return self.form.table(code, scale, zero)


class _Blocks(Lines):
    """Blocks of GGUF, one at a time."""

    room_bytes = 128

    def __init__(self, name: str):
        self.name, self.unit = name, BLOCKS[name].weights
        self.n_block_bytes = BLOCKS[name].n_block_bytes

    def n_bytes(self, n_inputs):
        return n_inputs // self.unit * self.n_block_bytes

    def bytes_of(self, code, item):
        return code.math("mul", code.math("udiv", item, self.unit), self.n_block_bytes)

    def write(self, code, row, item, lines, *, length, room):
        at = self.bytes_of(code, item)
        BLOCK_SUMS[self.name](_BlockLines(self.name, code, row, at, lines, room), [])


class _BlockLines(BlockLoop):
    """A block of one row, whose weights are no part of sums: they are written."""

    def __init__(self, name, code, row, at, lines, room):
        block = Block(code, [row.main], [], [], "null", [], "0", "0", has_avx512=True, room=room)
        super().__init__(name, block)
        self.at, self.lines, self.found = at, lines, {}

    def added(self, sums, weights, first):
        (self.found[first],) = weights
        begin = first // LINE * LINE
        if begin in self.found and begin + LANES in self.found:
            both = self.found[begin], self.found[begin + LANES]
            self.code.store(PAIRS, rounded(self.code, *both), self.lines[first // LINE])
        return sums


def rounded(code: Function, low: str, high: str) -> str:
    """Two vectors of floats as one of bfloat16."""
    words = f"{FLOATS} {high}, {FLOATS} {low}"
    return code.let(f"call {PAIRS} @llvm.x86.avx512bf16.cvtne2ps2bf16.512({words})")


def looked_up(code: Function, codes: str, table: str) -> str:
    """What each code stands for: `table` has a number for each of 32."""
    words = f"{SHORTS} {table}, {SHORTS} {codes}"  # only the low 5 bits of a lane count
    return code.let(f"call {SHORTS} @llvm.x86.avx512.permvar.hi.512({words})")


def every_short(number) -> str:
    return f"<{', '.join([f'i16 {number}'] * LINE)}>"


# The name of an encoding -> how its rows become lines.
LINES: dict[str, Lines] = {
    "bfloat16": _Plain(),
    INT4.name: _Int4(),
    **{
        name: (_HalfBytes if isinstance(form, HalfBytes) else _Bytes)(form)
        for name, form in GROUPED.items()
    },
    **{name: _Blocks(name) for name in BLOCK_SUMS},
}


def _of_int4():
    """What the half bytes of int4 stand for at each scale, as bfloat16 [256, 16]."""
    values = (levels() * scale_values()[:, None]).astype(ml_dtypes.bfloat16).view(np.uint16)
    words = ", ".join(f"i16 {value}" for value in values.reshape(-1))
    return f"@rounded = private constant [{values.size} x i16] [{words}], align 64\n"


DECLARATIONS = f"""
{_of_int4()}
declare {PAIRS} @llvm.x86.avx512bf16.cvtne2ps2bf16.512({FLOATS}, {FLOATS})
declare {SHORTS} @llvm.x86.avx512.permvar.hi.512({SHORTS}, {SHORTS})
"""
