"""Encodings with evenly spaced levels, as other tools write them: integers, and for each group of
inputs a scale, and perhaps a zero.

    weight = (code - zero) * scale

- packed4, packed8 (compressed-tensors' pack-quantized, and what is repacked from symmetric GPTQ):
  the zero is 8 or 128; of 4 bits, the low half of a byte is an input, the high half the next one.
- uint4, uint8 (repacked from GPTQ, AWQ and HQQ, and from asymmetric pack-quantized): the same
  bytes, and a zero for each group: a byte, or a number in the scale's dtype.
- int8 (compressed-tensors' int-quantized, and what is repacked from EETQ): the zero is 0.
- int8_scb (bitsandbytes): the scale of a row is the largest magnitude in it, and every product is
  multiplied by a 127th.

A name ends in the inputs of a group (`row`: all of them) and the scale's dtype. It begins with
`ordered_` where groups are not of neighbours (GPTQ's desc_act): the inputs are sorted by group, and
the piece `order` int32 [in] has the place that each had before, for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

from jlayer.encodings.grouped import SCALE, WHOLE_ROW, Grouped
from jlayer.spec import ITEM_BYTES

ZERO, ORDER = "zero", "order"  # pieces
GROUPS = {"g32": 32, "g64": 64, "g128": 128, "row": WHOLE_ROW}


@dataclass(frozen=True)
class Linear(Grouped):
    """A matrix [out, in] of integers, see above: `q` of them, `scale` [out, groups], and `zero`
    [out, groups] where `zero_dtype` says so; else `zero` is of all groups. `factor`: all weights
    are multiplied by it, last. `is_ordered`: there is a piece `order`."""

    zero: int = 0
    zero_dtype: str | None = None
    factor: float = 1.0
    is_ordered: bool = False

    def pieces(self, shape):
        found = super().pieces(shape)
        if self.zero_dtype:
            found[ZERO] = (self.zero_dtype, found[SCALE][1])
        if self.is_ordered:
            found[ORDER] = ("int32", shape[1:])
        return found

    def rows_per(self, piece):
        return 0 if piece == ORDER else 1


def _packed(bits, ending, group, dtype, *, is_ordered=False, **zero):
    parts = 8 // bits
    kind = f"uint{bits}" if "zero_dtype" in zero else f"packed{bits}"
    zeros = "_bytes" if zero.get("zero_dtype") == "uint8" else ""
    return Linear(
        f"{'ordered_' if is_ordered else ''}{kind}_{ending}_{dtype}{zeros}",
        bits=bits,
        parts=parts,
        group=group,
        q_dtype="uint8",
        scale_dtype=dtype,
        is_ordered=is_ordered,
        **zero,
    )


def _rows():
    for (ending, group), dtype in product(GROUPS.items(), ITEM_BYTES):
        for bits, is_ordered in product((4, 8), (False, True)[: 1 + (group != WHOLE_ROW)]):
            form = (bits, ending, group, dtype)
            yield _packed(*form, is_ordered=is_ordered, zero=1 << bits - 1)
            yield _packed(*form, is_ordered=is_ordered, zero_dtype="uint8")
            if not is_ordered:
                yield _packed(*form, zero_dtype=dtype)
        yield Linear(f"int8_{ending}_{dtype}", group=group, scale_dtype=dtype)


# bitsandbytes multiplies by this number in float32.
INT8_SCB = Linear("int8_scb", group=WHOLE_ROW, scale_dtype="float32", factor=7.874015718698502e-3)
LINEAR: dict[str, Linear] = {row.name: row for row in (*_rows(), INT8_SCB)}


@cache
def linear(
    bits: int, group: int, dtype: str, *, zero_dtype: str | None = None, is_ordered: bool = False
) -> Linear:
    """The row of unsigned codes with these fields; `dtype`: of its scales."""
    fields = (bits, group, dtype, zero_dtype, is_ordered)
    return next(
        row
        for row in LINEAR.values()
        if row.q_dtype == "uint8"
        and fields == (row.bits, row.group, row.scale_dtype, row.zero_dtype, row.is_ordered)
    )
