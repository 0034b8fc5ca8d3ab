"""The block types of GGUF files: scales and codes of some inputs of a row lie together in a block.

A row of the one piece `q` is a row of the file, byte for byte: its blocks one after another, so
rows can be cut anywhere. `model.blocks` (JAX) and `cores.blocks` (numpy) decode them, bit for bit
as the package gguf of llama.cpp does. d and m are float16, q a code, s and t small integers that
are a scale and a minimum of some inputs of the block:

    q4_0  d * (q - 8)       q4_1  d * q + m            q8_0        d * q
    q5_0  d * (q - 16)      q5_1  d * q + m            gguf_mxfp4  2 ** (d - 127) * level, of MXFP4
    q2_k  d * s * q - m * t, per 16                    q3_k        d * (s - 32) * (q - 4), per 16
    q4_k, q5_k  d * s * q - m * t, per 32              q6_k        d * s * (q - 32), per 16
    iq4_nl  d * level       iq4_xs  d * (s - 32) * level, per 32

Every product is exact in float32, so only a subtraction of a minimum rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.grouped import Decoded, Q

# The sixteen levels of iq4_nl and iq4_xs, by their codes.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Those of gguf_mxfp4: twice the numbers of e2m1, with one zero alone.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Blocks(Decoded):
    """A matrix [out, in] in blocks of `weights` inputs, `n_block_bytes` each: `q` uint8
    [out, bytes of a row].

    `numbers`: where a block has its floating-point numbers, and their dtype.
    """

    n_block_bytes: int = 0
    weights: int = 0
    numbers: tuple[tuple[int, str], ...] = ((0, "float16"),)

    @property
    def width_unit(self):
        return self.weights

    def number_format(self, piece):
        return self.name

    def pieces(self, shape):
        rows, width = shape
        return {Q: ("uint8", (rows, -(-width // self.weights) * self.n_block_bytes))}


def _row(name, n_block_bytes, weights, *, parts=2, run=16, at=(0,), dtype="float16"):
    return Blocks(
        name,
        n_block_bytes=n_block_bytes,
        weights=weights,
        parts=parts,
        run=run,
        numbers=tuple((place, dtype) for place in at),
    )


BLOCKS: dict[str, Blocks] = {
    row.name: row
    for row in (
        _row("q4_0", 18, 32),
        _row("q4_1", 20, 32, at=(0, 2)),
        _row("q5_0", 22, 32),
        _row("q5_1", 24, 32, at=(0, 2)),
        _row("q8_0", 34, 32, parts=1, run=32),
        _row("q2_k", 84, 256, parts=4, run=32, at=(80, 82)),
        _row("q3_k", 110, 256, parts=4, run=32, at=(108,)),
        _row("q4_k", 144, 256, run=32, at=(0, 2)),
        _row("q5_k", 176, 256, run=32, at=(0, 2)),
        _row("q6_k", 210, 256, parts=4, run=32, at=(208,)),
        _row("iq4_nl", 18, 32),
        _row("iq4_xs", 136, 256),
        _row("gguf_mxfp4", 17, 32, dtype="e8m0"),
    )
}
