"""How a matrix is kept in fewer bits: the schemes, the pieces that each is stored in, and which
matrix of a model is kept in which.

Two schemes, both of groups along the input (a row's last group may be short):

    int8  8.125 bits: `q` int8 [out, in], `scale` bfloat16, one for 128 inputs; weight = q * scale.
    int4  4.25 bits: `q` uint8 [out, (in + 1) // 2], the low halves of a row's bytes being its first
          half and the high ones its second, so that it unpacks without shuffling; `scale` uint8,
          one for 32 inputs: sign, 4 bits of exponent, 3 of mantissa.
          weight = scale * (u + u * u * u / 128), u = half byte - 7.

The steps of int4 grow outwards, as trained weights thin out there (18% less squared error than even
steps at the same bits); they reach further up (12) than down (9.7), and the scale's sign turns a
group so that its largest weight is up. Every step of the way back is exact in float32.

Standard library only; the arithmetic is in `weights.packed` (numpy) and `model.quant` (JAX).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jlayer.families.llama import layer_of
from jlayer.spec import STORED_BYTES

# int4: the half byte that stands for zero, and what the cube of a step is multiplied by.
ZERO = 7
CUBE = 1 / 128
# int4's scale: 2 ** (exponent - SCALE_BIAS) * (1 + mantissa / 8), from 6e-5 to 3.75.
SCALE_BIAS = 14
MANTISSA_BITS = 3
# What the bits of its exponent and mantissa are shifted by, and then raised by, to be a float32.
FLOAT_SHIFT = 23 - MANTISSA_BITS
SCALE_OFFSET = (127 - SCALE_BIAS) << 23

# The most of a matrix that is written out at a time for a product: on a CPU what stays in a core's
# cache, on a GPU enough rows to be worth a kernel's start.
BLOCK_BYTES = {"cpu": 1 << 20, "gpu": 32 << 20}

# The average over a model's block matrices that int4 stays within, all included, and how far above
# the typical one a matrix stands out.
INT4_BITS = 4.5
STANDS_OUT = 4.0


@dataclass(frozen=True)
class Scheme:
    """A way of keeping a matrix [out, in]: `bits` a weight, and a scale for each `group` of
    inputs."""

    name: str
    bits: int
    group: int
    q_dtype: str
    scale_dtype: str

    def pieces(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, int]]]:
        """What a matrix is stored as: piece -> its dtype and shape. Rows stay rows."""
        rows, width = shape
        return {
            "q": (self.q_dtype, (rows, -(-width * self.bits // 8))),
            "scale": (self.scale_dtype, (rows, -(-width // self.group))),
        }

    def n_weights(self, q_shape: tuple[int, ...]) -> int:
        """How many weights a `q` of this shape, or a row of it, has room for."""
        return math.prod(q_shape) * 8 // self.bits

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        pieces = self.pieces(shape).values()
        return sum(STORED_BYTES[dtype] * math.prod(own) for dtype, own in pieces)


INT8 = Scheme("int8", bits=8, group=128, q_dtype="int8", scale_dtype="bfloat16")
INT4 = Scheme("int4", bits=4, group=32, q_dtype="uint8", scale_dtype="uint8")
SCHEMES = {scheme.name: scheme for scheme in (INT8, INT4)}


def scheme_of_q(dtype: str) -> Scheme:
    """The scheme whose `q` is of this dtype: no two share one."""
    (found,) = (scheme for scheme in SCHEMES.values() if scheme.q_dtype == dtype)
    return found


@dataclass(frozen=True)
class Quantization:
    """What a model's matrices are kept in: `scheme`, but for those `at_int8`, the embedding and the
    head, which are int8. Vectors (norms, biases) stay as they are."""

    scheme: str
    at_int8: tuple[str, ...] = ()

    def scheme_of(self, tensor: str, shape: tuple[int, ...]) -> Scheme | None:
        """What a published tensor is kept in; None for as it is."""
        if len(shape) != 2:
            return None
        if layer_of(tensor) is None or tensor in self.at_int8:
            return INT8
        return SCHEMES[self.scheme]

    def block_bits(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Bits a weight, all included, on average over the matrices of the layers."""
        matrices = block_matrices(shapes)
        n_bytes = sum(self.scheme_of(name, own).n_bytes(own) for name, own in matrices.items())
        return 8 * n_bytes / sum(map(math.prod, matrices.values()))

    def as_dict(self) -> dict:
        """As the manifest has it; the figures are there for other readers, and checked by ours."""
        return {
            "scheme": self.scheme,
            "groups": {name: scheme.group for name, scheme in SCHEMES.items()},
            "at_int8": list(self.at_int8),
        }

    @classmethod
    def from_dict(cls, found: dict) -> Quantization:
        """Raises ValueError for what this program does not know."""
        made = cls(found["scheme"], tuple(found["at_int8"]))
        if made.scheme not in SCHEMES or found != made.as_dict():
            raise ValueError("not a quantisation that is known here")
        return made


