"""Quantized weights in numpy: packed half bytes, scales, and dequantization to float32.

Bit for bit what `jlayer.encodings` describes and `jlayer.model.products` computes on the device.
"""

from __future__ import annotations

import numpy as np

from jlayer.encodings.grouped import Grouped
from jlayer.encodings.int4 import CUBE, FLOAT_SHIFT, SCALE_OFFSET, ZERO

# The weight of each half byte, in units of the scale.
LEVELS = (
    (np.arange(16, dtype=np.float32) - ZERO)
    * (1 + np.square(np.arange(16, dtype=np.float32) - ZERO) * CUBE)
).astype(np.float32)


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs half bytes: uint8 [rows, width] with one in each -> uint8 [rows, (width + 1) // 2]."""
    half = -(-codes.shape[1] // 2)
    packed = codes[:, :half].copy()
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """The inverse of `pack`."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)[:, :width]


def decode_scales(codes: np.ndarray) -> np.ndarray:
    """int4's scales as float32."""
    bits = codes.astype(np.uint32)
    magnitude = ((bits & 127) << FLOAT_SHIFT) + np.uint32(SCALE_OFFSET)
    return (magnitude | (bits >> 7) << 31).view(np.float32)


def dequantize(scheme: Grouped, q: np.ndarray, scale: np.ndarray, *, width: int) -> np.ndarray:
    """The weights float32 [rows, width] of some or all rows of a quantized matrix."""
    if scheme.bits == 4:
        numbers, factors = LEVELS[unpack(q, width)], decode_scales(scale)
    else:
        numbers, factors = q.astype(np.float32), scale.astype(np.float32)
    return numbers * np.repeat(factors, scheme.group, axis=1)[:, :width]
