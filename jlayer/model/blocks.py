"""How the block types of GGUF are decoded to float32: see `encodings.blocks` for their values.

Arrays are those of JAX or of numpy, and so are the results. Each function takes the blocks of some
rows, uint8 [rows, blocks, bytes], and gives the parts of `encodings.grouped.Decoded`, each [rows,
blocks, ...] with the part's inputs of a block in the last axes. There are only slices, shifts and
arithmetic, which a compiler makes one loop of.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from jlayer.encodings.blocks import BLOCKS, E2M1_DOUBLED, IQ4, Blocks
from jlayer.model.codes import looked_up, module_of


def _decoded(*, q, width, row: Blocks):
    """The parts of some rows: each float32 [rows, in / parts]."""
    rows = q.shape[0]
    blocks = q.reshape(rows, width // row.weights, row.n_block_bytes)
    return [part.reshape(rows, -1) for part in _PARTS[row.name](blocks)]


def _float16(blocks, at, *, more=1):
    """The float16 at a byte of each block, float32 [rows, blocks, 1, ...] with `more` axes."""
    bits = blocks[..., at].astype(np.uint16) | blocks[..., at + 1].astype(np.uint16) << 8
    number = _number(bits.view(np.float16))
    return number.reshape(*number.shape, *[1] * more)


def _cut(blocks, first, *axes):
    """The bytes of each block from `first` on, with these axes."""
    return blocks[..., first : first + int(np.prod(axes))].reshape(*blocks.shape[:2], *axes)


def _shifts(numbers, *axes):
    """How far to shift, along some axes of a block."""
    return np.array(numbers, np.uint8).reshape(1, 1, *axes)


def _halves(codes):
    """What the low and the high half bytes hold."""
    return codes & 15, codes >> 4


def _number(codes):
    return codes.astype(np.float32)


def _small(blocks, *, zero=0, minimum_at=None, high_at=None):
    """q4_0 to q5_1: a scale, perhaps a minimum, perhaps 32 fifth bits, and half bytes."""
    d, m = _float16(blocks, 0), None
    if minimum_at is not None:
        m = _float16(blocks, minimum_at)
    parts = []
    for part, codes in enumerate(_halves(blocks[..., -16:])):
        if high_at is not None:  # a bit for each input, the first eight in the first byte
            two = blocks[..., high_at + 2 * part :][..., :2, None]
            bits = two >> _shifts(range(8), 1, 8) & 1
            codes = codes | bits.reshape(codes.shape) << 4
        weights = d * (_number(codes) - zero)
        parts.append(weights if m is None else weights + m)
    return parts


def _q8_0(blocks):
    return [_float16(blocks, 0) * _number(blocks[..., 2:].view(np.int8))]


def _q2_k(blocks):
    d, m = _float16(blocks, 80, more=3), _float16(blocks, 82, more=3)
    scales, minima = _halves(_cut(blocks, 0, 2, 4, 2, 1))
    codes = _cut(blocks, 16, 2, 2, 16)
    return [
        d * _number(scales[:, :, :, part]) * _number(codes >> 2 * part & 3)
        - m * _number(minima[:, :, :, part])
        for part in range(4)
    ]


def _q3_k(blocks):
    d, highs = _float16(blocks, 108, more=3), _cut(blocks, 0, 1, 2, 16)
    # 16 scales of 6 bits: the low four in the half bytes of 8 bytes, the others in 4 bytes.
    concatenate = module_of(blocks).concatenate
    low = concatenate(_halves(blocks[..., 96:104]), axis=-1)
    high = concatenate([blocks[..., 104:108] >> 2 * n & 3 for n in range(4)], axis=-1)
    scales = (_number(low | high << 4) - 32).reshape(*blocks.shape[:2], 2, 4, 2, 1)
    codes = _cut(blocks, 32, 2, 2, 16)
    parts = []
    for part in range(4):
        # Where the high bit is not set, four is taken away.
        q = (
            _number(codes >> 2 * part & 3)
            + 4 * _number(highs >> _shifts([part, part + 4], 2, 1, 1) & 1)
            - 4
        )
        parts.append(d * scales[:, :, :, part] * q)
    return parts


def _six_bits(blocks):
    """The eight scales and minima of q4_k and q5_k, uint8 [rows, blocks, 8]: the first four have 6
    bits of a byte each; of the others the low four share a byte, and the high two are in the high
    bits of the first four."""
    first, second, both = (blocks[..., at : at + 4] for at in (4, 8, 12))
    low, high = _halves(both)
    concatenate = module_of(blocks).concatenate
    scales = concatenate([first & 63, low | first >> 6 << 4], axis=-1)
    minima = concatenate([second & 63, high | second >> 6 << 4], axis=-1)
    return scales, minima


def _q4_k(blocks, *, high_at=None):
    """Also q5_k, whose fifth bits begin at `high_at`: bit j of a byte belongs to group j of 32."""
    d, m = _float16(blocks, 0, more=2), _float16(blocks, 2, more=2)
    scales, minima = (some.reshape(*some.shape[:2], 4, 2, 1) for some in _six_bits(blocks))
    first = 16 if high_at is None else high_at + 32
    parts = []
    for part, codes in enumerate(_halves(_cut(blocks, first, 4, 32))):
        if high_at is not None:
            bits = _cut(blocks, high_at, 1, 32) >> _shifts(range(part, 8, 2), 4, 1) & 1
            codes = codes | bits << 4
        scale, minimum = d * _number(scales[..., part, :]), m * _number(minima[..., part, :])
        parts.append(scale * _number(codes) - minimum)
    return parts


def _q6_k(blocks):
    d = _float16(blocks, 208, more=3)
    scales = _cut(blocks, 192, 2, 4, 2, 1).view(np.int8)
    lows, highs = _cut(blocks, 0, 2, 2, 2, 16), _cut(blocks, 128, 2, 2, 16)
    parts = []
    for part in range(4):
        low = _halves(lows[:, :, :, part % 2])[part // 2]
        q = _number(low | (highs >> 2 * part & 3) << 4) - 32
        parts.append(d * _number(scales[:, :, :, part]) * q)
    return parts


def _iq4_nl(blocks):
    d = _float16(blocks, 0)
    return [d * looked_up(codes, IQ4) for codes in _halves(blocks[..., 2:])]


def _iq4_xs(blocks):
    d = _float16(blocks, 0, more=2)
    # Eight scales of 6 bits: the high two in two bytes, the low four in the half bytes of four.
    low = module_of(blocks).stack(_halves(blocks[..., 4:8]), axis=-1)
    high = blocks[..., 2:4, None] >> _shifts(range(0, 8, 2), 1, 4) & 3
    shape = (*blocks.shape[:2], 8, 1)
    scales = _number(low.reshape(shape) | high.reshape(shape) << 4) - 32
    return [d * scales * looked_up(codes, IQ4) for codes in _halves(_cut(blocks, 8, 8, 16))]


def _gguf_mxfp4(blocks):
    """Half of 2 ** (e - 127), as the levels are doubled: a number below 2 ** -126 for e < 2."""
    e, xp = blocks[..., :1].astype(np.uint32), module_of(blocks)
    small = np.uint32(1 << 21) << xp.minimum(e, np.uint32(1))
    bits = xp.where(e < 2, small, (xp.maximum(e, np.uint32(1)) - 1) << 23)
    scale = bits.view(np.float32)
    return [scale * looked_up(codes, E2M1_DOUBLED) for codes in _halves(blocks[..., 1:])]


_PARTS = {
    "q4_0": partial(_small, zero=8),
    "q4_1": partial(_small, minimum_at=2),
    "q5_0": partial(_small, zero=16, high_at=2),
    "q5_1": partial(_small, minimum_at=2, high_at=4),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": partial(_q4_k, high_at=16),
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "gguf_mxfp4": _gguf_mxfp4,
}
# The name of an encoding -> its function of the pieces of some rows.
DECODE_BLOCKS = {name: partial(_decoded, row=row) for name, row in BLOCKS.items()}
