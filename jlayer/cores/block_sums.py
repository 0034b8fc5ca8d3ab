"""The sums of kernels for the block types of GGUF: see `encodings.blocks` for their values, and
`model.blocks` for where the bits lie.

Where a block has many scales, they are computed together, as one vector, and written to the row's
memory: from there each is read into all lanes by the instruction that uses it.
"""

from __future__ import annotations

from functools import partial

from jlayer.cores.block_loop import MANY_BYTES
from jlayer.cores.levels import numbers
from jlayer.cores.sums import every, every_float
from jlayer.cores.text import FLOATS, INTS, LANES
from jlayer.encodings.blocks import E2M1_DOUBLED, IQ4


def _half_bytes(loop, sums, *, first, weights_of):
    """Of a block that ends in 16 bytes, whose low halves are the first 16 inputs. `weights_of(loop,
    row)`: a function of codes."""
    decode = [weights_of(loop, row) for row in loop.rows]
    raw = [loop.integers(row, first) for row in loop.rows]
    sums = loop.added(sums, [decode[row](raw[row]) for row in loop.rows], 0)
    high = [loop.code.math("lshr", some, every(4), INTS) for some in raw]
    return loop.added(sums, [decode[row](high[row]) for row in loop.rows], LANES)


def _q4_0(loop, row):
    scale = loop.float16(row, 0)
    if loop.block.has_avx512:
        return loop.by_level(range(-8, 8), scale)
    return loop.evenly(15, scale, loop.code.math("fmul", scale, every_float(-8), FLOATS))


def _q4_1(loop, row):
    return loop.evenly(15, loop.float16(row, 0), loop.float16(row, 2))


def _iq4_nl(loop, row):
    return loop.by_level(IQ4, loop.float16(row, 0))


def _gguf_mxfp4(loop, row):
    byte = loop.code.let(f"zext i8 {loop.load('i8', row, 0)} to i64")
    scale = loop.code.load("float", "@halves", loop.code.math("shl", byte, 2), align=4)
    return loop.by_level(E2M1_DOUBLED, loop.code.spread(scale))


def _five_bits(loop, sums, *, high_at, has_minimum):
    """q5_0 and q5_1: the fifth bits of 32 inputs in four bytes."""
    code = loop.code
    scales = [loop.float16(row, 0) for row in loop.rows]
    if has_minimum:
        minima = [loop.float16(row, 2) for row in loop.rows]
    else:
        minima = [code.math("fmul", scale, every_float(-16), FLOATS) for scale in scales]
    raw = [loop.integers(row, high_at + 4) for row in loop.rows]
    for part in range(2):
        weights = []
        for row in loop.rows:
            low = loop.bits(raw[row], 4 * part, 15)
            high = loop.chosen(row, high_at + 2 * part, every(16))
            number = loop.floats(code.math("or", low, high, INTS))
            weights.append(code.fma(number, scales[row], minima[row]))
        sums = loop.added(sums, weights, LANES * part)
    return sums


def _q8_0(loop, sums):
    code = loop.code
    scales = [loop.float16(row, 0) for row in loop.rows]
    for first in (0, LANES):
        found = [loop.floats(loop.integers(row, 2 + first, how="sext")) for row in loop.rows]
        pairs = zip(found, scales, strict=True)
        sums = loop.added(sums, [code.math("fmul", *pair, FLOATS) for pair in pairs], first)
    return sums


def _bytes_of_words(code, words):
    """16 bytes of two words of 8, as integers."""
    pair = code.let(f"insertelement <2 x i64> poison, i64 {words[0]}, i32 0")
    pair = code.let(f"insertelement <2 x i64> {pair}, i64 {words[1]}, i32 1")
    bytes_ = code.let(f"bitcast <2 x i64> {pair} to <{LANES} x i8>")
    return code.let(f"zext <{LANES} x i8> {bytes_} to {INTS}")


def _masked(code, word, shift, mask, kind="i32"):
    """Some bits of each byte of a word."""
    word = code.math("lshr", word, shift, kind) if shift else word
    return code.math(
        "and", word, mask * (0x01010101 if kind == "i32" else 0x0101010101010101), kind
    )


