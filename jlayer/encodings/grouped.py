"""The common part of what is decoded before it is multiplied, and of small integers with a scale
for each group of inputs of a row."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.base import Encoding
from jlayer.spec import ITEM_BYTES

# The most decoded bytes at a time during a product. On a CPU they fit a core's cache (three to six
# times faster than decoding the whole matrix); on a GPU there are enough rows to pay for a kernel
# launch.
BLOCK_BYTES = {"cpu": 1 << 20, "gpu": 32 << 20}
# What a program decodes to, where that is not the compute dtype: a CPU multiplies few columns in
# float32.
DECODED_DTYPE = {"cpu": "float32"}
Q, SCALE = "q", "scale"  # the pieces
WHOLE_ROW = 0  # as a group


@dataclass(frozen=True)
class Decoded(Encoding):
    """An encoding whose weights are decoded, some rows at a time, before they are multiplied.

    `parts`, `run`: the order in which they are decoded. Of each `parts * run` inputs, the first
    `run` belong to the first part, and so on; a row is decoded a part after another, as codes that
    share bytes are.
    """

    product: str = "grouped"
    main: str = Q
    parts: int = 1
    run: int = 1

    @property
    def is_plain(self):
        return False

    @property
    def width_unit(self):
        return self.parts * self.run

    def decoded_bytes(self, n_rows, width, *, dtype, platform):
        # A CPU multiplies in float32 when there are few columns: count the larger dtype.
        row_bytes = width * ITEM_BYTES[DECODED_DTYPE.get(platform, dtype)]
        return block_rows(n_rows, row_bytes, BLOCK_BYTES[platform]) * row_bytes


@dataclass(frozen=True)
class Grouped(Decoded):
    """A matrix [out, in] with `bits` per weight, and a scale for each `group` of inputs.

    The last group of a row may be shorter. A group of WHOLE_ROW is all inputs of a row.
    """

    bits: int = 8
    group: int = 128
    q_dtype: str = "int8"
    scale_dtype: str = "bfloat16"

    def n_groups(self, width: int) -> int:
        """The groups of a row of so many inputs."""
        return 1 if self.group == WHOLE_ROW else -(-width // self.group)

    def pieces(self, shape):
        rows, width = shape
        return {
            Q: (self.q_dtype, (rows, -(-width * self.bits // 8))),
            SCALE: (self.scale_dtype, (rows, self.n_groups(width))),
        }


def block_rows(n_rows: int, row_bytes: int, block_bytes: int) -> int:
    """The number of rows of `row_bytes` to decode at a time.

    All rows, or a multiple of 8 (at least 8) within `block_bytes`: as few blocks as possible, with
    the least overlap.
    """
    most = max(8, block_bytes // row_bytes // 8 * 8)
    if n_rows <= most:
        return n_rows
    n_blocks = -(-n_rows // most)
    return -(-n_rows // (8 * n_blocks)) * 8
