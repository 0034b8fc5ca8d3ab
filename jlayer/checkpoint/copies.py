"""Whether what an adapter has in the place of a model's own head or embedding is the same.

PEFT saves both whole where one of them has an adapter (`save_embedding_layers`): equal to the
model's, or trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jlayer.checkpoint.adapter import Adapter
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.spec import ITEM_BYTES

# (the number of the first row, rows of a tensor as an array of numpy), one after another; None:
# the model has other numbers than the published ones.
Rows = Iterable[tuple[int, object]] | None
AGAIN = "save it again with save_embedding_layers=False (save_pretrained of PEFT)"


def check_copies(adapter: Adapter, rows_of: Callable[[str], Rows]) -> None:
    """`rows_of`: published name of a tensor -> its rows. They may have been saved in another dtype
    than the model's, in which they are compared then. Raises UnsupportedModelError where they
    differ, or where there is nothing to compare them with; CheckpointError for another dtype."""
    for published, name in adapter.copies.items():
        entry = adapter.tensors[name]
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{adapter.file.path}: {name} is {entry.dtype}, expected one of "
                f"{', '.join(ITEM_BYTES)}; fetch the file again"
            )
        pieces = rows_of(published)
        if pieces is None:
            raise UnsupportedModelError(
                f"{adapter.file.path}: has {name}, which cannot be compared with {published}, as "
                f"that is quantized; if it was not trained, {AGAIN}"
            )
        if not all(_is_same(adapter, entry, first, rows) for first, rows in pieces):
            raise UnsupportedModelError(
                f"{adapter.file.path}: {name} is not the {published} of the model: it was trained, "
                f"which is not supported, or is of another model; if it was not, {AGAIN}, else "
                "merge it with PEFT (merge_and_unload) and take the result"
            )


def _is_same(adapter, entry, first, rows):
    import ml_dtypes  # not for a command's help
    import numpy as np

    kind = np.dtype(getattr(ml_dtypes, entry.dtype, entry.dtype))
    row_bytes = entry.n_bytes // entry.shape[0]
    with open(adapter.file.real, "rb") as file:
        file.seek(entry.offset + first * row_bytes)
        own = np.frombuffer(file.read(len(rows) * row_bytes), kind).reshape(rows.shape)
    with np.errstate(over="ignore"):
        return bool((rows.astype(kind) == own).all())
