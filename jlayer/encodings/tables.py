"""Encodings with 16 levels: a half byte names a level, and each group of inputs has a scale.

    weight = level[half byte] * scale

MXFP4 (OCP Microscaling Formats 1.0), 4.25 bits per weight: the levels are the numbers of e2m1, and
the scale of 32 inputs is one byte s of e8m0, 2 ** (s - 127). The byte 255 stands for no number.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.grouped import SCALE, Grouped

# The sixteen numbers of e2m1, by their bits: sign, two of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# A byte of e8m0 that is no number.
E8M0_NAN = 255


@dataclass(frozen=True)
class Table(Grouped):
    """A matrix [out, in] of half bytes: `q` uint8 [out, in / 2] and `scale` [out, in / group].

    `levels`: what each half byte stands for, before its scale. The low half of a byte is an input,
    the high half the next one. `scales`: how a scale is stored: the name of a function of
    `model.products` and of `cores.decode`.
    """

    bits: int = 4
    group: int = 32
    q_dtype: str = "uint8"
    scale_dtype: str = "uint8"
    levels: tuple[float, ...] = E2M1
    scales: str = "e8m0"

    def number_format(self, piece):
        return self.scales if piece == SCALE else None


MXFP4 = Table("mxfp4")
# Another encoding by levels is a row here; another form of scales, a function where it is decoded.
TABLES: dict[str, Table] = {row.name: row for row in (MXFP4,)}
