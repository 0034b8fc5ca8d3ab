"""Matrices that bitsandbytes has quantized, as Transformers saves them: which tensors make one, and
what their statistics say.

Of 4 bits the codes of a matrix are one column of bytes, in whatever dtype, and the largest
magnitude of each block of them another: as blocks do not cross rows, both are rows as they lie. A
JSON text beside them says how they are to be read. Nothing but these statistics is read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jlayer.checkpoint.agree import first_few
from jlayer.checkpoint.encoded import form_of
from jlayer.checkpoint.nested import BLOCK, DTYPE, Nested
from jlayer.encodings.base import WHOLE
from jlayer.encodings.grouped import SCALE, Q
from jlayer.encodings.published import (
    NESTED_ABSMAX,
    NESTED_QUANT_MAP,
    QUANT_MAP,
    QUANT_STATE,
    WEIGHT_FORMAT,
)
from jlayer.encodings.registry import piece_name, split_piece
from jlayer.encodings.tables import BLOCK_SIZES, FOUR_BITS, Table
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import EMBEDDING
from jlayer.families.fields import Fields
from jlayer.families.registry import published_tensors
from jlayer.spec import STORED_BYTES, ModelConfig
from jlayer.strict import parse_json_object

# The bytes of a tensor, of a place and what the file says of it.
Read = Callable[[object, object], bytes]
_OF_STATE = ("quant_type", "blocksize", "dtype", "shape")
_OF_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
_DTYPES = ("float32", "bfloat16", "float16")  # that weights are rounded to once they are decoded
_STATE_BYTES = 4096  # more than any JSON text of a matrix has
_LEVELS_DIFFER = 1e-6  # of the largest level, 1: how they are rounded
_LARGEST = float(np.finfo(np.float32).max)


class _Part(NamedTuple):
    """A tensor of a matrix: the file that it is in, its name there, its place, and what the file
    says of it."""

    shard: str
    name: str
    place: object
    info: object

    def told(self) -> str:
        return f"{self.place.name} in {self.place.file.name}"


@dataclass(frozen=True)
class Statistics:
    """A folder's tensors as pieces, by file; of 4 bits also the encoding of each matrix, and of
    the scales that are nested what their codes stand for, by the name of the piece."""

    tables: Mapping[str, Mapping[str, tuple]]
    encodings: dict[str, str] = field(default_factory=dict)
    nested: dict[str, Nested] = field(default_factory=dict)


def with_statistics(
    cfg: ModelConfig, tables: Mapping[str, Mapping[str, tuple]], read: Read, *, where: str
) -> Statistics:
    """The tensors of a folder after `encoded.as_pieces`; those of another form as they are.

    Raises CheckpointError or UnsupportedModelError with the first matrices of which something is
    missing, or not as it should be.
    """
    form = form_of(cfg)
    of = _READ.get(form.method) if form else None
    return of(cfg, tables, read, where) if of else Statistics(tables)


def _with_eight_bits(cfg, tables, read, where):
    """The scale of each row is a column; the layout of codes is to be by rows, which is 0."""
    shapes, found = published_tensors(cfg), {}
    for shard, table in tables.items():
        found[shard] = {}
        for name, (place, info) in table.items():
            matrix, _, own = name.rpartition(".")
            if own == WEIGHT_FORMAT and matrix in shapes:
                is_byte = info.dtype == "uint8" and info.shape in ((), (1,))
                layout = bytes(read(place, info)) if is_byte else b""
                if layout != b"\0":
                    raise UnsupportedModelError(
                        f"{where}: {place.name} in {place.file.name} is {info.dtype} "
                        f"{list(layout) or list(info.shape)}, supported: uint8 [0] (by rows)"
                    )
                continue
            if own == SCALE and info.shape == shapes.get(matrix, ())[:1]:
                info = info.seen_as(info.dtype, (*info.shape, 1))
            found[shard][name] = (place, info)
    return Statistics(found)


def _with_four_bits(cfg, tables, read, where):
    parts = _parts(cfg, tables, where)
    shapes, problems = published_tensors(cfg), []
    found = Statistics({shard: dict(table) for shard, table in tables.items()})
    for matrix, own in parts.items():
        try:
            row, nested = _Matrix(cfg, matrix, shapes[matrix], own, read).encoding()
        except CheckpointError as error:  # and UnsupportedModelError
            problems.append(error)
            continue
        for part in own.values():
            del found.tables[part.shard][part.name]
        found.encodings[matrix] = row.name
        for piece, stored in ((Q, own[WHOLE]), (SCALE, own[SCALE])):
            name, (dtype, shape) = piece_name(matrix, piece), row.pieces(shapes[matrix])[piece]
            info = stored.info.seen_as(dtype, shape)
            found.tables[stored.shard][name] = (stored.place, info)
        if nested is not None:
            found.nested[piece_name(matrix, SCALE)] = nested
    if problems:
        raise type(problems[0])(f"{where}: {'; '.join(first_few(problems))}")
    return found


def _parts(cfg, tables, where):
    """Matrix -> what it is made of: WHOLE, SCALE, or the name of a statistic -> its tensor."""
    converted = next((n for t in tables.values() for n in t if split_piece(n)[1] == Q), None)
    if converted:
        raise UnsupportedModelError(
            f"{where}: tensor {converted} is of a converted folder, which lacks the statistics of "
            "the published one; convert the published folder again"
        )
    ends = {own for _, _, own in form_of(cfg).ends}
    shapes, parts, weights = published_tensors(cfg), {}, []
    for shard, table in tables.items():
        for name, (place, info) in table.items():
            if name in shapes:
                weights.append((name, WHOLE, _Part(shard, name, place, info)))
                continue
            for own in ends:
                matrix = name.removesuffix(f".{own}")
                if matrix != name and len(shapes.get(matrix, ())) == 2:
                    _add(parts, matrix, own, _Part(shard, name, place, info), where)
    for name, own, part in weights:
        if name in parts or _is_column(part.info, shapes[name]):
            _add(parts, name, own, part, where)
    return parts


def _add(parts, matrix, own, part, where):
    there = parts.setdefault(matrix, {}).setdefault(own, part)
    if there is not part:
        raise CheckpointError(
            f"{where}: tensor {part.place.name} is in {there.place.file.name} and in "
            f"{part.place.file.name}, expected in one file"
        )


def _is_column(info, shape):
    """Whether a tensor has the bytes of a matrix at 4 bits, one below the other."""
    is_column = len(shape) == len(info.shape) == 2 and info.shape[1] == 1 != shape[1]
    return is_column and _n_bytes(info) == -(-math.prod(shape) // 2)


def _n_bytes(info):
    return math.prod(info.shape) * STORED_BYTES.get(info.dtype, 0)


@dataclass(frozen=True)
class _Matrix:
    """A matrix of 4 bits, by its published name and shape, and what it is made of."""

    cfg: ModelConfig
    name: str
    shape: tuple[int, int]
    parts: Mapping[str, _Part]
    read: Read

    def part(self, own: str) -> _Part:
        """One of its tensors. Raises CheckpointError where it is missing."""
        if own not in self.parts:
            raise CheckpointError(f"missing: {form_of(self.cfg).name_of(self.name, own)}")
        return self.parts[own]

    def encoding(self) -> tuple[Table, Nested | None]:
        """Its encoding, and what its scales stand for where they are nested."""
        states = sorted(own for own in self.parts if own.startswith(QUANT_STATE))
        if len(states) > 1:
            raise CheckpointError(f"{self.name} has {' and '.join(states)}, expected one of them")
        state = self.part(states[0] if states else f"{QUANT_STATE}{self.cfg.quantized.encoding}")
        said = _read_state(state, self.read)
        kind = state.name.removeprefix(f"{self.name}.{QUANT_STATE}")
        row = _encoding(self.name, self.shape, said, kind)
        n_weights, is_nested = math.prod(self.shape), _is_nested(self.parts, said)
        weight = self.part(WHOLE)
        if _n_bytes(weight.info) != n_weights // 2:
            raise CheckpointError(
                f"{weight.told()} is {weight.info.dtype} {list(weight.info.shape)}, expected "
                f"{n_weights // 2} bytes of {list(self.shape)}"
            )
        _check(self.part(SCALE), "uint8" if is_nested else DTYPE, n_weights // row.group)
        self._check_levels(row, kind)
        return row, self._nested(said, n_weights // row.group) if is_nested else None

    def _check_levels(self, row, kind):
        part = self.part(QUANT_MAP)
        levels = _numbers(part, len(row.levels), self.read)
        if not np.allclose(levels, np.array(row.levels, np.float32), rtol=0, atol=_LEVELS_DIFFER):
            raise UnsupportedModelError(
                f"{part.told()} has other levels than {kind}, supported: {row.levels[1]:.6g} as "
                f"the second, {row.levels[2]:.6g} as the third, and so on"
            )

    def _nested(self, said, n_scales):
        """What the codes of the scales stand for."""
        if self.name == EMBEDDING.published:
            raise UnsupportedModelError(
                f"{self.parts[SCALE].told()} has nested statistics, which is not supported of an "
                "embedding"
            )
        for key, supported in (("nested_blocksize", BLOCK), ("nested_dtype", DTYPE)):
            if said.raw.get(key) != supported:
                raise UnsupportedModelError(
                    f"{said.where}: {key} is {said.raw.get(key)!a:.80}, supported: {supported!r}"
                )
        offset = said.raw.get("nested_offset")
        if type(offset) not in (int, float) or not abs(offset) <= _LARGEST:
            found = f"{said.where}: nested_offset is {offset!a:.80}"
            raise CheckpointError(f"{found}, expected a number of float32")
        scales = _numbers(self.part(NESTED_ABSMAX), -(-n_scales // BLOCK), self.read)
        levels = _numbers(self.part(NESTED_QUANT_MAP), 256, self.read)
        return Nested(levels, scales, np.float32(offset))


def _is_nested(parts, said):
    """Whether the scales are codes: by one of what only these have."""
    return NESTED_ABSMAX in parts or said.has("nested_offset")


def _read_state(part, read) -> Fields:
    """The JSON text of a matrix, with the keys that it should have."""
    n_bytes = _n_bytes(part.info)
    if part.info.dtype != "uint8" or len(part.info.shape) != 1 or n_bytes > _STATE_BYTES:
        raise CheckpointError(
            f"{part.told()} is {part.info.dtype} {list(part.info.shape)}, expected uint8 of up to "
            f"{_STATE_BYTES} bytes"
        )
    raw = parse_json_object(read(part.place, part.info), what=part.told())
    unknown = sorted(raw.keys() - {*_OF_STATE, *_OF_NESTED})
    if unknown:
        raise UnsupportedModelError(
            f"{part.told()}: {unknown[0]!a:.80} is not known, supported: "
            f"{', '.join((*_OF_STATE, *_OF_NESTED))}"
        )
    return Fields(raw, part.told())


def _encoding(matrix, shape, said, named) -> Table:
    """The encoding that a text says a matrix of this shape has. `named`: its kind by its name."""
    kind, size = said.raw.get("quant_type"), said.integer("blocksize")
    if kind != named:
        raise CheckpointError(f"{said.where}: quant_type is {kind!a:.80}, expected {named!r}")
    if size not in BLOCK_SIZES:
        raise UnsupportedModelError(
            f"{said.where}: blocksize is {size}, supported: "
            f"{', '.join(map(str, sorted(BLOCK_SIZES)))}"
        )
    if said.raw.get("shape") != list(shape):
        raise CheckpointError(
            f"{said.where}: shape is {said.raw.get('shape')!a:.80}, by config.json {list(shape)}"
        )
    said.choice("dtype", dict.fromkeys(_DTYPES, ""), default="missing")
    if shape[1] % size:
        raise UnsupportedModelError(
            f"{matrix} has rows of {shape[1]} inputs, supported: whole blocks of {size}; take the "
            "model's unquantized checkpoint"
        )
    return FOUR_BITS[named, size]


def _check(part, dtype, count):
    if part.info.dtype != dtype or math.prod(part.info.shape) != count:
        raise CheckpointError(
            f"{part.told()} is {part.info.dtype} {list(part.info.shape)}, expected {dtype} "
            f"[{count}] by its quant_state"
        )


def _numbers(part, count, read):
    """A statistic of so many float32, all of which are finite."""
    _check(part, DTYPE, count)
    found = np.frombuffer(read(part.place, part.info), "<f4")
    if not np.isfinite(found).all():
        raise CheckpointError(
            f"{part.told()}: NaN or infinite numbers: {np.count_nonzero(~np.isfinite(found))}, "
            "expected 0; fetch the model again"
        )
    return found


_READ = {"bitsandbytes": _with_four_bits, "bitsandbytes_8bit": _with_eight_bits}
