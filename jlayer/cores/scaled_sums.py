"""The sums of kernels for codes with scales: integers, FP8 and half bytes that name a level, with a
scale for some inputs of a row, or for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from jlayer.cores.sums import (
    Block,
    added,
    chosen,
    end_of_steps,
    every,
    floats,
    joined,
    n_chains,
    numbers,
    permuted,
    spelled,
    zeros,
)
from jlayer.cores.text import FLOATS, INTS, LANES, Function
from jlayer.encodings.fp8 import FP8
from jlayer.encodings.grouped import WHOLE_ROW
from jlayer.encodings.int8 import INT8
from jlayer.encodings.linear import LINEAR
from jlayer.encodings.tables import FOUR_BITS
from jlayer.spec import ITEM_BYTES

# Up to so many columns a group's scale multiplies its sums, else its weights.
SCALED_LATE = 2
# Inputs in one turn of the loop where all inputs of a row have one scale.
_TURN = 128


@dataclass(frozen=True)
class _Form:
    """A form by how its codes become numbers, and by its scales.

    `decode(block, row, item, n_vectors)`: vectors of 16 numbers of a row from an input on.
    `n_vectors`: so many at a time. `bits`: of a code. `factor`: all is multiplied by it.
    `has_none`: the bytes 127 and 255 are no numbers, which the sums of their row become too.
    """

    decode: Callable
    n_vectors: int
    group: int
    scale_dtype: str
    factor: float = 1.0
    has_none: bool = False
    bits: int = 8


class _Sums:
    """The sums of a kernel of some form. `step`: inputs in one turn of the loop."""

    def __init__(self, block: Block, form: _Form):
        self.block, self.code, self.form = block, block.code, form
        self.has_groups = form.group != WHOLE_ROW
        self.step = form.group if self.has_groups else _TURN
        self.is_late = len(block.columns) <= SCALED_LATE

    def of_inputs(self, start: str, stop: str) -> list[str]:
        """For each row and column a vector whose lanes add up to the product of some inputs."""
        code, n_seen = self.code, len(self.block.rows) if self.form.has_none else 0
        n_sums = len(zeros(self.block))

        def turn(count, sums_of):
            def body(item, carried):
                seen = self._seen(carried[n_sums:], item, count)
                return [*sums_of(item, carried[:n_sums]), *seen]

            return body

        whole = end_of_steps(code, start, stop, self.step)
        carried = [*zeros(self.block), *["zeroinitializer"] * n_seen]
        carried = code.loop(start, whole, self.step, turn(self.step, self._of_step), carried)
        carried = code.loop(whole, stop, LANES, turn(LANES, self._of_lanes), carried)
        sums, seen = carried[:n_sums], carried[n_sums:]
        if not self.has_groups:
            sums = self._scaled(sums, self._scales("0"))
        return self._with_nones(joined(self.block, sums), seen)

    def _of_step(self, item, sums):
        per = 8 // self.form.bits
        at = self.code.math("udiv", item, per) if per > 1 else item
        for line in range(0, self.step // per, 64):
            self.block.prefetch(at, line)
        count, n_vectors = self.step, self.form.n_vectors
        if not self.has_groups:
            return self._added(sums, item, count, n_vectors)
        scales = self._scales(item)
        if not self.is_late:
            return self._added(sums, item, count, n_vectors, scales)
        parts = self._added(zeros(self.block), item, count, n_vectors)
        return self._scaled(parts, scales, sums)

    def _of_lanes(self, item, sums):
        scales = self._scales(item) if self.has_groups else None
        return self._added(sums, item, LANES, 1, scales)

    def _scales(self, item):
        """Of each row for an input, in all lanes."""
        code, dtype = self.code, self.form.scale_dtype
        number = code.math("udiv", item, self.form.group) if self.has_groups else 0
        at = code.math("mul", number, ITEM_BYTES[dtype])
        found = [_NUMBER[dtype](code, scale, at) for scale in self.block.scales]
        if self.form.factor != 1:
            factor = spelled(np.float32(self.form.factor))
            found = [code.math("fmul", scale, factor, "float") for scale in found]
        return [code.spread(scale) for scale in found]

    def _added(self, sums, item, count, n_vectors, scales=None):
        """The sums after `count` more inputs, whose weights are perhaps scaled."""
        code, block = self.code, self.block
        for first in range(0, count, LANES * n_vectors):
            here = code.math("add", item, first)
            found = [self.form.decode(block, row, here, n_vectors) for row in block.rows]
            for number in range(n_vectors):
                weights = [vectors[number] for vectors in found]
                if scales:
                    pairs = zip(weights, scales, strict=True)
                    weights = [code.math("fmul", *pair, FLOATS) for pair in pairs]
                at = code.math("add", here, LANES * number)
                sums = added(block, sums, weights, at, first // LANES + number)
        return sums

    def _scaled(self, parts, scales, totals=None):
        """Some sums times the scale of their row, added to others."""
        n = len(self.block.columns) * n_chains(self.block)
        totals = totals or zeros(self.block)
        return [
            self.code.fma(part, scales[number // n], total)
            for number, (part, total) in enumerate(zip(parts, totals, strict=True))
        ]

    def _seen(self, seen, item, count):
        """See `_more_seen`; after so many more inputs."""
        step = min(count, _SEEN)
        for first in range(0, count if seen else 0, step):
            here = self.code.math("add", item, first)
            pairs = zip(seen, self.block.rows, strict=True)
            seen = [_more_seen(self.code, *pair, here, step) for pair in pairs]
        return seen

    def _with_nones(self, sums, seen):
        """The sums, of rows that have a byte of no number NaN."""
        nones, n = [_none_if_seen(self.code, some) for some in seen], len(self.block.columns)
        if not nones:
            return sums
        return [
            self.code.math("fadd", total, nones[number // n], FLOATS)
            for number, total in enumerate(sums)
        ]


# Bytes that are looked at together for codes of no number.
_SEEN = 64
_LINE = f"<{_SEEN} x i8>"


def _more_seen(code, seen, row, item, count):
    """For each place of a line the largest byte so far, without its sign and doubled, with those of
    `count` more inputs: 254 is that of no number."""
    bytes_ = code.load(f"<{count} x i8>", row, item)
    if count < _SEEN:
        lanes = ", ".join(f"i32 {min(lane, count)}" for lane in range(_SEEN))
        kind = f"<{count} x i8>"
        words = f"{kind} {bytes_}, {kind} zeroinitializer, <{_SEEN} x i32> <{lanes}>"
        bytes_ = code.let(f"shufflevector {words}")
    doubled = code.math("add", bytes_, bytes_, _LINE)
    before = code.let(f"bitcast {FLOATS} {seen} to {_LINE}")
    most = code.let(f"call {_LINE} @llvm.umax.v{_SEEN}i8({_LINE} {doubled}, {_LINE} {before})")
    return code.let(f"bitcast {_LINE} {most} to {FLOATS}")


def _none_if_seen(code, seen):
    """NaN in all lanes where there was a byte of no number, else zero."""
    bytes_ = code.let(f"bitcast {FLOATS} {seen} to {_LINE}")
    none = f"<{', '.join(['i8 -2'] * _SEEN)}>"
    found = code.let(f"icmp eq {_LINE} {bytes_}, {none}")
    any_ = code.let(f"icmp ne i64 {code.let(f'bitcast <{_SEEN} x i1> {found} to i64')}, 0")
    return code.spread(code.let(f"select i1 {any_}, float {spelled(np.nan)}, float 0.0"))


def _integers(block: Block, row, item, n_vectors, *, how="sext", zero=0):
    code, found = block.code, []
    for number in range(n_vectors):
        raw = code.load(f"<{LANES} x i8>", row, code.math("add", item, LANES * number))
        wide = code.let(f"{how} <{LANES} x i8> {raw} to {INTS}")
        wide = code.math("sub", wide, every(zero), INTS) if zero else wide
        found.append(code.let(f"sitofp {INTS} {wide} to {FLOATS}"))
    return found


def _half_bytes(block: Block, row, item, n_vectors, *, levels, is_high_first):
    """The levels that half bytes name, of which two neighbours share a byte."""
    code, found = block.code, []
    twice = numbers(lane // 2 for lane in range(LANES))
    shifts = numbers(4 * (lane % 2 != is_high_first) for lane in range(LANES))
    for number in range(n_vectors):
        at = code.math("udiv", code.math("add", item, LANES * number), 2)
        raw = code.load(f"<{LANES // 2} x i8>", row, at)
        words = f"<{LANES // 2} x i8> {raw}, <{LANES // 2} x i8> poison, {INTS} {twice}"
        both = code.let(f"shufflevector {words}")
        wide = code.let(f"zext <{LANES} x i8> {both} to {INTS}")
        codes = code.math("lshr", wide, shifts, INTS)
        if block.has_avx512:
            found.append(permuted(code, floats(levels), codes))
        else:
            found.append(chosen(code, levels, codes))
    return found


def _float8(block: Block, row, item, n_vectors):
    """Numbers of float8_e4m3fn, divided by 256: the same bits are such a float16, whose exponent
    has a bit more. The processor knows how to make float32 of it, small numbers included."""
    code, n = block.code, LANES * n_vectors
    shorts = f"<{n} x i16>"

    def every_short(number):
        return f"<{', '.join([f'i16 {number}'] * n)}>"

    raw = code.load(f"<{n} x i8>", row, item)
    wide = code.let(f"sext <{n} x i8> {raw} to {shorts}")
    bits = code.math("shl", wide, every_short(7), shorts)
    bits = code.math("and", bits, every_short(0xBFFF - (1 << 16)), shorts)
    halves = code.let(f"bitcast {shorts} {bits} to <{n} x half>")
    found = []
    for number in range(n_vectors):
        lanes = ", ".join(f"i32 {LANES * number + lane}" for lane in range(LANES))
        words = f"<{n} x half> {halves}, <{n} x half> poison, {INTS} <{lanes}>"
        some = code.let(f"shufflevector {words}")
        found.append(code.let(f"fpext <{LANES} x half> {some} to {FLOATS}"))
    return found


def bfloat16(code: Function, pointer: str, at: str) -> str:
    """A bfloat16 in memory as a float."""
    raw = code.let(f"zext i16 {code.load('i16', pointer, at)} to i32")
    return code.let(f"bitcast i32 {code.math('shl', raw, 16, 'i32')} to float")


def _float16(code, pointer, at):
    return code.let(f"fpext half {code.load('half', pointer, at)} to float")


def _float32(code, pointer, at):
    return code.load("float", pointer, at)


def _sums(block, start, stop, *, form):
    return _Sums(block, form).of_inputs(start, stop)


# dtype -> how a number of it is read as a float.
_NUMBER = {"bfloat16": bfloat16, "float16": _float16, "float32": _float32}
_FORMS = {INT8.name: _Form(_integers, 1, INT8.group, INT8.scale_dtype)}
for _row in LINEAR.values():
    if _row.bits == 8 and _row.zero_dtype is None and not _row.is_ordered:
        _decode = partial(_integers, how="zext", zero=_row.zero) if _row.zero else _integers
        _FORMS[_row.name] = _Form(_decode, 1, _row.group, _row.scale_dtype, _row.factor)
for _row in FP8.values():
    _FORMS[_row.name] = _Form(_float8, 2, _row.group, _row.scale_dtype, factor=256.0, has_none=True)
# Of more inputs that share a scale the loop's turn would be long.
for _row in FOUR_BITS.values():
    if _row.group <= _TURN:
        _levels = tuple(map(np.float32, _row.levels))
        _decode = partial(_half_bytes, levels=_levels, is_high_first=_row.is_high_first)
        _FORMS[_row.name] = _Form(_decode, 1, _row.group, _row.scale_dtype, bits=_row.bits)
# The name of an encoding -> its sums, of some inputs of a kernel's rows: (block, start, stop).
SCALED_SUMS = {name: partial(_sums, form=form) for name, form in _FORMS.items()}
