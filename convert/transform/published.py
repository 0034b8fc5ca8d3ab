"""The tensors of a layered folder as they are published.

They have the names of their form of encoding, and experts are one tensor where their family has
them so. No weight is computed: bytes follow one another, in another order at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from jlayer.checkpoint.encoded import form_of, pieces_of, published_piece
from jlayer.checkpoint.quantization import Quantization
from jlayer.convert.sources.beside import Beside
from jlayer.convert.sources.files import CHUNK_BYTES, Chunk, Place, Room, Source, TensorInfo
from jlayer.convert.transform.packing import codes_in_words, groups_of_inputs, zeros_in_words
from jlayer.encodings.grouped import SCALE, Q
from jlayer.encodings.linear import ORDER, ZERO
from jlayer.encodings.registry import ENCODINGS, piece_name
from jlayer.errors import UnsupportedModelError
from jlayer.families.registry import Stacked, published_tensors, stacked_tensors
from jlayer.spec import STORED_BYTES, ModelConfig


@dataclass(frozen=True)
class Made:
    """A published tensor, and what it is made of: `parts`, tensors of the layered folder. They
    follow one another, or `make`, called with a source and them, gives its bytes. `content`: what
    it is, of one that lies beside the weights."""

    info: TensorInfo
    parts: tuple[str, ...] = ()
    make: Callable[[Source, tuple[str, ...]], Iterator[Chunk]] | None = None
    content: bytes | None = None


def made_of(
    cfg: ModelConfig,
    quantization: Quantization | None,
    tensors: Mapping[str, TensorInfo],
    beside: Mapping[str, Beside],
    *,
    where: str,
) -> dict[str, Made]:
    """Published name -> what it is made of, in the order of use. `tensors`: those of the layered
    folder. Raises UnsupportedModelError where experts that are one tensor are encoded in several
    ways."""
    table, form = (quantization.table if quantization else None), form_of(cfg)
    encodings = {name: table and table.of_tensor(name) for name in published_tensors(cfg)}
    stacks = _stacks(cfg, encodings, tensors, where)
    first = {stack.parts[0][0]: name for name, stack in stacks.items()}
    joined = {part for stack in stacks.values() for part, *_ in stack.parts}
    extras, found = _by_matrix(beside, form), {}
    for name, shape in published_tensors(cfg).items():
        if name in first:
            stack = first[name]
            found |= _of_stack(stack, stacks[stack], encodings[name], form, tensors)
        elif name not in joined and encodings[name] is None:
            found[name] = Made(tensors[name], (name,))
        elif name not in joined:
            of_matrix = _of_packed if form.is_repacked else _of_matrix
            found |= of_matrix(name, shape, encodings[name], form)
        found |= extras.pop(name, {})
    return found | {name: made for rest in extras.values() for name, made in rest.items()}


class PublishedSource:
    """The tensors of `made_of`. An expert's matrix whose columns become rows is held in memory
    while it is turned; of all else some bytes at a time are.

    `stored`: the tensors of the layered folder, and `digests` theirs."""

    def __init__(self, source: Source, digests: Mapping[str, str], made: Mapping[str, Made]):
        self._source, self.digests, self.made = source, digests, made
        self.stored = source.tensors
        self.tensors = {name: row.info for name, row in made.items()}
        self.close = source.close

    def where(self, name: str) -> str:
        return self._source.where(self._stored(name))

    def places_of(self, name: str) -> tuple[Place, ...]:
        return tuple(
            place for part in self.made[name].parts for place in self._source.places_of(part)
        )

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        row = self.made[name]
        if row.content is not None:
            yield row.content
        if row.make is not None:
            yield from row.make(self._source, row.parts)
            return
        for part in row.parts:
            yield from self._source.chunks(part, room)

    def _stored(self, name):
        """A tensor of the layered folder whose file a message about this one names."""
        return next(iter(self.made[name].parts), None) or next(iter(self._source.tensors))


def turned(source: Source, parts: tuple[str, ...]) -> Iterator[Chunk]:
    """Matrices one after another, each with its columns as rows."""
    for part in parts:
        yield from _turned(source, part)  # whose memory is released before the next one's is taken


def _turned(source, name):
    info, at = source.tensors[name], 0
    raw = bytearray(info.n_bytes)
    for chunk in source.chunks(name):
        raw[at : at + len(chunk)] = chunk
        at += len(chunk)
    columns = np.frombuffer(raw, f"u{STORED_BYTES[info.dtype]}").reshape(info.shape).T
    step = max(1, CHUNK_BYTES // (info.n_bytes // len(columns)))
    for first in range(0, len(columns), step):
        rows = np.ascontiguousarray(columns[first : first + step])
        yield memoryview(rows.view(np.uint8)).cast("B")


def _stacks(cfg, encodings, tensors, where) -> dict[str, Stacked]:
    """The tensors of all experts, of a family that publishes no others; none where experts are
    encoded in a form that has them one by one."""
    if not cfg.experts or not any(stack.is_only for stack in cfg.experts.stacks):
        return {}
    form, found = form_of(cfg), {}
    for name, stack in stacked_tensors(cfg).items():
        parts = [part for part, *_ in stack.parts]
        ways = {encodings[part] or tensors[part].dtype for part in parts}
        is_plain = not any(encodings[part] for part in parts)
        if not is_plain and not form.experts_alone:
            continue
        if len(ways) > 1:
            raise UnsupportedModelError(
                f"{where}: the experts of {name} are not alike ({', '.join(sorted(ways))}), so "
                "they cannot be one tensor, as which they are published; keep the published folder"
            )
        found[name] = stack
    return found


def _of_stack(name, stack, encoding, form, tensors):
    parts = [part for part, *_ in stack.parts]
    if encoding is None:
        info = TensorInfo(tensors[parts[0]].dtype, stack.shape)
        return {name: Made(info, tuple(parts), turned if stack.inputs_first else None)}
    return {
        form.name_of(name, piece): Made(
            TensorInfo(dtype, shape), tuple(piece_name(part, piece) for part in parts)
        )
        for piece, (dtype, shape) in pieces_of(encoding, form, None, stack).items()
    }


def _of_matrix(name, shape, encoding, form):
    found = {}
    for piece in pieces_of(encoding, None, shape, None):
        own, dtype, axes = published_piece(encoding, form, name, piece, shape)
        found[own] = Made(TensorInfo(dtype, axes), (piece_name(name, piece),))
    return found


def _of_packed(name, shape, encoding, form):
    """The same of pack-quantized: codes and zeros in words, and the group of each input."""
    (out, width), row = shape, ENCODINGS[encoding]
    per, bits = 32 // row.bits, {"bits": row.bits}
    n_groups = row.n_groups(width)
    sorted_by = (piece_name(name, ORDER),) if row.is_ordered else ()
    made = {
        Q: (("int32", (out, -(-width // per))), partial(codes_in_words, **bits)),
        SCALE: ((row.scale_dtype, (out, n_groups)), None),
        ZERO: (("int32", (-(-out // per), n_groups)), partial(zeros_in_words, **bits)),
        ORDER: (("int32", (width,)), partial(groups_of_inputs, group=row.group)),
    }
    return {
        form.name_of(name, piece): Made(
            TensorInfo(*info),
            (piece_name(name, piece), *(sorted_by if piece == Q else ())),
            make,
        )
        for piece, (info, make) in made.items()
        if piece in row.pieces(shape)
    }


def _by_matrix(beside, form) -> dict[str, dict[str, Made]]:
    """Name of a matrix -> what lies beside it."""
    found: dict[str, dict[str, Made]] = {}
    for name, one in beside.items():
        split = form.split(name) if form else None
        matrix = split[0] if split else name
        found.setdefault(matrix, {})[name] = Made(one.info, content=one.content)
    return found
