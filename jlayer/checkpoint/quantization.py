"""The encoding of each matrix of a model: chosen by the converter, stored in the manifest, read by
the runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jlayer.checkpoint.encoded import NONE_ENCODED, EncodingTable
from jlayer.encodings.base import Encoding
from jlayer.encodings.int4 import INT4
from jlayer.encodings.int8 import INT8
from jlayer.encodings.published import FORMS
from jlayer.encodings.registry import ENCODINGS, SCHEMES, piece_name
from jlayer.families.fewer import Renumbering
from jlayer.families.left import is_left
from jlayer.families.registry import (
    is_latent_matrix,
    is_matrix,
    is_of_an_expert,
    layer_of,
    published_tensors,
)
from jlayer.spec import ModelConfig

# INT4_BITS: the most bits per weight of a model at int4, on average over the matrices of its
# layers, scales and matrices at int8 included. STANDS_OUT: a matrix may stay at int8 if its error
# per weight is so many times the median.
INT4_BITS = 4.5
STANDS_OUT = 4.0


@dataclass(frozen=True)
class Quantization:
    """The encodings of a model's matrices: `table`: those that they are published in, which they
    keep; of the others `scheme`, and int8 for those in `at_int8`, the embedding and the head. A
    scheme of None: they are plain numbers. Vectors (norms, biases) stay as published."""

    scheme: str | None
    at_int8: tuple[str, ...] = ()
    table: EncodingTable = NONE_ENCODED

    @classmethod
    def as_found(cls, table: EncodingTable) -> Quantization | None:
        """How the tensors of a published folder are encoded; None: they are plain numbers."""
        return cls(None, table=table) if table else None

    @property
    def as_published(self) -> Quantization | None:
        """What of it the published tensors have already; None: they are plain numbers."""
        return Quantization.as_found(self.table)

    @property
    def may_be_quantized(self) -> bool:
        """Whether what is published as plain numbers may be quantized: where others than experts
        are encoded, what is left is as its makers want it."""
        return all(".experts." in name for name, encoding in self.table.rows if encoding)

    def scheme_of(self, tensor: str, shape: tuple[int, ...]) -> Encoding | None:
        """The encoding of a published tensor; None: plain numbers, stored as published."""
        published = self.table.of_tensor(tensor)
        if published is not None:
            return ENCODINGS[published]
        if self.scheme is None or not is_matrix(tensor, shape):
            return None
        if layer_of(tensor) is None or tensor in self.at_int8:
            return INT8
        return SCHEMES[self.scheme]

    def with_fewer(self, cfg: ModelConfig, left: Renumbering) -> Quantization:
        """The same of a model without some layers. `cfg`: of the whole model."""
        names = left.names({name: name for name in published_tensors(cfg)})
        table = EncodingTable.of({new: self.table.of_tensor(old) for new, old in names.items()})
        at_int8 = left.names(dict.fromkeys(self.at_int8))
        return replace(self, at_int8=tuple(at_int8), table=table)

    def block_bits(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Bits per weight, scales included, on average over the matrices of the layers. There is a
        `scheme`."""
        matrices = block_matrices(shapes)
        n_bytes = sum(
            self.scheme_of(name, shape).n_bytes(shape) for name, shape in matrices.items()
        )
        return 8 * n_bytes / sum(map(math.prod, matrices.values()))

    def as_dict(self) -> dict:
        """The form in the manifest. `groups` is for other readers; `from_dict` checks it."""
        return {
            "scheme": self.scheme,
            "groups": {name: row.group for name, row in SCHEMES.items()},
            "at_int8": list(self.at_int8),
        } | ({"published": self.table.as_dict()} if self.table else {})

    @classmethod
    def from_dict(cls, raw: dict) -> Quantization:
        """The inverse of `as_dict`.

        Raises ValueError for an unknown scheme, encoding or group, KeyError, TypeError or
        AttributeError for another form.
        """
        table = EncodingTable.from_dict(raw.get("published", {}))
        quantization = cls(raw["scheme"], tuple(raw["at_int8"]), table)
        known = {None, *SCHEMES} if table else SCHEMES
        if quantization.scheme not in known or raw != quantization.as_dict():
            raise ValueError("not a known quantization")
        return quantization


