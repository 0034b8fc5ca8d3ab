"""The rows of a single prompt, for calling the functions of a layer by hand."""

import numpy as np

from jlayer.model.cache import Rows


def chain(n_tokens: int, *, capacity: int = 64) -> Rows:
    """One lane whose tokens are the first ones, written to the first rows of the pool."""
    numbers = np.arange(n_tokens, dtype=np.int32)
    return Rows(
        positions=numbers,
        write=numbers,
        table=np.zeros((1, capacity), np.int32),
        length=np.zeros(1, np.int32),
        seen=np.tri(n_tokens, dtype=bool)[None],
    )
