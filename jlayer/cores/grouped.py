"""How codes with scales for groups of a row's inputs become weights: what kernels for few and for
many columns have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jlayer.cores.levels import Decode, by_level, floats, looked_up, numbers, times
from jlayer.cores.sums import every, every_float
from jlayer.cores.text import FLOATS, INTS, LANES, Function
from jlayer.encodings.fp8 import FLOAT8, FP8
from jlayer.encodings.grouped import WHOLE_ROW
from jlayer.encodings.int8 import INT8
from jlayer.encodings.linear import LINEAR, ZERO
from jlayer.encodings.tables import GLOBAL_SCALE, TABLES

# The piece, beside codes and scales, that a form may have.
EXTRA = (ZERO, GLOBAL_SCALE)
TABLE_BYTES = 4 * 256


@dataclass(frozen=True)
class Row:
    """Pointers of a row: to its codes, its scales, and its zeros. `scales`: to the table of what
    its scales stand for, where they are bytes."""

    main: str
    scale: str
    zero: str
    scales: str


@dataclass(frozen=True)
class Form(ABC):
    """A form by its codes and its scales.

    `scale`, `zero`: how they are stored, names of rows of `_NUMBERS`. `factor`: the scales are
    multiplied by it. `last_factor`: the weights are, rounded once more; of forms with one scale for
    all inputs. `global_scale`: as `encodings.tables` has it. `has_none`: the bytes 127 and 255 are
    no numbers, which `codes` does not see if it is not asked to.
    """

    group: int
    scale: str
    zero: str | None = None
    factor: float = 1.0
    last_factor: float = 1.0
    global_scale: str | None = None
    has_none: bool = False
    # Vectors that are best read together.
    at_once: int = 1
    # Whether it is sooner done to multiply the sums of few columns by a scale than the weights.
    is_scaled_late = True

    @property
    def has_groups(self) -> bool:
        return self.group != WHOLE_ROW

    @abstractmethod
    def n_bytes(self, n_inputs: int) -> int:
        """Bytes of the codes of some inputs, a multiple of 16."""

    @abstractmethod
    def bytes_of(self, code: Function, item: str) -> str:
        """The same, as a kernel computes it."""

    @abstractmethod
    def codes(
        self, code: Function, row: Row, item: str, n_vectors: int, *, is_checked: bool = False
    ) -> list[str]:
        """Vectors of 16 codes of a row, from an input on. `is_checked`: those of no number are
        NaN."""

    @abstractmethod
    def decoder(
        self, code: Function, scale: str | None, zero: str | None, *, has_avx512: bool
    ) -> Decode:
        """How codes become weights. `scale`: in all lanes; without it, unscaled ones."""

    def begin(self, code: Function, extra: str) -> str:
        """What stands at the begin of a kernel: the pointer to the table of the scales. `extra`: to
        the number of all rows."""
        table = {"e8m0": "@e8m0", FLOAT8: "@float8"}.get(self.scale, "null")
        if self.global_scale is None:
            return table
        room = code.let(f"alloca [{TABLE_BYTES} x i8], align 64")
        factor = code.spread(code.load("float", extra, align=4))
        how = "fdiv" if self.global_scale == "divides" else "fmul"
        for at in range(0, TABLE_BYTES, 4 * LANES):
            some = code.math(how, code.load(FLOATS, table, at, align=64), factor, FLOATS)
            code.store(FLOATS, some, code.at(room, at))
        return room

    def decoder_of(
        self, code: Function, row: Row, item: str, *, is_scaled: bool, has_avx512: bool
    ) -> Decode:
        """How the codes of the group that an input is in become weights."""
        scale = self.group_scale(code, row, item) if is_scaled else None
        return self.decoder(code, scale, self.group_zero(code, row, item), has_avx512=has_avx512)

    def last(self, code: Function, weights: str) -> str:
        """Weights, times the last factor."""
        if self.last_factor == 1:
            return weights
        return times(code, weights, every_float(np.float32(self.last_factor)))

    def group_scale(self, code: Function, row: Row, item: str) -> str:
        """The scale of the group that an input is in, in all lanes."""
        scale = code.spread(self._number(code, self.scale, row.scale, item, row.scales))
        return scale if self.factor == 1 else times(code, scale, every_float(self.factor))

    def group_zero(self, code: Function, row: Row, item: str) -> str | None:
        """The zero of the group that an input is in, in all lanes; None where all have the same."""
        if self.zero is None:
            return None
        return code.spread(self._number(code, self.zero, row.zero, item, row.scales))

    def _number(self, code, kind, pointer, item, table):
        number = code.math("udiv", item, self.group) if self.has_groups else "0"
        return _NUMBERS[kind](code, pointer, number, table)


@dataclass(frozen=True)
class Bytes(Form):
    """A byte for each input. `read(code, row, item, n_vectors)`: the numbers of some, as floats."""

    read: Callable[..., list[str]] | None = None

    def n_bytes(self, n_inputs):
        return n_inputs

    def bytes_of(self, code, item):
        return item

    def codes(self, code, row, item, n_vectors, *, is_checked=False):
        checks = {"is_checked": is_checked} if self.has_none else {}
        return self.read(code, row.main, item, n_vectors, **checks)

    def decoder(self, code, scale, zero, *, has_avx512):
        def weights(found):
            found = found if zero is None else code.math("fsub", found, zero, FLOATS)
            return times(code, found, scale)

        return weights


@dataclass(frozen=True)
class HalfBytes(Form):
    """Half a byte for each input: a level. `levels`: before a zero is taken away."""

    levels: Sequence[float] = ()
    is_high_first: bool = False
    at_once: int = 2
    is_scaled_late = False

    def n_bytes(self, n_inputs):
        return n_inputs // 2

    def bytes_of(self, code, item):
        return code.math("lshr", item, 1)

    def codes(self, code, row, item, n_vectors, *, is_checked=False):
        """Only the lowest 4 bits of a lane are those of its code."""
        at, found = self.bytes_of(code, item), []
        shifts = [4 * (n ^ self.is_high_first) for n in range(LANES // 2)]
        kind = f"<{2 * n_vectors} x i32>"
        words = code.load(kind, row.main, at)
        for number in range(n_vectors):
            lanes = numbers([2 * number] * (LANES // 2) + [2 * number + 1] * (LANES // 2))
            some = code.let(f"shufflevector {kind} {words}, {kind} poison, {INTS} {lanes}")
            found.append(code.math("lshr", some, numbers([*shifts, *shifts]), INTS))
        return found

    def decoder(self, code, scale, zero, *, has_avx512):
        if zero is None:
            return by_level(code, self.levels, scale, has_avx512=has_avx512)
        if has_avx512:
            table = self.table(code, scale, zero)
            return lambda codes: looked_up(code, codes, table)

        def weights(codes):
            found = code.math("and", codes, every(15), INTS)
            found = code.let(f"sitofp {INTS} {found} to {FLOATS}")
            return times(code, code.math("fsub", found, zero, FLOATS), scale)

        return weights

    def table(self, code: Function, scale: str | None, zero: str | None) -> str:
        """The weights of the 16 codes."""
        found = floats(self.levels)
        found = found if zero is None else code.math("fsub", found, zero, FLOATS)
        return times(code, found, scale)


def _integers(code: Function, row, item, n_vectors, *, how="sext", zero=0):
    found = []
    for number in range(n_vectors):
        raw = code.load(f"<{LANES} x i8>", row, code.math("add", item, LANES * number))
        wide = code.let(f"{how} <{LANES} x i8> {raw} to {INTS}")
        wide = code.math("sub", wide, every(zero), INTS) if zero else wide
        found.append(code.let(f"sitofp {INTS} {wide} to {FLOATS}"))
    return found


# What the numbers of `_float8` are divided by.
FLOAT8_FACTOR = 256.0


def _float8(code: Function, row, item, n_vectors, *, is_checked):
    """Numbers of float8_e4m3fn, divided by 256: the same bits are such a float16, whose exponent
    has a bit more. The processor knows how to make float32 of it, small numbers included."""
    n = LANES * n_vectors
    shorts = f"<{n} x i16>"

    def every_short(number):
        return f"<{', '.join([f'i16 {number}'] * n)}>"

    raw = code.load(f"<{n} x i8>", row, item)
    wide = code.let(f"sext <{n} x i8> {raw} to {shorts}")
    bits = code.math("and", wide, every_short(0xFF7F - (1 << 16)), shorts)
    bits = code.math("shl", bits, every_short(7), shorts)
    if is_checked:
        doubled = code.math("add", raw, raw, f"<{n} x i8>")
        is_some = code.let(f"icmp ne <{n} x i8> {doubled}, <{', '.join(['i8 -2'] * n)}>")
        both = f"{shorts} {bits}, {shorts} {every_short(0x7FFF)}"
        bits = code.let(f"select <{n} x i1> {is_some}, {both}")
    halves = code.let(f"bitcast {shorts} {bits} to <{n} x half>")
    found = []
    for number in range(n_vectors):
        lanes = ", ".join(f"i32 {LANES * number + lane}" for lane in range(LANES))
        words = f"<{n} x half> {halves}, <{n} x half> poison, {INTS} <{lanes}>"
        some = code.let(f"shufflevector {words}")
        found.append(code.let(f"fpext <{LANES} x half> {some} to {FLOATS}"))
    return found


def _at(code, pointer, number, n_bytes):
    """The pointer to a number of so many bytes."""
    return code.at(pointer, code.math("mul", number, n_bytes))


def bfloat16(code, pointer, number, _=None):
    raw = code.let(f"zext i16 {code.load('i16', _at(code, pointer, number, 2))} to i32")
    return code.let(f"bitcast i32 {code.math('shl', raw, 16, 'i32')} to float")


def _float16(code, pointer, number, _):
    half = code.load("half", _at(code, pointer, number, 2))
    return code.let(f"fpext half {half} to float")


def _float32(code, pointer, number, _):
    return code.load("float", _at(code, pointer, number, 4))


def _byte(code, pointer, number, _):
    return code.let(f"uitofp i8 {code.load('i8', pointer, number)} to float")


def _in_table(code, pointer, number, table):
    byte = code.let(f"zext i8 {code.load('i8', pointer, number)} to i64")
    return code.load("float", table, code.math("shl", byte, 2), align=4)


# How a number is stored -> how it is read as a float: (code, pointer, which, the table of bytes).
_NUMBERS = {
    "bfloat16": bfloat16,
    "float16": _float16,
    "float32": _float32,
    "uint8": _byte,
    "e8m0": _in_table,
    FLOAT8: _in_table,
}


def _of_integers(row):
    fields = {"group": row.group, "scale": row.scale_dtype, "zero": row.zero_dtype}
    if row.bits == 4:
        return HalfBytes(**fields, levels=[n - row.zero for n in range(16)])
    read = _integers
    if row.q_dtype == "uint8":
        read = partial(_integers, how="zext", zero=row.zero)
    return Bytes(**fields, last_factor=row.factor, read=read)


def _of_levels(row):
    return HalfBytes(
        row.group,
        "e8m0" if row.scales == "e8m0" else row.scale_dtype,
        levels=np.array(row.levels, np.float32),
        is_high_first=row.is_high_first,
        global_scale=row.global_scale,
    )


# The name of an encoding -> its form. Rows whose inputs are sorted have none.
GROUPED: dict[str, Form] = {
    INT8.name: Bytes(INT8.group, INT8.scale_dtype, read=_integers),
    **{row.name: _of_integers(row) for row in LINEAR.values() if not row.is_ordered},
    **{row.name: _of_levels(row) for row in TABLES.values()},
    **{
        row.name: Bytes(
            row.group,
            row.scale_dtype,
            factor=FLOAT8_FACTOR,
            read=_float8,
            at_once=2,
            has_none=True,
        )
        for row in FP8.values()
    },
}