def stored_pieces(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the stored tensors of published ones.

    A quantized `X.weight` is stored as `X.weight.q` and `X.weight.scale`. A dtype of None means: as
    published.
    """
    stored = {}
    for tensor, shape in shapes.items():
        scheme = quantization and quantization.scheme_of(tensor, shape)
        if scheme is None:
            stored[tensor] = (None, shape)
        else:
            for piece, entry in scheme.pieces(shape).items():
                stored[piece_name(tensor, piece)] = entry
    return stored


def stored_tensors(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of `stored_pieces`."""
    return {name: shape for name, (_, shape) in stored_pieces(shapes, quantization).items()}


def piece_dtypes(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> dict[str, str]:
    """Name -> dtype of the quantized tensors among `stored_pieces`."""
    stored = stored_pieces(shapes, quantization).items()
    return {name: dtype for name, (dtype, _) in stored if dtype is not None}


def block_matrices(
    shapes: Mapping[str, tuple[int, ...]], published: Quantization | None = None
) -> dict[str, tuple[int, ...]]:
    """The matrices of the layers among published tensors, without those that are `published`
    encoded."""
    return {
        name: shape
        for name, shape in shapes.items()
        if is_matrix(name, shape)
        and layer_of(name) is not None
        and not (published and published.table.of_tensor(name))
    }


def published_quantization(cfg: ModelConfig) -> Quantization | None:
    """How the published tensors of a model are encoded as far as its config tells; None: they are
    plain numbers. The headers of its files show it exactly."""
    said = cfg.quantized
    if said is None:
        return None
    form = FORMS[said.method]
    encodings = {
        name: said.encoding if _is_encoded(name, shape, said, form) else None
        for name, shape in published_tensors(cfg).items()
    }
    return Quantization.as_found(EncodingTable.of(encodings))


def _is_encoded(name, shape, said, form):
    """Whether a tensor is encoded, as far as a config tells: the matrices of the layers are."""
    if not (is_matrix(name, shape) or is_latent_matrix(name)) or layer_of(name) is None:
        return False
    if form.experts_alone:
        return is_of_an_expert(name)
    return not is_left(said, name.removesuffix(".weight"))


def quantization_of(
    scheme: str,
    shapes: Mapping[str, tuple[int, ...]],
    errors: Mapping[str, float] | None = None,
    *,
    published: Quantization | None = None,
) -> Quantization:
    """Chooses the encodings of a model's tensors. `published`: in which some are published; they
    are kept.

    `errors`: for each matrix of the layers, its squared error at int4 relative to its sum of
    squares; without `errors` all are equal.

    The relative error of a matrix disturbs the result equally whatever the size of the matrix, so
    the gain of int8 is the error per weight. The matrices whose gain is at least STANDS_OUT times
    the median (over weights) stay at int8, the worst first, while the average stays within
    INT4_BITS.
    """
    kept = published.table if published else NONE_ENCODED
    if scheme != INT4.name:
        return Quantization(scheme, table=kept)
    matrices = block_matrices(shapes, published)
    n_weights = {name: math.prod(shape) for name, shape in matrices.items()}
    gain = {name: (errors[name] if errors else 1.0) / n_weights[name] for name in matrices}
    order = sorted(matrices, key=lambda name: -gain[name])
    room = INT4_BITS * sum(n_weights.values()) / 8
    room -= sum(INT4.n_bytes(shape) for shape in matrices.values())
    median, chosen = _median(gain, n_weights), []
    for name in order:
        more = INT8.n_bytes(matrices[name]) - INT4.n_bytes(matrices[name])
        if gain[name] >= STANDS_OUT * median and more <= room:
            chosen.append(name)
            room -= more
    return Quantization(scheme, tuple(name for name in matrices if name in set(chosen)), kept)


def _median(values, weights):
    """The weighted median: half of all weight lies at or above it."""
    left = sum(weights.values()) / 2
    for name in sorted(values, key=lambda name: -values[name]):
        left -= weights[name]
        if left <= 0:
            return values[name]
    return 0.0
