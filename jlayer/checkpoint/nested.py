"""Scales that are stored as codes of one byte: the nested ("double quantized") statistics of
bitsandbytes.

    scale = level[code] * scale of 256 codes + offset

Each step is rounded to float32, as bitsandbytes does it, so that the decoded scales are its own,
bit for bit. The codes are read with their matrix; levels, scales of codes and offset are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jlayer.spec import ITEM_BYTES

BLOCK = 256  # codes that share a scale; the last ones may be fewer
DTYPE = "float32"
DECODED_BYTES = ITEM_BYTES[DTYPE]  # of the scale that a code, one byte, stands for
_AT_ONCE = 64 * BLOCK  # codes: what is made of them stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Nested:
    """What the codes of one matrix stand for: `levels` float32 [256], `scales` float32 [codes /
    256], and an `offset`."""

    levels: np.ndarray
    scales: np.ndarray
    offset: np.float32

    def decode(self, codes: np.ndarray, into: np.ndarray, *, first: int) -> None:
        """Fills `into`, float32 [n], with what the codes uint8 [n] from number `first` on stand
        for."""
        for at in range(0, len(codes), _AT_ONCE):
            some = codes[at : at + _AT_ONCE]
            begin = (first + at) // BLOCK
            scales = np.repeat(self.scales[begin : begin + _AT_ONCE // BLOCK + 1], BLOCK)
            skipped = first + at - begin * BLOCK
            found = into[at : at + len(some)]
            np.take(self.levels, some, out=found, mode="clip")  # with "raise" through a copy
            found *= scales[skipped : skipped + len(some)]
            found += self.offset
