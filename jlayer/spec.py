"""What a model is made of, as plain data: its configuration, its leaves, dtypes and axes. Standard
library only.

Axis legend, used in every shape comment and einsum:
    B batch, T query positions, S cached positions, D width, F MLP width, N query heads, K key/value
    heads, G = N / K query heads for each key/value head, H head size, V vocabulary.

Axes of published tensors are named in words; `axis_sizes` turns a word into a number for one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# safetensors' word for a dtype -> (numpy's and JAX's word, bytes an element). A published tensor of
# any other dtype is refused by name.
DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
ITEM_BYTES = dict(DTYPES.values())
# The dtypes that a converted file may hold: quantised weights are integers.
STORED_DTYPES = {**DTYPES, "I8": ("int8", 1), "U8": ("uint8", 1)}
STORED_BYTES = dict(STORED_DTYPES.values())
PUBLISHED_DTYPE = {name: published for published, (name, _) in STORED_DTYPES.items()}

# O_DIRECT wants offset, length and address in multiples of the device's block; no common device
# has a larger one.
ALIGNMENT = 4096


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base and scaling. The last three fields belong to type `llama3` alone."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration, in the published words. Hashable: a static argument of everything
    that is compiled."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    hidden_act: str
    dtype: str | None


class Place(Enum):
    """Where the numbers of a leaf are when they are used."""

    TILE = "tile"  # streamed: a range of rows at a time
    DEVICE = "device"  # loaded once, in the compute dtype, and kept there
    ROWS = "rows"  # single rows are read on the host; the whole never moves


class Role(Enum):
    """What a leaf is used for. Where it is kept follows from it: see PLACE_OF."""

    MATRIX = "matrix"
    BIAS = "bias"  # moves with the rows of its matrix
    NORM = "norm"
    TABLE = "table"


PLACE_OF = {
    Role.MATRIX: Place.TILE,
    Role.BIAS: Place.TILE,
    Role.NORM: Place.DEVICE,
    Role.TABLE: Place.ROWS,
}


@dataclass(frozen=True)
class Leaf:
    """One weight tensor.

    `name` in our trees, `published` on disk (within its layer), `axes` in words. `of`: the matrix
    that a bias belongs to. `switch`: the config field that must be true for the leaf to exist.
    """

    name: str
    published: str
    axes: tuple[str, ...]
    role: Role = Role.MATRIX
    of: str | None = None
    switch: str | None = None

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(cfg)
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def place(self) -> Place:
        return PLACE_OF[self.role]


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


# Attention's scores are float32 [B, N, T, S]; above this size they are computed for fewer queries
# at a time.
SCORE_BYTES = 64 << 20


def query_pieces(*, batch: int, tokens: int, n_heads: int, capacity: int) -> int:
    """Into how many equal pieces attention divides the queries of a chunk: the fewest whose scores
    stay within SCORE_BYTES, down to two tokens. Both the program and the plan's sum use it."""
    pieces = 1
    while (
        4 * batch * n_heads * (tokens // pieces) * capacity > SCORE_BYTES
        and tokens % (2 * pieces) == 0
        and tokens // pieces > 2
    ):
        pieces *= 2
    return pieces