def stored_tensors(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, tuple[int, ...]]:
    """The tensors on disk that published ones become, with their shapes: `X.weight` is
    `X.weight.q` and `X.weight.scale` where it is quantised."""
    found = {}
    for tensor, shape in shapes.items():
        scheme = quantization and quantization.scheme_of(tensor, shape)
        if scheme is None:
            found[tensor] = shape
        else:
            pieces = scheme.pieces(shape).items()
            found |= {piece_name(tensor, piece): own for piece, (_, own) in pieces}
    return found


def block_rows(n_rows: int, row_bytes: int, block_bytes: int) -> int:
    """How many rows of `row_bytes` are written out at a time: all, or a multiple of 8 (8 at least)
    within `block_bytes`, such that the blocks are the fewest and overlap least."""
    most = max(8, block_bytes // row_bytes // 8 * 8)
    if n_rows <= most:
        return n_rows
    n_blocks = -(-n_rows // most)
    return -(-n_rows // (8 * n_blocks)) * 8


def piece_dtypes(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, str]:
    """The dtypes of the pieces among `stored_tensors`."""
    found = {}
    for tensor, shape in shapes.items():
        scheme = quantization and quantization.scheme_of(tensor, shape)
        if scheme is not None:
            pieces = scheme.pieces(shape).items()
            found |= {piece_name(tensor, piece): dtype for piece, (dtype, _) in pieces}
    return found


def stored_bytes(form: str, shape: tuple[int, ...]) -> int:
    """Bytes of a published tensor that is stored in `form`: a dtype, or a scheme's name."""
    if form in SCHEMES:
        return SCHEMES[form].n_bytes(shape)
    return math.prod(shape) * STORED_BYTES[form]


def piece_name(name: str, piece: str) -> str:
    """The name of a piece of a quantised tensor, or leaf."""
    return f"{name}.{piece}"


def split_piece(name: str) -> tuple[str, str | None]:
    """The inverse: (the tensor's or leaf's own name, the piece or None)."""
    base, _, piece = name.rpartition(".")
    return (base, piece) if piece in ("q", "scale") else (name, None)


def block_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and layer_of(name) is not None
    }


def quantization_of(
    scheme: str, shapes: Mapping[str, tuple[int, ...]], errors: Mapping[str, float] | None = None
) -> Quantization:
    """What a model's tensors are to be kept in. `errors`: each block matrix's squared error at
    int4, as a part of its sum of squares; without them all count as equal.

    An error of a matrix's product disturbs what follows by its share, however large the matrix is;
    what its bytes buy is therefore its error for each weight. The matrices where that is STANDS_OUT
    times the typical one (the median over the weights) stay at int8, the dearest first, as long as
    the average stays within INT4_BITS.
    """
    if scheme != INT4.name:
        return Quantization(scheme)
    matrices = block_matrices(shapes)
    n_weights = {name: math.prod(shape) for name, shape in matrices.items()}
    gain = {name: (errors[name] if errors else 1.0) / n_weights[name] for name in matrices}
    order = sorted(matrices, key=lambda name: -gain[name])
    room = INT4_BITS * sum(n_weights.values()) / 8
    room -= sum(INT4.n_bytes(shape) for shape in matrices.values())
    typical, chosen = _median(gain, n_weights), []
    for name in order:
        more = INT8.n_bytes(matrices[name]) - INT4.n_bytes(matrices[name])
        if gain[name] >= STANDS_OUT * typical and more <= room:
            chosen.append(name)
            room -= more
    return Quantization(scheme, tuple(name for name in matrices if name in set(chosen)))


def _median(values, weights):
    """Half of all weight lies at or above it."""
    left = sum(weights.values()) / 2
    for name in sorted(values, key=lambda name: -values[name]):
        left -= weights[name]
        if left <= 0:
            return values[name]
    return 0.0
