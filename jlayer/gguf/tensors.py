"""Reads small tensors of a GGUF file whose numbers belong to a model's config."""

from __future__ import annotations

import os
import struct

from jlayer.errors import CheckpointError, StorageError
from jlayer.gguf.reader import Head
from jlayer.strict import close, open_regular

MOST_FACTORS = 1 << 12


def floats(head: Head, name: str) -> tuple[float, ...]:
    """The numbers of a vector of float32. Raises CheckpointError where the tensor is another
    thing, or StorageError."""
    tensor = head.tensors[name]
    if tensor.type != "float32" or len(tensor.shape) != 1 or tensor.shape[0] > MOST_FACTORS:
        raise CheckpointError(
            f"{tensor.path}: tensor {name} is {tensor.type} {list(tensor.shape)}, expected a "
            f"vector of float32 of at most {MOST_FACTORS}"
        )
    fd = open_regular(tensor.path)
    try:
        raw = os.pread(fd, tensor.n_bytes, tensor.offset)
    except OSError as error:
        raise StorageError(f"{tensor.path}: cannot be read ({error.strerror})") from None
    finally:
        close(fd)
    if len(raw) != tensor.n_bytes:
        raise CheckpointError(f"{tensor.path}: cut off in tensor {name}; fetch it again")
    return struct.unpack(f"<{tensor.shape[0]}f", raw)
