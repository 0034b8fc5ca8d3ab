"""Lanes of tokens -> chunks of rows, as a step takes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jlayer.families.registry import has_state
from jlayer.model.cache import Rows
from jlayer.spec import ModelConfig
from jlayer.tuning.step import ChunkRows


def chunks_of(cfg: ModelConfig, lanes, count: int, *, share: float) -> Iterator[ChunkRows]:
    """The chunks of some `lanes.Lanes`, each of `count` lanes, whose weights count `share`
    times."""
    for first in range(0, len(lanes.ids), count):
        some = slice(first, first + count)
        texts = lanes.texts[some]
        yield ChunkRows(
            ids=lanes.ids[some].reshape(-1),
            targets=lanes.targets[some].reshape(-1),
            weights=(lanes.weights[some] * np.float32(share)).reshape(-1),
            rows=rows_of(cfg, lanes.positions[some], texts),
        )


def rows_of(cfg: ModelConfig, positions, texts) -> Rows:
    """What mixers know of lanes [B, T] of texts: a token sees those of its own text up to itself.
    Padding, text 0, sees itself alone."""
    b, t = texts.shape
    is_real = texts > 0
    lower = np.tril(np.ones((t, t), bool))[None]
    seen = (texts[:, :, None] == texts[:, None, :]) & is_real[:, :, None] & lower
    seen |= np.eye(t, dtype=bool)[None]
    nothing = np.ones(b, np.int32)  # beyond a pool of one row, or one slot
    state = has_state(cfg)
    return Rows(
        positions=positions.reshape(-1).astype(np.int32),
        write=np.where(is_real, 0, 1).reshape(-1).astype(np.int32),
        table=np.zeros((b, 0), np.int32),
        length=np.zeros(b, np.int32),
        seen=seen,
        is_long=_is_long(cfg, texts),
        source=nothing if state else None,
        target=nothing if state else None,
        kept=is_real if state else None,
        is_chain=state,
    )


def _is_long(cfg, texts):
    """Whether each row's text is longer than the length at which the rotary embedding switches."""
    if cfg.switches_at is None:
        return None
    lengths = (texts[:, :, None] == texts[:, None, :]).sum(axis=2)
    return ((lengths > cfg.switches_at) & (texts > 0)).reshape(-1)
