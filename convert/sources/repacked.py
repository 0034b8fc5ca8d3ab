"""Published matrices that are repacked when they are read: into codes, scales and zeros by rows.

Some rows at a time. Where inputs come first in a file (GPTQ, AWQ) a strip of its columns is read
and turned, within TURNED_BYTES. No weight is computed: codes, scales and zeros are moved alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from jlayer.checkpoint.agree import first_few
from jlayer.checkpoint.encoded import form_of
from jlayer.convert.sources import words
from jlayer.convert.sources.files import (
    CHUNK_BYTES,
    FileSource,
    Place,
    Room,
    Strided,
    TensorInfo,
    row_bytes,
)
from jlayer.encodings.base import WHOLE
from jlayer.encodings.grouped import SCALE, WHOLE_ROW, Q
from jlayer.encodings.linear import GROUPS, LINEAR, ORDER, ZERO, Linear, linear
from jlayer.encodings.registry import ENCODINGS, piece_name, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.registry import published_tensors
from jlayer.spec import ITEM_BYTES, STORED_BYTES, ModelConfig

_GPTQ = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class Matrix:
    """A matrix that is repacked: the published form, its encoding afterwards, its shape, and what
    it is made of, by piece. `bits`: of its published codes."""

    method: str
    encoding: Linear
    shape: tuple[int, int]
    sources: Mapping[str, tuple[Place, TensorInfo]]
    bits: int

    @property
    def middle(self) -> int:
        """The zero of published codes that have no other."""
        return 1 << self.bits - 1

    def sources_of(self, piece: str) -> list[Place]:
        """What a piece is made of; of symmetric GPTQ the zeros are compared, and left out."""
        needed = {
            Q: (Q, ORDER) if self.method != "eetq" else (Q,),
            SCALE: (SCALE,) if self.encoding.zero_dtype else (SCALE, ZERO),
        }.get(piece, (piece,))
        return [self.sources[name][0] for name in needed if name in self.sources]


def to_repack(
    cfg: ModelConfig, tables: Mapping[str, Mapping[str, tuple]], problems: list[str]
) -> tuple[dict[str, dict[str, tuple]], dict[str, Matrix]]:
    """(the tables with the pieces that matrices are repacked into, the matrices by their names).

    `tables`: by file, name of a published piece, or tensor -> a place and its TensorInfo. What is
    wrong is added to `problems`.
    """
    shapes, found = published_tensors(cfg), {}
    tables = {shard: dict(table) for shard, table in tables.items()}
    done = {matrix for table in tables.values() for matrix in _repacked_already(table)}
    for table in tables.values():
        for name in list(table):
            matrix, piece = split_piece(name)
            is_piece = piece != WHOLE and name not in shapes and matrix not in done
            if is_piece and len(shapes.get(matrix, ())) == 2:
                parts, entry = found.setdefault(matrix, {}), table.pop(name)
                if piece in parts:
                    problems.append(f"{entry[0].name} is in two files, expected one")
                parts[piece] = entry
    matrices, wrong = {}, []
    for name, parts in found.items():
        matrix = _matrix(cfg, shapes[name], parts)
        wrong += _wrong(cfg, name, matrix)
        matrices[name] = matrix
        for piece, (dtype, shape) in matrix.encoding.pieces(matrix.shape).items():
            if piece in parts:
                place = parts[piece][0]
                entry = (place, TensorInfo(dtype, shape))
                tables[place.file.name][piece_name(name, piece)] = entry
    problems += first_few(wrong)
    return tables, matrices


def _repacked_already(table):
    """The matrices whose codes have our own name in the file: it is of a converted folder."""
    for name, (place, _) in table.items():
        matrix, piece = split_piece(name)
        if piece == Q and split_piece(place.name)[1] == Q:
            yield matrix


def _matrix(cfg, shape, parts):
    said, method = ENCODINGS[cfg.quantized.encoding], cfg.quantized.method
    dtype = parts[SCALE][1].dtype if SCALE in parts else said.scale_dtype
    dtype = dtype if dtype in ITEM_BYTES else said.scale_dtype
    if method == "eetq":
        row = LINEAR[f"int8_row_{dtype}"]
    elif method == "hqq":
        bits, group = _of_hqq(shape, parts, said)
        row = linear(bits, group, dtype, zero_dtype=dtype)
    else:
        zeros = said.zero_dtype
        row = linear(said.bits, said.group, dtype, zero_dtype=zeros, is_ordered=said.is_ordered)
    return Matrix(method, row, shape, parts, cfg.quantized.bits or row.bits)


def _of_hqq(shape, parts, said):
    """(bits, group) of a matrix by the shape of its codes, else as the config says."""
    codes = parts[Q][1].shape if Q in parts else ()
    if len(codes) != 2 or not codes[1] or shape[1] % codes[1]:
        return said.bits, said.group
    n_groups = shape[0] * shape[1] // codes[1]
    group = codes[1] if codes[1] in GROUPS.values() else WHOLE_ROW
    return 4 if 2 * codes[0] == n_groups else 8, group


def _wanted(matrix):
    """Piece -> (dtypes, shape) as published; the words of a row, or of a column, are whole."""
    (out, width), row = matrix.shape, matrix.encoding
    groups, numbers, size = row.n_groups(width), tuple(ITEM_BYTES), row.group or width
    per = Fraction(32, matrix.bits)  # codes of a word
    if matrix.method == "awq":
        return {
            Q: (("int32",), (width, -(-out // per))),
            SCALE: (numbers, (groups, out)),
            ZERO: (("int32",), (groups, -(-out // per))),
        }
    if matrix.method == "awq_gemv":
        n_words = _gemv_words(groups, size)
        return {
            Q: (("int32",), (out, -(-width // per))),
            SCALE: (numbers, (out, 8 * n_words)),
            ZERO: (("int32",), (out, n_words)),
        }
    if matrix.method == "hqq":
        n_rows = out * groups
        return {
            Q: (("uint8",), (n_rows * row.bits // 8, size)),
            SCALE: (numbers, (n_rows, 1)),
            ZERO: ((row.scale_dtype,), (n_rows, 1)),
        }
    if matrix.method == "eetq":
        return {Q: (("int8",), (width, out)), SCALE: (numbers, (out,))}
    if matrix.method in _GPTQ:
        return {
            Q: (("int32",), (-(-width // per), out)),
            SCALE: (numbers, (groups, out)),
            ZERO: (("int32",), (groups, -(-out // per))),
            ORDER: (("int32",), (width,)),
        }
    return {
        Q: (("int32",), (out, -(-width // per))),
        SCALE: (numbers, (out, groups)),
        ZERO: (("int32",), (-(-out // per), groups)),
        ORDER: (("int32",), (width,)),
    }


def _gemv_words(n_groups, size):
    """The words of zeros in a row of AWQ's gemv, of eight groups each, padded for its kernel
    (AutoAWQ's `calculate_zeros_width`)."""
    n_words, unit = -(-n_groups // 8), max(1, 128 // size)
    return -(-n_words // unit) * unit


def _wrong(cfg, name, matrix):
    """What is wrong with the pieces of a matrix, as its file has them."""
    wanted, form = _wanted(matrix), form_of(cfg)
    for piece, (place, info) in matrix.sources.items():
        if piece not in wanted:
            yield f"{place.name} in {place.file.name} is no part of a matrix of {matrix.method}"
            continue
        dtypes, shape = wanted[piece]
        if info.dtype not in dtypes or info.shape != shape:
            yield (
                f"{place.name} in {place.file.name} is {info.dtype} {list(info.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)} (quantization_config)"
            )
    row, has_zeros = matrix.encoding, ZERO in matrix.sources
    if matrix.method in _GPTQ and row.zero_dtype is None and not has_zeros:
        yield f"missing: {form.name_of(name, ZERO)}"  # of others it is missed as a piece
    is_packed = matrix.method == "pack-quantized"
    if is_packed and not row.is_ordered and ORDER in matrix.sources:
        yield f"{matrix.sources[ORDER][0].name} is there, but actorder is not group"
    if is_packed and row.zero_dtype is None and has_zeros:
        yield f"{matrix.sources[ZERO][0].name} is there, but symmetric is true"
    (out, width), group = matrix.shape, matrix.encoding.group
    divides = {
        "awq": (out, 8, "outputs in words"),
        "eetq": (out, 2, "outputs in pairs"),
        "awq_gemv": (width, 8, "inputs in words"),
        "gptq": (width, 32 if 32 % matrix.bits else 32 // matrix.bits, "inputs in words"),
        "hqq": (
            out * matrix.encoding.n_groups(width),
            8 // matrix.encoding.bits,
            "groups in pairs",
        ),
    }
    divides["gptq_v2"] = divides["gptq"]
    checks = [divides[matrix.method]] if matrix.method in divides else []
    if matrix.method in _GPTQ and 32 % matrix.bits:
        checks.append((out, 32, "outputs in words"))
    checks.append((width, matrix.encoding.parts, "inputs in bytes"))
    if matrix.method == "eetq":
        checks.append((width, 64, "inputs in runs"))
    elif matrix.method not in _GPTQ:
        checks.append((width, group or 1, "inputs in groups"))
    for number, by, what in checks:
        if number % by:
            yield f"{name} has {number} {what} of {by}, expected a multiple"


class RepackedSource(FileSource):
    """Published tensors of which some matrices are repacked. Raises CheckpointError where inputs
    or zeros are not what the config says."""

    def __init__(self, tensors, places, matrices: dict[str, Matrix]) -> None:
        super().__init__(tensors, places)
        self._matrices = matrices

    def places_of(self, name: str) -> tuple[Place, ...]:
        matrix, piece = split_piece(name)
        if matrix not in self._matrices:
            return super().places_of(name)
        return tuple(self._matrices[matrix].sources_of(piece))

    def chunks(self, name: str, room: Room | None = None) -> Iterator[memoryview]:
        matrix, piece = split_piece(name)
        if matrix not in self._matrices:
            yield from super().chunks(name, room)
            return
        of = self._matrices[matrix]
        read = {Q: self._codes, SCALE: self._scales, ZERO: self._zeros, ORDER: self._order}[piece]
        for rows in read(of):
            yield memoryview(np.ascontiguousarray(rows)).cast("B")

    def _codes(self, of):
        """Rows of codes, bytes."""
        order = None
        if ORDER in of.sources:
            (order,) = self._order(of)
            order = order if of.encoding.is_ordered else None
        for rows in _CODES[of.method](self, of):
            yield rows if order is None else words.in_order(rows, order, of.encoding.bits)

    def _gptq_codes(self, of):
        turned = _turned(of.sources[Q])
        if of.bits == of.encoding.bits:
            yield from self._in_bytes(*turned, of)
            return
        # Codes without zeros of their own are moved as far as the middle is.
        more = 0 if of.encoding.zero_dtype else of.encoding.zero - of.middle
        for rows in self._strips(*turned, unit_bytes=8 * of.shape[1]):
            yield words.pairs(words.of_stream(rows, of.bits) + np.uint8(more))

    def _rows_of_words(self, of):
        return self._in_bytes(*of.sources[Q], of)

    def _in_bytes(self, place, info, of):
        """Words of a row one after another, as bytes; the last one may be of fewer inputs."""
        n_bytes = of.shape[1] * of.encoding.bits // 8
        for rows in self._strips(place, info):
            yield rows.view(np.uint8)[:, :n_bytes]

    def _awq_codes(self, of):
        for rows in self._strips(*_turned(of.sources[Q]), unit_bytes=8 * of.shape[1]):
            yield words.pairs(words.apart(rows, 4, words.AWQ_PLACES))

    def _hqq_codes(self, of):
        """Groups one after another; of 4 bits those of the first half of the matrix are the high
        half bytes, and those of the second half the low ones of the same bytes."""
        (out, width), (place, info) = of.shape, of.sources[Q]
        if of.encoding.bits == 8:
            yield from self._strips(place, info)
            return
        groups, half = of.encoding.n_groups(width), info.shape[0]
        step = max(1, CHUNK_BYTES // width)
        for first in range(0, out, step):
            begin, end = first * groups, min(out, first + step) * groups
            parts = []
            if begin < half:
                parts.append(self._rows(place, info, begin, min(end, half) - begin) >> 4)
            if end > half:
                start = max(begin, half)
                parts.append(self._rows(place, info, start - half, end - start) & 15)
            yield words.pairs(np.concatenate(parts).reshape(-1, width))

    def _eetq_codes(self, of):
        (out, width), (place, info) = of.shape, of.sources[Q]
        by_pairs = TensorInfo(info.dtype, (out // 2, 2 * width))
        for rows in self._strips(place, by_pairs):
            yield words.eetq_rows(rows.reshape(-1, width))

    def _scales(self, of):
        if of.method in _GPTQ and of.encoding.zero_dtype is None:
            self._check_zeros(of)
        is_turned = of.method in (*_GPTQ, "awq")
        place, info = _turned(of.sources[SCALE]) if is_turned else of.sources[SCALE]
        for rows in self._strips(place, info):
            yield rows[:, : of.encoding.n_groups(of.shape[1])] if of.method == "awq_gemv" else rows

    def _zeros(self, of):
        """Rows of zeros: bytes, or numbers as they are."""
        place, info = of.sources[ZERO]
        if of.method == "hqq":
            yield from self._strips(place, info)
            return
        if of.method == "awq_gemv":
            for rows in self._strips(place, info):
                yield words.of_stream(rows, of.bits)[:, : of.encoding.n_groups(of.shape[1])]
            return
        if of.method != "pack-quantized":
            place, info = _turned((place, info))
        left, bits = of.shape[0], of.bits
        for rows in self._strips(place, info, n_together=1 if 32 % bits == 0 else bits):
            is_less = of.method == "gptq"
            if is_less and 32 % bits == 0:
                rows, is_less = words.one_more(rows, bits), False
            zeros = words.apart(rows, bits, words.AWQ_PLACES if of.method == "awq" else None)
            if is_less:  # of codes that words share, each by itself, as GPTQModel does it
                zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
            yield zeros[:left]
            left -= len(zeros)

    def _check_zeros(self, of):
        """Raises CheckpointError where symmetric GPTQ has a zero that is not in the middle."""
        place, _ = of.sources[ZERO]
        for zeros in self._zeros(of):
            others = zeros[zeros != of.middle]
            if others.size:
                raise CheckpointError(
                    f"{place.file.path}: tensor {place.name} has a zero of {others[0]}, expected "
                    f"{of.middle} of all, since sym is true; is checkpoint_format "
                    f"{of.method}? else set sym to false in config.json"
                )

    def _order(self, of):
        """The place that each input had before they were sorted by group, int32 [in]."""
        place, info = of.sources[ORDER]
        groups = self._rows(place, info, 0, info.shape[0]).view(np.int32)
        width = of.shape[1]
        group, n_groups = of.encoding.group or width, of.encoding.n_groups(width)
        where = f"{place.file.path}: tensor {place.name}"
        if groups.min() < 0 or groups.max() >= n_groups:
            wrong = groups[(groups < 0) | (groups >= n_groups)][0]
            raise CheckpointError(
                f"{where} has the group {wrong}, expected one below {n_groups}; fetch the model "
                "again"
            )
        order = np.argsort(groups, kind="stable").astype(np.int32)
        if not np.array_equal(groups[order], np.arange(width) // group):
            raise CheckpointError(
                f"{where} does not have {group} inputs in every group, expected so; fetch the "
                "model again"
            )
        if not of.encoding.is_ordered and not np.array_equal(order, np.arange(width)):
            raise CheckpointError(
                f"{where} is not sorted, expected so, since desc_act is false; set it to true in "
                "config.json"
            )
        yield order

    def _strips(self, place, info, *, unit_bytes=0, n_together=1):
        """All rows of a tensor, unsigned, a multiple of `n_together` at a time; a row becomes
        `unit_bytes`, or is as large as it is."""
        step = max(1, CHUNK_BYTES // max(unit_bytes, row_bytes(info)))
        step = -(-step // n_together) * n_together
        for first in range(0, info.shape[0], step):
            yield self._rows(place, info, first, min(step, info.shape[0] - first))

    def _rows(self, place, info, first, count):
        rows = np.empty((count, *info.shape[1:]), f"u{STORED_BYTES[info.dtype]}")
        self.read_place(place, first * row_bytes(info), memoryview(rows).cast("B"), info)
        return rows


def _turned(entry):
    """A matrix with its columns as rows."""
    place, info = entry
    n_rows, n_columns = info.shape
    turned = Strided((n_columns, n_rows), (1, n_columns))
    return replace(place, strided=turned), TensorInfo(info.dtype, turned.shape)


_CODES = {
    "gptq": RepackedSource._gptq_codes,
    "gptq_v2": RepackedSource._gptq_codes,
    "awq": RepackedSource._awq_codes,
    "hqq": RepackedSource._hqq_codes,
    "eetq": RepackedSource._eetq_codes,
    "pack-quantized": RepackedSource._rows_of_words,
    "awq_gemv": RepackedSource._rows_of_words,
}
