"""Chunks of weights cast to another dtype, and their NaN and infinite numbers counted."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jlayer.convert.sources.files import Chunk
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.tables import E8M0_NAN

NUMPY_DTYPE = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# Bytes: which bits of one are looked at, and what they are of a NaN. None: no byte is one.
_BYTES = {
    "int8": None,
    "uint8": None,
    "int32": None,
    "e8m0": (0xFF, E8M0_NAN),
    "float8_e4m3fn": (0x7F, 0x7F),
}
# A number is infinite or NaN exactly when all bits of its exponent are set.
_EXPONENT = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float32": np.uint32(0x7F800000),
}


# The byte of a number in a block of GGUF that tells, by dtype: how far from the number's begin, and
# as in `_BYTES`.
_OF_BLOCKS = {"float16": (1, 0x7C, 0x7C), "e8m0": (0, 0xFF, E8M0_NAN)}


def count_nonfinite(chunk: Chunk, dtype: str, *, begin: int = 0) -> int:
    """How many of the chunk's numbers are NaN or infinite. `dtype`: also "e8m0", of scales, and the
    name of a block type of GGUF, whose numbers are counted wherever in a block the chunk begins:
    `begin` is the bytes of the tensor before it.

    Read as signed integers, the positive ones are larger than all finite numbers; read as unsigned
    integers, the negative ones are. So two maxima, which allocate nothing, clear most chunks.
    """
    if dtype in BLOCKS:
        return _count_in_blocks(np.frombuffer(chunk, np.uint8), BLOCKS[dtype], begin)
    if dtype in _BYTES:
        if _BYTES[dtype] is None:
            return 0
        bits, none = _BYTES[dtype]
        return int(np.count_nonzero(np.frombuffer(chunk, np.uint8) & np.uint8(bits) == none))
    exponent = _EXPONENT[dtype]
    bits = np.frombuffer(chunk, exponent.dtype)
    signed = bits.view(f"i{bits.itemsize}")
    sign = 1 << (8 * bits.itemsize - 1)
    if signed.max(initial=0) < exponent and bits.max(initial=0) < int(exponent) | sign:
        return 0
    return int(np.count_nonzero(bits & exponent == exponent))


def _count_in_blocks(bytes_, row, begin):
    found = 0
    for at, dtype in row.numbers:
        more, bits, none = _OF_BLOCKS[dtype]
        some = bytes_[(at + more - begin) % row.n_block_bytes :: row.n_block_bytes]
        found += int(np.count_nonzero(some & np.uint8(bits) == none))
    return found


def cast(chunk: Chunk, dtype: str, target: str) -> memoryview:
    """The chunk's numbers in another dtype, rounded to nearest, ties to even, as torch rounds.

    Numbers beyond the target's range become infinite; `count_nonfinite` before and after shows it.
    """
    numbers = np.frombuffer(chunk, NUMPY_DTYPE[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = numbers.astype(NUMPY_DTYPE[target])
    return memoryview(numbers.view(np.uint8))
