"""What process 0 tells the others of a forward pass, as JSON and back: its chunks, and the shapes
of the runs that it is planned for.

An array is its bytes in base64: the table of 64 lanes of 8,192 tokens is 2.8 MB so.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields

import numpy as np

from jlayer.engine.batch import Part
from jlayer.engine.size import Size
from jlayer.model.cache import Rows, View
from jlayer.plan.shapes import RunShape

OF_PART = ("tokens", "adapters", "wanted", "places", "hidden", "hidden_places")
NOT_ARRAYS = ("windows", "flash", "is_chain")  # fields of Rows


def packed_parts(parts: Sequence[Part]) -> list:
    assert all(part.vectors is None for part in parts), "embeddings are refused with several hosts"
    return [
        [
            astuple(part.size),
            _packed_arrays(part, OF_PART),
            _packed_arrays(part.rows, _names(Rows)),
            {size: _packed_arrays(view, _names(View)) for size, view in part.rows.windows.items()},
            [part.rows.flash, part.rows.is_chain],
            sorted(part.without),
        ]
        for part in parts
    ]


def unpacked_parts(packed: Sequence) -> list[Part]:
    return [_unpacked_part(*one) for one in packed]


def _unpacked_part(size, of_part, of_rows, windows, flags, without):
    flash, is_chain = flags
    own = dict(zip([field.name for field in fields(Size)], size, strict=True))
    own["windows"] = tuple(map(tuple, own["windows"]))
    rows = Rows(
        **_unpacked_arrays(of_rows),
        # JSON has words alone as keys.
        windows={int(size): View(**_unpacked_arrays(view)) for size, view in windows.items()},
        flash=flash,
        is_chain=is_chain,
    )
    arrays = _unpacked_arrays(of_part)
    return Part(Size(**own), rows=rows, **arrays, without=frozenset(without))


def packed_shape(shape: RunShape) -> dict:
    return asdict(shape)


def unpacked_shape(packed: dict) -> RunShape:
    return RunShape(**packed)


def _names(kind):
    return [field.name for field in fields(kind) if field.name not in NOT_ARRAYS]


def _packed_arrays(holder, names):
    arrays = {name: getattr(holder, name) for name in names}
    return {
        name: [str(array.dtype), array.shape, b64encode(array.tobytes()).decode()]
        for name, array in arrays.items()
        if array is not None
    }


def _unpacked_arrays(packed):
    return {
        name: np.frombuffer(b64decode(data), dtype).reshape(shape)
        for name, (dtype, shape, data) in packed.items()
    }
