"""What int8 and int4 share: small integers, with a scale for each group of inputs of a row."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.base import Encoding
from jlayer.spec import ITEM_BYTES

# The most of a matrix that is decoded at a time for a product: on a CPU what stays in a core's
# cache (three to six times faster than the whole), on a GPU enough rows to be worth a kernel's
# start.
BLOCK_BYTES = {"cpu": 1 << 20, "gpu": 32 << 20}
Q, SCALE = "q", "scale"  # the pieces


@dataclass(frozen=True)
class Grouped(Encoding):
    """A matrix [out, in]: `bits` a weight, and a scale for each `group` of inputs. The last group
    of a row may be short."""

    product: str = "grouped"
    main: str = Q
    bits: int = 8
    group: int = 128
    q_dtype: str = "int8"
    scale_dtype: str = "bfloat16"

    def pieces(self, shape):
        rows, width = shape
        return {
            Q: (self.q_dtype, (rows, -(-width * self.bits // 8))),
            SCALE: (self.scale_dtype, (rows, -(-width // self.group))),
        }

    @property
    def is_plain(self):
        return False

    def decoded_bytes(self, n_rows, width, *, dtype, platform):
        # A CPU multiplies few columns in float32.
        row_bytes = width * ITEM_BYTES["float32" if platform == "cpu" else dtype]
        return block_rows(n_rows, row_bytes, BLOCK_BYTES[platform]) * row_bytes


def block_rows(n_rows: int, row_bytes: int, block_bytes: int) -> int:
    """How many rows of `row_bytes` are decoded at a time: all, or a multiple of 8 (8 at least)
    within `block_bytes`, such that the blocks are the fewest and overlap least."""
    most = max(8, block_bytes // row_bytes // 8 * 8)
    if n_rows <= most:
        return n_rows
    n_blocks = -(-n_rows // most)
    return -(-n_rows // (8 * n_blocks)) * 8
