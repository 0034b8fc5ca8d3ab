"""What the native code reads of a product: arrays of 8-byte numbers that Python fills in."""

from __future__ import annotations

import numpy as np

# The fields of a job, a product of some rows of one matrix. Strides are in bytes.
FIELDS = (
    *("first_block", "end_block", "block_rows"),  # what is handed out at a time
    *("rows", "chunk_rows"),  # rows that all steps take before the next rows
    *("length", "part"),  # inputs of a row as a kernel counts, and those that it takes at a time
    *("n_steps", "steps"),  # how many, and the address of the first
    *("main", "main_stride", "scale", "scale_stride"),
    *("extra", "extra_stride"),  # the piece of zeros, or of the number of all rows
    *("x", "x_stride", "columns"),  # packed columns are counted, and have no stride
    *("y", "y_stride"),  # of a column
)
JOB_BYTES = 8 * len(FIELDS)
# A step is a kernel's address, and the first column that it multiplies.
STEP_BYTES = 16


def offset(field: str) -> int:
    """Where a field of a job lies."""
    return 8 * FIELDS.index(field)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def aligned(n_bytes: int) -> np.ndarray:
    """Fresh bytes that begin on a cache line."""
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -address(raw) % 64
    return raw[start : start + n_bytes]
