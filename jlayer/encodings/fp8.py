"""FP8: a weight is a number of float8_e4m3fn (a sign, 4 bits of exponent, 3 of mantissa), times a
scale that many share. `q` float8_e4m3fn [out, in].

    weight = q * scale, one rounding in float32

- fp8_128x128 (DeepSeek V3 and those after it): `scale` [out / 128, in / 128], one for each square
  of a grid; the last ones of a row and of a column may be smaller.
- fp8_row (compressed-tensors, by channel): `scale` [out, 1], one for each row.
- fp8_tensor (compressed-tensors and Transformers, per tensor): `scale` [1], one for all.

A name ends in the scale's dtype where it is not float32. The codes 127 and 255 stand for no number.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.grouped import SCALE, WHOLE_ROW, Decoded, Q

FLOAT8 = "float8_e4m3fn"
ALL_ROWS = 0  # as the rows that share a scale
BLOCK = 128  # of the grid: rows, and inputs


@dataclass(frozen=True)
class Float8(Decoded):
    """A matrix [out, in] of FP8, see above. `rows`, `group`: so many rows and inputs share a scale;
    ALL_ROWS, WHOLE_ROW: all of them."""

    rows: int = 1
    group: int = WHOLE_ROW
    scale_dtype: str = "float32"

    def pieces(self, shape):
        rows, width = shape
        n_groups = 1 if self.group == WHOLE_ROW else -(-width // self.group)
        scales = (-(-rows // self.rows), n_groups) if self.rows != ALL_ROWS else (1,)
        return {Q: (FLOAT8, (rows, width)), SCALE: (self.scale_dtype, scales)}

    def rows_per(self, piece):
        return self.rows if piece == SCALE else 1


_SHARED = {"128x128": (BLOCK, BLOCK), "row": (1, WHOLE_ROW), "tensor": (ALL_ROWS, WHOLE_ROW)}
FP8: dict[str, Float8] = {
    row.name: row
    for shared, (rows, group) in _SHARED.items()
    for dtype in ("float32", "bfloat16", "float16")
    for row in (
        Float8(
            f"fp8_{shared}" + (f"_{dtype}" if dtype != "float32" else ""),
            rows=rows,
            group=group,
            scale_dtype=dtype,
        ),
    )
}
