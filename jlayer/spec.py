"""A model as plain data: its configuration, its leaves, dtypes and axes. Standard library only.

Axis legend, used in every shape comment and einsum:
    R rows of a chunk (tokens of any lanes), B lanes of a pane, T rows of each of its lanes,
    S entries of a lane's table, P entries of a pool, D width, F MLP width, N query heads,
    K key/value heads, G = N / K query heads for each key/value head, H head size, V vocabulary.

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


# Attention takes as many lanes and cached entries at a time as stay within these bytes: of scores,
# float32 [lanes, N, T, entries], and of the keys and values that are gathered.
SCORE_BYTES = 64 << 20
GATHERED_BYTES = 64 << 20
# Flash attention gives a block of the card the rows of a key/value head, up to FLASH_ROWS. Where
# that makes few blocks, the entries are cut too, up to FLASH_BLOCKS: about the multiprocessors of a
# card (H200: 64 rows and 8192 entries take 0.17 ms in 32 blocks, 0.09 in 128, 0.14 in 512).
FLASH_ROWS = 128
FLASH_BLOCKS = 128


@dataclass(frozen=True)
class Pieces:
    """How the attention of a pane is cut: `lanes` at a time; their committed entries in `committed`
    pieces, and the entries of the chunk itself in `fresh` pieces. `splits`: into how many parts
    flash attention cuts a piece of the committed entries, all at once; 0: it is not used."""

    lanes: int
    committed: int
    fresh: int
    splits: int = 0


def attention_pieces(
    cfg: ModelConfig, *, lanes: int, tokens: int, capacity: int, flash: bool = False
) -> Pieces:
    """The fewest pieces that stay within SCORE_BYTES and GATHERED_BYTES, fewer lanes first.

    The compiled program and the plan both use it. `capacity` is the length of the lanes' tables.
    `flash`: the device has flash attention, which keeps no scores. A single row for each lane does
    without: it is faster so (H200, one lane with 8192 entries: 0.05 ms against 0.08 at best).
    """
    score = 4 * cfg.num_attention_heads * tokens
    # With flash attention the numbers have 16 bits. A CPU makes float32 of such.
    gathered = 2 * (2 if flash else 4) * cfg.num_key_value_heads * cfg.head_dim
    flash = flash and tokens > 1

    def fits(at_once, entries):
        return (flash or at_once * entries * score <= SCORE_BYTES) and (
            at_once * entries * gathered <= GATHERED_BYTES
        )

    at_once, committed, fresh = lanes, 1, 1
    while at_once > 1 and at_once % 2 == 0 and not fits(at_once, capacity):
        at_once //= 2
    while capacity % (2 * committed) == 0 and not fits(at_once, capacity // committed):
        committed *= 2
    while tokens % (2 * fresh) == 0 and at_once * (tokens // fresh) * score > SCORE_BYTES:
        fresh *= 2
    if not flash:
        return Pieces(at_once, committed, fresh)
    rows = tokens * (cfg.num_attention_heads // cfg.num_key_value_heads)
    blocks = at_once * cfg.num_key_value_heads * -(-rows // FLASH_ROWS)
    entries, splits = capacity // committed, 1
    while (
        entries % (2 * splits) == 0
        and entries // splits > FLASH_ROWS
        and (2 * splits * blocks <= FLASH_BLOCKS)
    ):
        splits *= 2
    return Pieces(at_once, committed, fresh, splits)
