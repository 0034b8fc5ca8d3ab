"""The ring of host slots: memory allocated once, written in place again and again. The one unsafe
class.

A view of a slot given to JAX may *be* the live weight (on the CPU an aligned array is aliased, not
copied; on an accelerator the transfer reads it in the background). So a slot may be written again
only when the output of what used it is ready. The schedule says when that is; nothing here checks
it.
"""

from __future__ import annotations

import mmap

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from jlayer.weights.direct import aligned_span
from jlayer.weights.layout import ALIGNMENT
from jlayer.weights.store import Placement, Segment

_HUGE_PAGE = 2 << 20


def slot_bytes_for(segments: tuple[Segment, ...]) -> int:
    """The slot that a tile of these segments needs: each segment with its surrounding blocks."""
    return sum(aligned_span(segment)[1] for segment in segments)


class HostSlots:
    """`n_slots` page-aligned buffers of `slot_bytes` each, in huge pages where the system has them,
    touched once."""

    def __init__(self, n_slots: int, slot_bytes: int):
        slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(
            -1, max(n_slots * slot_bytes, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if slot_bytes >= _HUGE_PAGE:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._memory, np.uint8)
        whole[:: mmap.PAGESIZE] = (
            0  # a fresh page faults in at a tenth of the speed of a touched one
        )
        self._slots = [whole[i * slot_bytes : (i + 1) * slot_bytes] for i in range(n_slots)]

    def room(self, slot: int, segments: tuple[Segment, ...]) -> list[np.ndarray]:
        """Where in a slot each segment's blocks go, one after another."""
        rooms, at = [], 0
        for segment in segments:
            length = aligned_span(segment)[1]
            rooms.append(self._slots[slot][at : at + length])
            at += length
        return rooms

    @staticmethod
    def view(room: np.ndarray, shift: int, place: Placement) -> np.ndarray:
        """A part's array inside the room that its segment was read into, without a copy."""
        begin = shift + place.offset
        raw = room[begin : begin + place.part.n_bytes]
        return raw.view(np.dtype(place.part.dtype)).reshape(place.part.shape)
