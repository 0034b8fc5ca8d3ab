"""Which encoding each published tensor has: the table, and how it is found in the headers of files.

A folder that is quantized is a mix: some matrices are encoded, in one way or several, and the rest
are plain numbers. The headers show it exactly; a config alone gives what is usual of its method.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from jlayer.encodings.base import WHOLE
from jlayer.encodings.linear import LINEAR
from jlayer.encodings.published import FORMS, Form
from jlayer.encodings.registry import ENCODINGS, piece_name, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.registry import Stacked, published_tensors, stacked_tensors
from jlayer.spec import ModelConfig

WORD_BYTES = 4  # of int32
_OWN_END = 3  # parts of a name that tell q_proj.weight.scale (ours) from q_proj.scale (of hqq)
_NUMBERS = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_OF_EXPERT = re.compile(r"(?<=\.experts\.)[0-9]+(?=\.)")


@dataclass(frozen=True)
class EncodingTable:
    """Tensor -> the name of its encoding; None: plain numbers.

    `rows`: (name, encoding), sorted. In a name "*" stands for every number, or for that of every
    expert of one layer: a model may have 100,000 tensors. The row with fewer stars counts.
    """

    rows: tuple[tuple[str, str | None], ...] = ()

    @classmethod
    def of(cls, encodings: Mapping[str, str | None]) -> EncodingTable:
        """The shortest table that says this of every tensor of a model."""
        alike: dict[str, Counter] = {}
        of_experts: dict[str, set] = {}
        for name, encoding in encodings.items():
            alike.setdefault(_NUMBERS.sub("*", name), Counter())[encoding] += 1
            of_experts.setdefault(_OF_EXPERT.sub("*", name), set()).add(encoding)
        usual = {name: count.most_common(1)[0][0] for name, count in alike.items()}
        rows = {name: encoding for name, encoding in usual.items() if encoding is not None}
        for name, encoding in encodings.items():
            if encoding != usual[_NUMBERS.sub("*", name)]:
                group = _OF_EXPERT.sub("*", name)
                rows[name if len(of_experts[group]) > 1 else group] = encoding
        return cls(tuple(sorted(rows.items())))

    def __bool__(self) -> bool:
        return bool(self.rows)

    @cached_property
    def encodings(self) -> tuple[str, ...]:
        """The names of all encodings in it."""
        return tuple(sorted({encoding for _, encoding in self.rows if encoding is not None}))

    @cached_property
    def _rows(self) -> dict[str, str | None]:
        return dict(self.rows)

    @cached_property
    def _found(self) -> dict[str, str | None]:
        return {}

    def of_tensor(self, name: str) -> str | None:
        """The encoding of a published tensor; None: plain numbers."""
        if not self.rows:
            return None
        if name not in self._found:
            names = (name, _OF_EXPERT.sub("*", name), _NUMBERS.sub("*", name))
            row = next((name for name in names if name in self._rows), None)
            self._found[name] = None if row is None else self._rows[row]
        return self._found[name]

    def as_dict(self) -> dict[str, str | None]:
        """The form in the manifest."""
        return self._rows

    @classmethod
    def from_dict(cls, raw: dict) -> EncodingTable:
        """The inverse of `as_dict`. Raises ValueError for an unknown encoding."""
        for encoding in raw.values():
            if encoding is not None and encoding not in ENCODINGS:
                raise ValueError(f"encoding {encoding!a}")
        return cls(tuple(sorted(raw.items())))


NONE_ENCODED = EncodingTable()


def form_of(cfg: ModelConfig) -> Form | None:
    """The published form of encoded tensors that a config names."""
    return FORMS[cfg.quantized.method] if cfg.quantized else None


def is_repacked(cfg: ModelConfig) -> bool:
    """Whether weights of the form that the config names run only after they are converted."""
    form = form_of(cfg)
    return form is not None and form.is_repacked


def as_pieces(cfg: ModelConfig, table: Mapping[str, tuple], *, where: str) -> Mapping[str, tuple]:
    """A file's tensors as pieces: those that are main pieces by their dtype named so, and a single
    scale with the axes of the usual encoding, or with one, whatever it is stored with.

    `table`: name -> a place and what the file says: a TensorEntry, or a TensorInfo. Raises
    CheckpointError where a main piece is there under both names.
    """
    form = form_of(cfg)
    if form is None:
        return table
    main = ENCODINGS[form.encodings[0]].main
    shapes, stacks = published_tensors(cfg), stacked_tensors(cfg)

    def read(name, place, info):
        if name in shapes or name in stacks:
            is_main = info.dtype in form.main_dtypes and len(info.shape) >= 2
            return piece_name(name, main) if is_main else name, (place, info)
        matrix, piece = split_piece(name)
        if piece == main and info.dtype == form.words_dtype and info.shape:
            *axes, n_words = info.shape
            return name, (place, info.seen_as("uint8", (*axes, WORD_BYTES * n_words)))
        if piece not in (WHOLE, main) and matrix in stacks:
            axes = _axes_of_few(cfg, stacks[matrix], piece, info.shape)
            return name, (place, info.seen_as(info.dtype, axes))
        if piece not in (WHOLE, main) and math.prod(info.shape) == 1:
            axes = _axes_of_one(cfg, shapes.get(matrix, ()), piece)
            return name, (place, info.seen_as(info.dtype, axes))
        return name, (place, info)

    found = {}
    for name, (place, info) in table.items():
        piece, entry = read(name, place, info)
        if piece in found:
            raise CheckpointError(
                f"{where}: tensor {piece} is there twice, once as {name}; which is meant cannot be "
                "known"
            )
        found[piece] = entry
    return found


def misnamed(cfg: ModelConfig, tables: Iterable[Mapping[str, tuple]]) -> list[str]:
    """What is wrong with the names of pieces in files: those that are ours beside others of their
    matrix as they are published. Where all are ours (of a converted folder), nothing is.

    `tables`: by file, as `as_pieces` gives them.
    """
    form, shapes = form_of(cfg), published_tensors(cfg)
    if form is None:
        return []
    main = ENCODINGS[form.encodings[0]].main
    published, own = set(), {}
    for table in tables:
        for name, (place, _) in table.items():
            matrix, piece = split_piece(name)
            if piece == WHOLE or name in shapes or form.name_of(matrix, piece) == name:
                continue
            if place.name.split(".")[-_OWN_END:] == name.split(".")[-_OWN_END:]:
                own.setdefault(matrix, {})[piece] = place.name
            else:
                published.add(matrix)
    return [
        f"{name} is no tensor of {form.method}, expected {form.name_of(matrix, piece)}"
        for matrix, pieces in own.items()
        if matrix in published or main not in pieces
        for piece, name in pieces.items()
    ]


def _axes_of_one(cfg, shape, piece):
    """The axes of a piece that is a single number: of a grid with one square, or of one row, there
    are two."""
    usual = ENCODINGS[cfg.quantized.encoding].pieces(shape) if len(shape) == 2 else {}
    _, axes = usual.get(piece, ("", (1,)))
    return axes if math.prod(axes) == 1 else (1,)


def _axes_of_few(cfg, stack, piece, shape):
    """The axes of a piece of all experts: [experts, n] where there are n numbers for each, one, or
    one for each of its matrices; else as they are."""
    usual = ENCODINGS[cfg.quantized.encoding]
    n_experts, *_ = stack.shape
    is_few = piece in usual.pieces(stack.of_expert) and usual.rows_per(piece) == 0
    if is_few and shape[:1] == (n_experts,) and math.prod(shape[1:]) in (1, stack.n_parts):
        return (n_experts, math.prod(shape[1:]))
    return shape


def found_encodings(cfg: ModelConfig, tables: Iterable[Mapping[str, tuple]]) -> dict[str, str]:
    """The encodings of all tensors of which the files hold pieces, and of those that hold all
    experts, by their published names.

    `tables`: by file, name of a piece -> a place and what the file says, with `dtype` and `shape`.
    An encoding is known by the dtypes and shapes of its pieces; where none fits, by the dtypes:
    what is wrong is told when all tensors are checked.
    """
    form, found = form_of(cfg), {}
    shapes, stacks = published_tensors(cfg), stacked_tensors(cfg)
    for table in tables:
        for name, (_, info) in table.items():
            matrix, piece = split_piece(name)
            shape = stacks[matrix].of_expert if matrix in stacks else shapes.get(matrix, ())
            if piece != WHOLE and name not in shapes and len(shape) == 2:
                axes = tuple(info.shape)
                if matrix in stacks and len(axes) == 2:  # one number for each matrix, or expert
                    axes = (*axes[:1], 1)
                found.setdefault(matrix, {}).setdefault(piece, (info.dtype, axes))
    names = form.encodings if form else ()

    def chosen(matrix, pieces):
        def differences(name):
            wanted = pieces_of(name, form, shapes.get(matrix), stacks.get(matrix))
            misfits = [piece for piece, own in pieces.items() if wanted.get(piece) != own]
            dtypes = {piece: dtype for piece, (dtype, _) in wanted.items()}
            others = [piece for piece, (dtype, _) in pieces.items() if dtypes.get(piece) != dtype]
            # A group of as many inputs as a row has is the whole row: as the config says it.
            is_other = ENCODINGS[name].group != ENCODINGS[cfg.quantized.encoding].group
            return len(others), len(misfits), len(wanted.keys() - pieces.keys()), is_other

        return min(names, key=differences)

    return {matrix: chosen(matrix, pieces) for matrix, pieces in found.items() if names}


def pieces_of(
    name: str, form: Form | None, shape: tuple[int, ...] | None, stack: Stacked | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Piece -> (dtype, shape) as published, of a matrix in the encoding `name`, or of a tensor that
    holds those of all experts: rows first, whatever the order of plain numbers."""
    lead = ()
    if stack is not None:
        lead, shape = stack.shape[:1], stack.of_expert
    return {
        piece: (dtype, form.axes_of(piece, (*lead, *axes)) if form else (*lead, *axes))
        for piece, (dtype, axes) in ENCODINGS[name].pieces(shape).items()
    }


