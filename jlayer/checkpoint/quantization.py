"""Which matrix of a model is kept in which encoding: chosen by the converter, written in the
manifest, read by the runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jlayer.encodings.grouped import Grouped
from jlayer.encodings.int4 import INT4
from jlayer.encodings.int8 import INT8
from jlayer.encodings.registry import SCHEMES, encoding, piece_name
from jlayer.families.registry import layer_of

# The average over the matrices of a model's layers that int4 stays within, all included, and how
# far above the typical one a matrix stands out.
INT4_BITS = 4.5
STANDS_OUT = 4.0


@dataclass(frozen=True)
class Quantization:
    """What a model's matrices are kept in: `scheme`, but for those `at_int8`, the embedding and the
    head, which are int8. Vectors (norms, biases) stay as they are."""

    scheme: str
    at_int8: tuple[str, ...] = ()

    def scheme_of(self, tensor: str, shape: tuple[int, ...]) -> Grouped | None:
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


def stored_pieces(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """The tensors on disk that published ones become, with dtype and shape: `X.weight` is
    `X.weight.q` and `X.weight.scale` where it is quantised. The dtype of what is not is None: it
    stays as published."""
    found = {}
    for tensor, shape in shapes.items():
        scheme = quantization and quantization.scheme_of(tensor, shape)
        if scheme is None:
            found[tensor] = (None, shape)
        else:
            pieces = scheme.pieces(shape).items()
            found |= {piece_name(tensor, piece): stored for piece, stored in pieces}
    return found


def stored_tensors(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of `stored_pieces`."""
    return {name: shape for name, (_, shape) in stored_pieces(shapes, quantization).items()}


def piece_dtypes(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, str]:
    """The dtypes of the pieces among `stored_pieces`."""
    found = stored_pieces(shapes, quantization).items()
    return {name: dtype for name, (dtype, _) in found if dtype is not None}


def stored_bytes(form: str, shape: tuple[int, ...]) -> int:
    """Bytes of a published tensor that is stored in the encoding of this name."""
    return encoding(form).n_bytes(shape)


def block_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The matrices of the layers among published tensors."""
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
    times the typical one (the median over the weights) stay at int8, the worst first, as long as
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
