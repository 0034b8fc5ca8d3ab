"""What all decoding has in common, of arrays of JAX or of numpy: levels, and the order of a row's
inputs, which is that of `encodings.grouped.Decoded`."""

from __future__ import annotations

import numpy as np


def module_of(array):
    """The module whose functions take such arrays."""
    return array.__array_namespace__()


def looked_up(codes, levels):
    """The level of each code of 4 bits, float32, by choosing between halves of the table bit by
    bit: arithmetic alone, without a read for each weight."""
    chosen = [np.float32(level) for level in levels]
    for bit in range(4):
        is_set = codes >> bit & 1 == 1
        chosen = [
            module_of(codes).where(is_set, odd, even)
            for even, odd in zip(chosen[::2], chosen[1::2], strict=True)
        ]
    return chosen[0]


def in_order(x, *, parts: int, run: int):
    """Inputs [..., in] in the order in which the weights of such an encoding are decoded: to
    reorder a few inputs is cheap, and to interleave weights keeps a CPU from computing several at a
    time."""
    if parts == 1:
        return x
    return x.reshape(*x.shape[:-1], -1, parts, run).swapaxes(-3, -2).reshape(x.shape)


def in_rows(decoded, *, parts: int, run: int):
    """The inverse of `in_order`."""
    if parts == 1:
        return decoded
    cut = decoded.reshape(*decoded.shape[:-1], parts, -1, run)
    return cut.swapaxes(-3, -2).reshape(decoded.shape)