def published_piece(
    name: str, form: Form, matrix: str, piece: str, shape: tuple[int, ...]
) -> tuple[str, str, tuple[int, ...]]:
    """(name, dtype, shape) as published, of a piece of a matrix in the encoding `name`; the inverse
    of `as_pieces`. `shape`: of the matrix."""
    row = ENCODINGS[name]
    dtype, axes = row.pieces(shape)[piece]
    if piece == row.main and dtype in form.main_dtypes:
        return matrix, dtype, axes
    if piece == row.main and form.words_dtype and name in LINEAR:
        *axes, n_bytes = axes
        dtype, axes = form.words_dtype, (*axes, n_bytes // WORD_BYTES)
    elif row.rows_per(piece) == 0:
        axes = form.scalar_axes
    return form.name_of(matrix, piece), dtype, axes


def table_of(cfg: ModelConfig, encodings: Mapping[str, str]) -> EncodingTable:
    """The table of a model's tensors. `encodings`: as `found_encodings` gives them."""
    if not encodings:
        return NONE_ENCODED
    own = dict(encodings)
    for name, stack in stacked_tensors(cfg).items():
        if name in encodings:
            own |= {part: encodings[name] for part, *_ in stack.parts}
    return EncodingTable.of({name: own.get(name) for name in published_tensors(cfg)})


def name_of_piece(cfg: ModelConfig, name: str) -> str:
    """How a piece is called as it is published: for messages."""
    form, (matrix, piece) = form_of(cfg), split_piece(name)
    return name if form is None or piece == WHOLE else form.name_of(matrix, piece)