def _joined_words(code, low, high):
    """A word of 8 bytes, of two of 4."""
    high = code.math("shl", code.let(f"zext i32 {high} to i64"), 32)
    return code.math("or", code.let(f"zext i32 {low} to i64"), high)


def _six_bits(loop, row):
    """Of the eight groups of q4_k and q5_k: scales times d, and minima times m."""
    code = loop.code
    first, second, both = (loop.load("i32", row, at) for at in (4, 8, 12))
    words = []
    for word, shift in ((first, 0), (second, 4)):
        high = code.math("or", _masked(code, both, shift, 15), _masked(code, word, 2, 48), "i32")
        words.append(_joined_words(code, _masked(code, word, 0, 63), high))
    codes = loop.floats(_bytes_of_words(code, words))
    two = code.let(f"fpext <2 x half> {loop.load('<2 x half>', row, 0)} to <2 x float>")
    lanes = numbers([0] * 8 + [1] * 8)
    factors = code.let(f"shufflevector <2 x float> {two}, <2 x float> poison, {INTS} {lanes}")
    return code.math("fmul", codes, factors, FLOATS)


def _negative(loop, number):
    return loop.code.let(f"fneg {FLOATS} {number}")


def _q4_k(loop, sums):
    code = loop.code

    def weights_of(row, group):
        return loop.evenly(15, loop.kept(row, group), _negative(loop, loop.kept(row, 8 + group)))

    for row in loop.rows:
        loop.keep(row, _six_bits(loop, row))
    for pair in range(4):
        low, high = ([weights_of(row, 2 * pair + n) for row in loop.rows] for n in range(2))
        for at in (0, LANES):
            raw = [loop.integers(row, 16 + 32 * pair + at) for row in loop.rows]
            some = [low[row](raw[row]) for row in loop.rows]
            sums = loop.added(sums, some, 64 * pair + at)
            raw = [code.math("lshr", codes, every(4), INTS) for codes in raw]
            some = [high[row](raw[row]) for row in loop.rows]
            sums = loop.added(sums, some, 64 * pair + 32 + at)
    return sums


def _by_groups(loop, sums, *, scales_of, codes_of, has_minima=False):
    """Of a block of eight groups of 32 inputs, whose scales `scales_of(loop, row)` keeps: one for
    16 inputs each; with minima, those of a group and then those. `codes_of(loop, row, group)`: the
    codes as 32 bytes."""
    code = loop.code

    def weights(row, bytes_, group, half):
        number = loop.half_of(bytes_, half)
        if has_minima:
            minimum = _negative(loop, loop.kept(row, 8 + group))
            return code.fma(number, loop.kept(row, group), minimum)
        return code.math("fmul", number, loop.kept(row, 2 * group + half), FLOATS)

    for row in loop.rows:
        loop.keep(row, scales_of(loop, row))
    for group in range(8):
        found = [codes_of(loop, row, group) for row in loop.rows]
        for half in range(2):
            some = [weights(row, found[row], group, half) for row in loop.rows]
            sums = loop.added(sums, some, 32 * group + LANES * half)
    return sums


