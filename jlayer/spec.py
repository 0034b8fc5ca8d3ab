"""What a model is made of: leaves with their published names, axes and dtypes. Standard library
only.

Axis legend, used in every shape comment and einsum:
    B batch, T query positions, S cached positions, D width, F MLP width, N query heads, K key/value
    heads, G = N / K query heads for each key/value head, H head size, V vocabulary.

Axes of published tensors are named in words; `axis_sizes` turns a word into a number for one model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jlayer.config import ModelConfig

# safetensors' word for a dtype -> (numpy's and JAX's word, bytes an element). What is not here is
# refused by name.
DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
ITEM_BYTES = dict(DTYPES.values())
# The same of all that a file of ours may hold: quantised weights are integers.
STORED_DTYPES = {**DTYPES, "I8": ("int8", 1), "U8": ("uint8", 1)}
STORED_BYTES = dict(STORED_DTYPES.values())
PUBLISHED_DTYPE = {name: published for published, (name, _) in STORED_DTYPES.items()}


@dataclass(frozen=True)
class Leaf:
    """One weight tensor: `name` in our trees, `published` on disk, `axes` in words, `switch` the
    config field it needs."""

    name: str
    published: str
    axes: tuple[str, ...]
    switch: str | None = None

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(cfg)
        return tuple(sizes[axis] for axis in self.axes)

    def n_elements(self, cfg: ModelConfig) -> int:
        return math.prod(self.shape(cfg))


def axis_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Word -> number: `heads` is N·H and `kv_heads` K·H, since the published projections are flat
    in both."""
    return {
        "width": cfg.hidden_size,
        "mlp": cfg.intermediate_size,
        "heads": cfg.num_attention_heads * cfg.head_dim,
        "kv_heads": cfg.num_key_value_heads * cfg.head_dim,
        "vocab": cfg.vocab_size,
    }


# Attention's scores are float32 [B, N, T, S]; above this they are made for fewer queries at a time.
SCORE_BYTES = 64 << 20


def query_pieces(*, batch: int, tokens: int, n_heads: int, capacity: int) -> int:
    """Into how many equal pieces attention divides the queries of a chunk: the fewest whose scores
    stay within SCORE_BYTES, down to two tokens. Stated here for the program and for the plan's sum.
    """
    pieces = 1
    while (
        4 * batch * n_heads * (tokens // pieces) * capacity > SCORE_BYTES
        and tokens % (2 * pieces) == 0
        and tokens // pieces > 2
    ):
        pieces *= 2
    return pieces
