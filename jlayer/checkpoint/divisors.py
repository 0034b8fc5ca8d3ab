"""Checks the numbers that all scales of a matrix are divided by (NVFP4 of compressed-tensors): by 0
weights would be infinite, and no number that is stored shows it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from jlayer.checkpoint.agree import first_few
from jlayer.encodings.registry import ENCODINGS, split_piece
from jlayer.encodings.tables import GLOBAL_SCALE, Table
from jlayer.errors import CheckpointError


def refuse_zero_divisors(
    tables: Mapping[str, Mapping[str, tuple]],
    encodings: Mapping[str, str],
    read: Callable[[object, object], bytes],
    *,
    where: str,
) -> None:
    """Raises CheckpointError where a matrix's scales are divided by 0.

    `tables`: by file, name of a piece -> a place and what the file says of it; `encodings`: by
    matrix; `read`: (place, what the file says) -> the bytes of a small tensor.
    """
    zeros = [
        f"{place.name} in {place.file.name} is 0"
        for table in tables.values()
        for name, (place, info) in table.items()
        if _is_divisor(name, info, encodings) and 0.0 in _floats(read(place, info))
    ]
    if zeros:
        raise CheckpointError(
            f"{where}: {'; '.join(first_few(zeros))}: scales are divided by it, and weights would "
            "be infinite; fetch the folder again, or quantize the model again, without a layer "
            "whose weights are all 0"
        )


def _is_divisor(name, info, encodings):
    matrix, piece = split_piece(name)
    if piece != GLOBAL_SCALE or info.dtype != "float32":
        return False
    row = ENCODINGS.get(encodings.get(matrix))
    return isinstance(row, Table) and row.global_scale == "divides"


def _floats(raw):
    return [number for (number,) in struct.iter_unpack("<f", raw)]