def _codes_of_q5_k(loop, row, group):
    low = loop.bytes_shifted(
        loop.load(MANY_BYTES, row, 48 + 32 * (group // 2)), 4 * (group % 2), 15
    )
    high = loop.bytes_shifted(loop.load(MANY_BYTES, row, 16), group - 4, 16)
    return loop.bytes_joined(low, high)


def _scales_of_q6_k(loop, row):
    found = loop.floats(loop.integers(row, 192, how="sext"))
    return loop.code.math("fmul", found, loop.float16(row, 208), FLOATS)


def _codes_of_q6_k(loop, row, group):
    half, part = divmod(group, 4)
    low = loop.load(MANY_BYTES, row, 64 * half + 32 * (part % 2))
    high = loop.load(MANY_BYTES, row, 128 + 32 * half)
    low, high = (
        loop.bytes_shifted(low, 4 * (part // 2), 15),
        loop.bytes_shifted(high, 2 * part - 4, 48),
    )
    return loop.bytes_joined(low, high, 32)


def _scales_of_q3_k(loop, row):
    code = loop.code
    low, high = loop.load("i64", row, 96), loop.load("i32", row, 104)
    words = []
    for half in range(2):
        two = [_masked(code, high, 4 * half + shift, 3) for shift in (0, 2)]
        top = code.math("shl", _joined_words(code, *two), 4)
        words.append(code.math("or", _masked(code, low, 4 * half, 15, "i64"), top))
    codes = code.math("sub", _bytes_of_words(code, words), every(32), INTS)
    return code.math("fmul", loop.floats(codes), loop.float16(row, 108), FLOATS)


def _codes_of_q3_k(loop, row, group):
    low = loop.bytes_shifted(loop.load(MANY_BYTES, row, 32 + 32 * (group // 4)), 2 * (group % 4), 3)
    high = loop.bytes_shifted(loop.load(MANY_BYTES, row, 0), group - 2, 4)
    return loop.bytes_joined(low, high, 4)


def _q2_k(loop, sums):
    code = loop.code

    for row in loop.rows:
        raw = loop.integers(row, 0)
        for line, (shift, at) in enumerate(((0, 80), (4, 82))):
            some = loop.floats(loop.bits(raw, shift, 15))
            some = code.math("fmul", some, loop.float16(row, at), FLOATS)
            loop.keep(row, some, line=line)
    for half in range(2):
        for at in (0, LANES):
            raw = [loop.integers(row, 16 + 32 * half + at) for row in loop.rows]
            for part in range(4):
                first = 128 * half + 32 * part + at
                some = []
                for row in loop.rows:
                    minimum = _negative(loop, loop.kept(row, first // LANES, line=1))
                    weights = loop.evenly(3, loop.kept(row, first // LANES), minimum)
                    codes = raw[row]
                    if part:
                        codes = code.math("lshr", codes, every(2 * part), INTS)
                    some.append(weights(codes))
                sums = loop.added(sums, some, first)
    return sums


def _iq4_xs(loop, sums):
    code = loop.code

    def scales(row):
        """Of eight groups of 32, in the lower lanes."""
        low = code.spread(loop.load("i32", row, 4), "i32")
        low = loop.bits(low, numbers([*range(0, 32, 4), *[0] * 8]), 15)
        high = code.let(f"zext i16 {loop.load('i16', row, 2)} to i32")
        high = loop.bits(code.spread(high, "i32"), numbers([*range(0, 16, 2), *[0] * 8]), 3, up=4)
        codes = code.math("sub", code.math("or", low, high, INTS), every(32), INTS)
        return code.math("fmul", loop.floats(codes), loop.float16(row, 0), FLOATS)

    for row in loop.rows:
        loop.keep(row, scales(row))
    for group in range(8):
        decode = [loop.by_level(IQ4, loop.kept(row, group)) for row in loop.rows]
        raw = [loop.integers(row, 8 + LANES * group) for row in loop.rows]
        sums = loop.added(sums, [decode[row](raw[row]) for row in loop.rows], 32 * group)
        raw = [code.math("lshr", codes, every(4), INTS) for codes in raw]
        some = [decode[row](raw[row]) for row in loop.rows]
        sums = loop.added(sums, some, 32 * group + LANES)
    return sums


# The name of an encoding -> the sums after a block of each row: (loop, the sums before).
BLOCK_SUMS = {
    "q4_0": partial(_half_bytes, first=2, weights_of=_q4_0),
    "q4_1": partial(_half_bytes, first=4, weights_of=_q4_1),
    "q5_0": partial(_five_bits, high_at=2, has_minimum=False),
    "q5_1": partial(_five_bits, high_at=4, has_minimum=True),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": partial(_by_groups, scales_of=_scales_of_q3_k, codes_of=_codes_of_q3_k),
    "q4_k": _q4_k,
    "q5_k": partial(_by_groups, scales_of=_six_bits, codes_of=_codes_of_q5_k, has_minima=True),
    "q6_k": partial(_by_groups, scales_of=_scales_of_q6_k, codes_of=_codes_of_q6_k),
    "iq4_nl": partial(_half_bytes, first=2, weights_of=_iq4_nl),
    "iq4_xs": _iq4_xs,
    "gguf_mxfp4": partial(_half_bytes, first=1, weights_of=_gguf_mxfp4),
}
