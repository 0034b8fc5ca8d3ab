"""How a tile's arrays cross the link: one by one, or joined in one array of bytes.

Each array that is put on a GPU costs time in Python and the driver (about 70 us on an H200, where
48 MiB take 900 us), and a quantized tile has up to four arrays, half of them small. A plain matrix
must be an array of its own, since it is multiplied without copying; a quantized one is decoded
first, so its pieces may be anywhere. Experts are small and many: they are joined, plain ones too,
in an array of their own numbers, of which XLA reads a part as it is or copies it on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from jlayer.plan.machine import PLATFORMS
from jlayer.spec import ALIGNMENT

# Larger tiles are not joined: their transfer hides the cost of an array, and offsets in a joined
# array are 32 bits.
MOST_BYTES = 512 << 20


@dataclass(frozen=True)
class Joined:
    """The layout of what a device has of a tile's parts in one array: the offset of each, and the
    bytes of all. `dtype`: of the array; bytes, unless all parts are of one."""

    offsets: tuple[int, ...]
    n_bytes: int
    dtype: str = "uint8"

    @property
    def shape(self) -> tuple[int]:
        """Of the array."""
        return (self.n_bytes // np.dtype(self.dtype).itemsize,)

    def all_offsets(self, n_devices: int) -> tuple[int, ...]:
        """Those of one device's parts after another's."""
        firsts = (device * self.n_bytes for device in range(n_devices))
        return tuple(first + offset for first in firsts for offset in self.offsets)


def joined(
    sizes: Sequence[int], *, is_plain: bool, platform: str, dtype: str = "uint8"
) -> Joined | None:
    """The layout of parts of `sizes` bytes in one array; None: they cross one by one (on a CPU:
    not at all).

    Each part has room for the disk blocks around it, however it is aligned on disk. So the offsets
    are equal for all tiles of the same parts. `dtype`: of the array.
    """
    if not PLATFORMS[platform].joins or is_plain or sum(sizes) > MOST_BYTES:
        return None
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    return Joined(tuple(offsets), at, dtype)
