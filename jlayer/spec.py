"""A model as plain data: its configuration, its leaves, dtypes and axes. Standard library only.

Axis legend, used in every shape comment and einsum:
    R rows of a chunk (tokens of any lanes), B lanes of a pane, T rows of each of its lanes,
    S entries of a lane's table, P entries of a pool, D width, F MLP width, N query heads,
    K key/value heads, G = N / K query heads for each key/value head, H head size, V vocabulary.
    Of a gated DeltaNet: K key heads of H numbers, N value heads of E numbers, G = N / K value heads
    for each key head, C channels of its convolution, W tokens that one output is made of.
    Of latent attention: L numbers of an entry: its latent, and the part of its key that is turned.
    Of experts: E experts of a layer.

Axes of published tensors are named in words; `axis_sizes` turns a word into a number for one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from jlayer.additions import Additions
from jlayer.parts import (
    Attention,
    Delta,
    Experts,
    Latent,
    Logits,
    Mlp,
    Norm,
    Places,
    Quantized,
    Scale,
)

# dtype name in safetensors -> (name in numpy and JAX, bytes per element). A published tensor of any
# other dtype is refused by name.
DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
ITEM_BYTES = dict(DTYPES.values())
# The dtypes that a file of ours may hold: encoded weights are integers, or numbers of FP8; where an
# encoding has its inputs in an order of its own, their places are I32. Of a published form that is
# exported shapes are I64.
STORED_DTYPES = {
    **DTYPES,
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
}
STORED_BYTES = dict(STORED_DTYPES.values())
PUBLISHED_DTYPE = {name: published for published, (name, _) in STORED_DTYPES.items()}

# O_DIRECT needs offset, length and address to be multiples of the device's block size. No common
# device has larger blocks.
ALIGNMENT = 4096


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration. Hashable, since plans and programs are kept by it.

    `attentions`: each form of attention in the model; `delta`: what some layers have instead of
    attention; `layer_types`: of each layer the name of its own, () where there is one form only.
    `experts`: what some layers have instead of an MLP. `n_further`: the layers after the last that
    guess further tokens, which a checkpoint may have and which are left out.
    `is_parallel`: attention and MLP have the same input, and are added together. `layer_scalar`: a
    layer's output is multiplied by a number of its own. `qkv_is_fused`: queries, keys and values
    are one matrix. `head_bias`: the head has one, whether or not its matrix is the embedding.
    `quantized`: what is said of published weights that are no plain numbers. `layout`: what of the
    values is not as published, by the names of `families.layout`. `additions`: what adapters that
    are used beside the weights add to some matrices.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    attentions: tuple[Attention | Latent, ...]
    tie_word_embeddings: bool = False
    dtype: str | None = None
    layer_types: tuple[str, ...] = ()
    delta: Delta | None = None
    experts: Experts | None = None
    n_further: int = 0
    norm: Norm = Norm()
    places: Places = Places()
    mlp: Mlp = Mlp()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qkv_is_fused: bool = False
    is_parallel: bool = False
    embedding_scale: Scale = Scale()
    residual_scale: float = 1.0
    layer_scalar: bool = False
    logits: Logits = Logits()
    quantized: Quantized | None = None
    layout: tuple[str, ...] = ()
    additions: Additions | None = None

    @property
    def attention(self) -> Attention | Latent:
        """The first form; the only one of most models."""
        return self.attentions[0]

    @property
    def switches_at(self) -> int | None:
        """The most tokens of a text with the rotary embedding of short texts; None: all have the
        same."""
        found = (how.rope.switches_at for how in self.attentions if how.rope)
        return min(filter(None, found), default=None)


class Place(Enum):
    """How a leaf gets to where it is used."""

    TILE = "tile"  # streamed: a range of rows at a time, or all of a leaf that is used uncut
    DEVICE = "device"  # loaded to the device once and kept there, norms in the compute dtype
    ROWS = "rows"  # single rows are read to the host; the whole table is never loaded


class Role(Enum):
    """What a leaf is used for. PLACE_OF derives its place from its role."""

    MATRIX = "matrix"
    BIAS = "bias"  # streamed with the rows of its matrix
    LOW_RANK = "low rank"  # of an adapter: with the rows of its matrix, or for all of them
    NORM = "norm"
    EXACT = "exact"  # float32, whatever is computed in
    TABLE = "table"


PLACE_OF = {
    Role.MATRIX: Place.TILE,
    Role.BIAS: Place.TILE,
    Role.LOW_RANK: Place.TILE,
    Role.NORM: Place.DEVICE,
    Role.EXACT: Place.DEVICE,
    Role.TABLE: Place.ROWS,
}


@dataclass(frozen=True)
class Leaf:
    """One weight tensor.

    `name`: in our trees. `published`: on disk, without the layer prefix. `axes`: in words; the
    sizes of those of one kind of layer are in `sizes`, the others in `axis_sizes`. `of`: the matrix
    that a bias belongs to, or what an adapter adds. `n_experts`: each of so many experts has one,
    with its number for `{expert}` in the published name; 0: the layer has one. `moves`: a function
    reads it uncut, and it is too large to stay on the device: it is streamed as one tile.
    """

    name: str
    published: str
    axes: tuple[str, ...]
    role: Role = Role.MATRIX
    of: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    n_experts: int = 0
    moves: bool = False

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(cfg) | dict(self.sizes)
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def place(self) -> Place:
        return Place.TILE if self.moves else PLACE_OF[self.role]

    @property
    def is_uncut(self) -> bool:
        """Whether functions read it as a whole: no range of its rows is multiplied by itself."""
        return PLACE_OF[self.role] is Place.DEVICE


def resident_dtype(leaf: Leaf, dtype: str) -> str:
    """The dtype in which a leaf that is used uncut enters the arithmetic, where `dtype` is computed
    in. One that stays on the device is kept in it; one that moves is cast where it is used."""
    return "float32" if leaf.role is Role.EXACT else dtype


def axis_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Axis name -> size, of the axes that all layers share."""
    return {"width": cfg.hidden_size, "mlp": cfg.intermediate_size, "vocab": cfg.vocab_size}
