"""Encodings with 16 levels: a half byte names a level, and each group of inputs has a scale.

    weight = level[half byte] * scale

- mxfp4 (OCP Microscaling Formats 1.0), 4.25 bits per weight: the levels are the numbers of e2m1,
  and the scale of 32 inputs is one byte s of e8m0, 2 ** (s - 127). The byte 255 stands for no
  number.
- nf4 and fp4 of bitsandbytes, 4.5 bits per weight: the scale of 64 inputs is the largest magnitude
  among them, float32. A name that ends in `_g128`, say, has groups of 128. Nested statistics are
  decoded to this when they are read, which is exact: they are defined as float32.
- nvfp4, 4.5 bits per weight: the levels of e2m1; the scale of 16 inputs is a float8_e4m3fn, divided
  in float32 by one float32 of all rows, `global_scale` (compressed-tensors); or times it
  (nvfp4_modelopt).
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.fp8 import ALL_ROWS, FLOAT8
from jlayer.encodings.grouped import SCALE, Grouped

# The sixteen numbers of e2m1, by their bits: sign, two of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# NF4 of QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution, as bitsandbytes
# has them in float32.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# FP4 of bitsandbytes: a sign, and these twelfths.
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(x / 12 for x in (*_TWELFTHS, 0.0, *(-x for x in _TWELFTHS[1:])))
# How many inputs share a scale: what bitsandbytes takes as a block size, its own choice first.
BLOCK_SIZES = (64, 32, 128, 256, 512, 1024, 2048, 4096)
GLOBAL_SCALE = "global_scale"  # a piece
# A byte of e8m0 that is no number.
E8M0_NAN = 255


@dataclass(frozen=True)
class Table(Grouped):
    """A matrix [out, in] of half bytes: `q` uint8 [out, in / 2] and `scale` [out, in / group].

    `levels`: what each half byte stands for, before its scale. One half of a byte is an input, the
    other the next one: the low half first, or the high one (`is_high_first`). `scales`: how a scale
    is stored: the name of a function of `model.decoding` and of `cores.decode`.
    `global_scale`: what is done to all scales by the number of the piece of this name: "divides" or
    "multiplies"; None: there is none.
    """

    parts: int = 2
    bits: int = 4
    group: int = 32
    q_dtype: str = "uint8"
    scale_dtype: str = "uint8"
    levels: tuple[float, ...] = E2M1
    scales: str = "e8m0"
    is_high_first: bool = False
    global_scale: str | None = None

    def pieces(self, shape):
        found = super().pieces(shape)
        return found | ({GLOBAL_SCALE: ("float32", (1,))} if self.global_scale else {})

    def rows_per(self, piece):
        return ALL_ROWS if piece == GLOBAL_SCALE else 1

    def number_format(self, piece):
        return "e8m0" if piece == SCALE and self.scales == "e8m0" else None


def _bitsandbytes(kind, levels, size):
    return Table(
        kind if size == BLOCK_SIZES[0] else f"{kind}_g{size}",
        group=size,
        scale_dtype="float32",
        levels=levels,
        scales="number",
        is_high_first=True,
    )


def _nvfp4(name, global_scale):
    return Table(name, group=16, scale_dtype=FLOAT8, scales="number", global_scale=global_scale)


MXFP4 = Table("mxfp4")
# (kind, block size) of bitsandbytes -> the encoding.
FOUR_BITS: dict[tuple[str, int], Table] = {
    (kind, size): _bitsandbytes(kind, levels, size)
    for kind, levels in (("nf4", NF4), ("fp4", FP4))
    for size in BLOCK_SIZES
}
# Another encoding by levels is a row here; another form of scales, a function where it is decoded.
TABLES: dict[str, Table] = {
    row.name: row
    for row in (
        MXFP4,
        *FOUR_BITS.values(),
        *(_nvfp4("nvfp4", "divides"), _nvfp4("nvfp4_modelopt", "multiplies")),
    )
}
