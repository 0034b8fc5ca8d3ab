"""Texts as vectors: the final hidden states of their tokens, pooled while forward passes give them.

A text rides as a prompt that nothing is drawn after, in the passes of all live runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from jlayer.engine.decoding import Decoding
from jlayer.engine.engine import Engine
from jlayer.engine.hidden import POOLINGS
from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.portions import portions
from jlayer.errors import UsageError

EMBEDDED = SamplingOptions(max_new_tokens=0)


def embed(
    engine: Engine,
    rows: Sequence[Row],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    adapter: str | None = None,
) -> np.ndarray:
    """The final hidden states of each prompt, pooled: float32 [prompts, D].

    `pooling`: "mean" of all tokens, or of the "last" one. `normalize`: to length 1. `adapter`: the
    name of one. Raises UsageError, and what a forward pass raises.
    """
    rows = pooled_rows(rows, pooling)
    options = replace(EMBEDDED, adapter=adapter)
    found = []
    for some in portions(engine, rows, options):
        with closing(Decoding(engine, some, options, most_unread=None)) as decoding:
            for _ in decoding:
                pass
        found += vectors(decoding)
    return normalized(np.array(found)) if normalize else np.array(found)


def pooled_rows(rows: Sequence[Row], pooling: str) -> list[Row]:
    """Prompts whose final hidden states are pooled so. Raises UsageError."""
    if pooling not in POOLINGS:
        raise UsageError(f"pooling: found {pooling!r}, expected one of {', '.join(POOLINGS)}")
    return [replace(row, pooling=pooling) for row in rows]


def vectors(decoding: Decoding) -> list[np.ndarray]:
    """Of each prompt float32 [D], once all of them are done."""
    return [lane.pooled.value for lane in decoding.lanes]


def normalized(found: np.ndarray) -> np.ndarray:
    """Vectors [B, D] of length 1; zeros stay zeros."""
    length = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
    return (found / np.where(length > 0, length, 1)).astype(np.float32)
