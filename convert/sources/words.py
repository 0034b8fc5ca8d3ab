"""Small integers that share words or bytes, taken apart and put together in rows.

Pure functions of numpy arrays, of any number of rows at a time.
"""

from __future__ import annotations

import numpy as np

# AWQ's kernel gemm: which of the eight half bytes of a word is of each of eight outputs in a row.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def apart(words: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes of words that lie one below the other: uint32 [words, n] -> uint8 [words * 32 / bits,
    n]. `places`: where in a word each code is; by default the lowest is the first."""
    if 32 % bits:
        return of_stream(words.T, bits).T
    shifts = np.array(places or range(32 // bits), np.uint32) * np.uint32(bits)
    codes = words[:, None, :] >> shifts[None, :, None] & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(-1, words.shape[1])


def of_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of rows of words, of which the bits follow on each other: uint32 [n, words] -> uint8
    [n, words * 32 / bits]. A code may begin in a word and end in the next one, as GPTQ's of 3 bits
    do; a row has whole codes."""
    rows = np.ascontiguousarray(words, "<u4").view(np.uint8)
    each = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return np.packbits(each, axis=2, bitorder="little")[:, :, 0]


def together(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `apart`, without places: uint8 [n, m] -> uint32 [n * bits / 32, m], the last
    word with zeros where there is no code for it."""
    per = 32 // bits
    codes = np.pad(codes, ((0, -len(codes) % per), (0, 0))).astype(np.uint32)
    shifts = np.arange(per, dtype=np.uint32) * np.uint32(bits)
    shifted = codes.reshape(-1, per, codes.shape[1]) << shifts[None, :, None]
    return np.bitwise_or.reduce(shifted, axis=1)


def pairs(codes: np.ndarray) -> np.ndarray:
    """Half bytes [rows, in] -> bytes [rows, in / 2], of which the low half is the first input."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def in_order(packed: np.ndarray, order: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [rows, in * bits / 8] whose inputs are put in another order."""
    if bits == 8:
        return packed[:, order]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return pairs(codes[:, order])


def one_more(words: np.ndarray, bits: int) -> np.ndarray:
    """Zeros that are stored less one, in words uint32: what carries, carries on in the word, as it
    was taken away (GPTQModel's conversion of gptq to gptq_v2)."""
    return words + np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])


def eetq_rows(raw: np.ndarray) -> np.ndarray:
    """int8 [out, in], of the bytes uint8 [out, in] as EETQ lays them out for Turing and later (its
    `preprocess_weights_for_mixed_gemm`): two outputs take turns, each with 64 inputs; of four
    inputs the middle ones are exchanged; 128 is added; of 16 inputs the order is 0 1 8 9 2 3 10 11
    4 5 12 13 6 7 14 15."""
    out, width = raw.shape
    rows = raw.reshape(out // 2, width // 64, 2, 64).swapaxes(1, 2).reshape(out, width // 16, 16)
    rows = rows[..., _OF_EETQ] ^ np.uint8(128)
    return rows.reshape(out, width).view(np.int8)


def _of_eetq():
    """Where in 16 bytes each of 16 inputs is."""
    stored = [8 * (at % 4 // 2) + at % 2 + 2 * (at // 4) for at in range(16)]
    exchanged = [stored[at // 4 * 4 + (0, 2, 1, 3)[at % 4]] for at in range(16)]
    return [exchanged.index(number) for number in range(16)]


_OF_EETQ = _of_eetq()
