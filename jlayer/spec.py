"""A model as plain data: its configuration, its leaves, dtypes and axes. Standard library only.

Axis legend, used in every shape comment and einsum:
    B batch, T query positions, S cached positions, D width, F MLP width, N query heads, K key/value
    heads, G = N / K query heads for each key/value head, H head size, V vocabulary.

Axes of published tensors are named in words; `axis_sizes` turns a word into a number for one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# dtype name in safetensors -> (name in numpy and JAX, bytes per element). A published tensor of any
# other dtype is refused by name.
DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
ITEM_BYTES = dict(DTYPES.values())
# The dtypes that a converted file may hold: quantized weights are integers.
STORED_DTYPES = {**DTYPES, "I8": ("int8", 1), "U8": ("uint8", 1)}
STORED_BYTES = dict(STORED_DTYPES.values())
PUBLISHED_DTYPE = {name: published for published, (name, _) in STORED_DTYPES.items()}

# O_DIRECT needs offset, length and address to be multiples of the device's block size. No common
# device has larger blocks.
ALIGNMENT = 4096


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base and scaling. The last three fields are used by type `llama3` only."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration, under the published names.

    Hashable, since it is a static argument of every compiled function.
    """

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
    """How a leaf gets to where it is used."""

    TILE = "tile"  # streamed: a range of rows at a time
    DEVICE = "device"  # loaded to the device once, in the compute dtype, and kept there
    ROWS = "rows"  # single rows are read to the host; the whole table is never loaded


class Role(Enum):
    """What a leaf is used for. PLACE_OF derives its place from its role."""

    MATRIX = "matrix"
    BIAS = "bias"  # streamed with the rows of its matrix
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

    `name`: in our trees. `published`: on disk, without the layer prefix. `axes`: keys of
    `axis_sizes`. `of`: the matrix that a bias belongs to. `switch`: the config field that must be
    true for the leaf to exist.
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
    """Axis name -> size. `heads` is N*H and `kv_heads` is K*H: published projections join both
    axes."""
    return {
        "width": cfg.hidden_size,
        "mlp": cfg.intermediate_size,
        "heads": cfg.num_attention_heads * cfg.head_dim,
        "kv_heads": cfg.num_key_value_heads * cfg.head_dim,
        "vocab": cfg.vocab_size,
    }


# Attention scores are float32 [B, N, T, S]. Above this size attention runs on fewer queries at a
# time.
SCORE_BYTES = 64 << 20


def query_pieces(*, batch: int, tokens: int, n_heads: int, capacity: int) -> int:
    """The number of equal pieces into which attention splits the queries of a chunk.

    The fewest whose scores stay within SCORE_BYTES; a piece has two tokens or more. The compiled
    program and the plan both use it.
    """
    pieces = 1
    while (
        4 * batch * n_heads * (tokens // pieces) * capacity > SCORE_BYTES
        and tokens % (2 * pieces) == 0
        and tokens // pieces > 2
    ):
        pieces *= 2
    return pieces
