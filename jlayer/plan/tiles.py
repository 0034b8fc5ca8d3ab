"""Tiles, the units that are streamed.

A range of output rows of a matrix is consecutive bytes on disk, on the host and on the device, and
`x @ W[rows].T` is exact. So a layer may be cut into any number of row tiles, without partial sums.
The largest tile is a whole layer. A bias moves with the rows of its matrix. A large leaf that a
function reads uncut is a tile by itself, the last of the stage that the function ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from jlayer.checkpoint.quantization import Quantization
from jlayer.encodings.base import Encoding
from jlayer.encodings.plain import INPUTS_FIRST
from jlayer.encodings.registry import SCHEMES, encoding
from jlayer.families.base import LayerKind, Stage, lengths_name
from jlayer.families.registry import published_tensors, stacked_tensors
from jlayer.plan.dealing import Deal, dealt
from jlayer.plan.joined import Joined
from jlayer.spec import STORED_BYTES, ModelConfig


class Tier(Enum):
    """Where a tile is kept between forward passes."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    __hash__ = object.__hash__  # Enum's own is slow, and plans count millions of tiles by tier


@dataclass(frozen=True)
class Weights:
    """A model's weights as a plan needs them.

    `form_of`: published tensor -> name of its encoding on disk. `dtype`: the compute dtype.
    """

    cfg: ModelConfig
    form_of: Callable[[str], str]
    dtype: str

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(
            encoding(self.form_of(name)).n_bytes(shape)
            for name, shape in published_tensors(self.cfg).items()
        )

    @cached_property
    def published_bytes(self) -> int:
        """Bytes of all tensors before jlayer quantized some, if any: the last that has plain
        numbers has the published dtype. What is published in another encoding stays in it."""
        shapes = published_tensors(replace(self.cfg, additions=None))
        forms = [self.form_of(name) for name in shapes]
        vectors = (form for form in reversed(forms) if encoding(form).is_plain)
        plain = next(vectors, self.cfg.dtype or "bfloat16")
        return sum(
            encoding(plain if form in SCHEMES else form).n_bytes(shape)
            for form, shape in zip(forms, shapes.values(), strict=True)
        )


def unseen_weights(
    cfg: ModelConfig,
    quantization: Quantization | None,
    *,
    stored: str,
    dtype: str,
    as_published: bool = False,
) -> Weights:
    """The weights of a model of which only this is known. `stored`: the dtype of what is not
    quantized; `dtype`: the compute dtype. `as_published`: some experts may have inputs first."""
    shapes, inputs_first = published_tensors(cfg), set()
    if as_published:
        stacks = [stack for stack in stacked_tensors(cfg).values() if stack.inputs_first]
        inputs_first = {name for stack in stacks for name, *_ in stack.parts}

    def form_of(tensor):
        scheme = quantization and quantization.scheme_of(tensor, shapes[tensor])
        if scheme is not None:
            return scheme.name
        return INPUTS_FIRST[stored].name if tensor in inputs_first else stored

    return Weights(cfg, form_of, dtype)


@dataclass(frozen=True)
class Part:
    """One array of a tile: a piece of a leaf, whole or a range of its rows.

    `matrix`: the leaf. `leaf`: the array within the tile (`q_proj`, or `q_proj.q` and
    `q_proj.scale` of the same rows). `tensor`: the tensor on disk. `shape`: of this part, from its
    `first_row` on. `n_rows`: of the matrix, of which a row of a piece may be for several; of a
    vector its numbers. `width`: numbers in a row of the matrix. `form`: the name of its encoding. A
    matrix that cannot be cut by rows is whole. `of`: the matrix beside which it stands: a bias, or
    what an adapter adds. `hosts`: how the rows of the matrix are dealt out to
    hosts, of which this is in the range of one; None: each host has all of them.
    """

    leaf: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int = 0
    matrix: str = ""
    piece: str = ""
    form: str = ""
    width: int = 0
    n_rows: int = 0
    of: str | None = None
    hosts: Deal | None = None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * STORED_BYTES[self.dtype]

    @property
    def encoding(self) -> Encoding:
        return encoding(self.form)

    @property
    def has_rows(self) -> bool:
        """Whether it has the rows of the matrix themselves, not what scales them."""
        return self.piece == self.encoding.main

    @property
    def is_low_rank(self) -> bool:
        """Whether it is what an adapter has for a matrix: A, or some rows of B."""
        return self.of is not None and len(self.shape) == 2

    @property
    def is_lengths(self) -> bool:
        """Whether it is the lengths that an adapter gives some rows."""
        return self.of is not None and self.matrix == lengths_name(self.of)

    @property
    def is_for_all_rows(self) -> bool:
        """Whether it is a piece that comes whole with each range of rows: one scale for all."""
        return self.encoding.rows_per(self.piece) == 0

    @property
    def n_weights(self) -> int:
        """Weights in this part; 0 for the scales of a quantized matrix."""
        if not self.has_rows:
            return 0
        return self.n_rows * self.width if len(self.shape) > 1 else self.width

    def of_rows(self, first: int, n_rows: int) -> Part:
        """A range of the rows of a leaf, or of a host's, from a multiple of its encoding's
        `row_unit` on."""
        if not self.encoding.by_rows:
            assert (first, n_rows) == (0, self.n_rows), "it is moved as a whole"
            return self
        per = self.encoding.rows_per(self.piece)
        if per == 0:
            return replace(self, n_rows=n_rows)
        assert first % per == 0, "a row of a piece would be cut"
        shape = (-(-n_rows // per), *self.shape[1:])
        return replace(self, shape=shape, first_row=self.first_row + first // per, n_rows=n_rows)

    def share(self, first: int, n_rows: int) -> Part:
        """Some rows of this part, from its own row `first` on, a multiple of the encoding's
        `row_unit`."""
        rows = self.rows_of_piece(first, n_rows)
        if rows is None:
            return replace(self, n_rows=n_rows)
        shape, begin = (rows.stop - rows.start, *self.shape[1:]), self.first_row + rows.start
        is_vector = self.has_rows and len(shape) == 1
        width = n_rows if is_vector else self.width
        return replace(self, shape=shape, first_row=begin, n_rows=n_rows, width=width)

    def rows_of_piece(self, first: int, n_rows: int) -> slice | None:
        """The rows of this piece that are for some of its matrix's; None: all of it."""
        per = self.encoding.rows_per(self.piece)
        return slice(first // per, -(-(first + n_rows) // per)) if per else None

    def decoded_bytes(self, dtype: str, platform: str) -> int:
        """Bytes of the decoded copy of its weights; what an adapter adds is never in `dtype`."""
        if not self.n_weights or self.is_low_rank:
            return 0
        n_rows = self.n_weights // self.width
        return self.encoding.decoded_bytes(n_rows, self.width, dtype=dtype, platform=platform)


@dataclass(frozen=True)
class Tile:
    """The unit of streaming: arrays that are used together.

    `kind`: of its layer; None for the head. `stage`: the stage whose rows it has; None for a whole
    layer, or a whole expert. `begins_stage`, `ends_stage`: whether it has the first and last rows
    of its stage. `joined`: the layout of what each device has if that crosses the link as one
    array; in host memory one device's lies after another's. `for_host`: whether its
    rows are set apart for the host's cores. `n_devices`: to how many of a host its rows are dealt
    out. With several hosts it has the rows that one of them reads; those of the others have the
    same shapes.
    """

    name: str
    kind: LayerKind | None
    stage: Stage | None
    layer: int | None
    parts: tuple[Part, ...]
    expert: int | None = None
    begins_stage: bool = True
    ends_stage: bool = True
    joined: Joined | None = None
    for_host: bool = False
    n_devices: int = 1

    @cached_property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    @property
    def device_bytes(self) -> int:
        """Bytes on a device; a joined tile includes the gaps between its parts."""
        return self.joined.n_bytes if self.joined else self.share.n_bytes

    @property
    def room_bytes(self) -> int:
        """Bytes in host memory, without the slack around the parts of a tile that is not joined."""
        return self.n_devices * self.joined.n_bytes if self.joined else self.n_bytes

    @property
    def comes_out_even(self) -> bool:
        """Whether each device has rows of its own of every part, as many as the others, or needs
        all of one, such as a scale for all rows."""
        if self.n_devices == 1:
            return True
        deals = [self.deal_of(part.n_rows) for part in self.parts if not part.is_for_all_rows]
        return all(deal is not None and deal.is_even for deal in deals) and not self.for_host

    @cached_property
    def _row_unit(self) -> int | None:
        """The rows that stay together; None: all of them."""
        if not all(part.encoding.by_rows for part in self.parts):
            return None
        return math.lcm(*(part.encoding.row_unit for part in self.parts))

    def deal_of(self, n_rows: int) -> Deal | None:
        """How the rows of its matrices with so many are dealt out; None: each device has all."""
        if self.n_devices == 1 or self._row_unit is None:
            return None
        return dealt(n_rows, row_unit=self._row_unit, n=self.n_devices)

    def hosts_of(self, matrix: str) -> Deal | None:
        """How all rows of one of its matrices are dealt out to hosts; None: each has all."""
        return next(part.hosts for part in self.parts if part.matrix == matrix)

    @cached_property
    def share(self) -> Tile:
        """The rows that a device has of it, the first one: the shares of the others have the same
        shapes."""
        if self.n_devices == 1:
            return self
        return replace(self, parts=self.parts_of(0), n_devices=1)

    def parts_of(self, device: int) -> tuple[Part, ...]:
        """What a device has of its parts."""
        deals = [(part, self.deal_of(part.n_rows)) for part in self.parts]
        return tuple(
            part.share(deal.first(device), deal.height) if deal else part for part, deal in deals
        )

    @property
    def n_arrays(self) -> int:
        """Arrays that the time of a put is counted for; a joined tile counts one per matrix."""
        return len(self.heights if self.joined else self.parts)

    @property
    def heights(self) -> dict[str, int]:
        """Matrix -> the number of its rows in this tile that are multiplied, in order."""
        uncut = self.kind.moving if self.kind else ()
        return {
            part.matrix: part.n_rows
            for part in self.parts
            if len(part.shape) == 2 and part.matrix not in uncut and part.of is None
        }

    @property
    def uncut(self) -> tuple[str, ...]:
        """The leaves in it that a function reads uncut."""
        moving = self.kind.moving if self.kind else ()
        return tuple(dict.fromkeys(p.matrix for p in self.parts if p.matrix in moving))

    @property
    def ends_layer(self) -> bool:
        """Whether the output of a layer is complete after this tile."""
        if self.kind is None:
            return False
        if self.stage is None:
            return self.expert is None
        return self.ends_stage and self.stage == self.kind.stages[-1]

    @property
    def is_whole_expert(self) -> bool:
        """Whether it has all matrices of an expert."""
        return self.expert is not None and self.stage is None

    @property
    def first_stage(self) -> Stage | None:
        """The stage that it begins with or goes on with; None for a whole layer."""
        return self.kind.expert_stages[0] if self.is_whole_expert else self.stage

    @property
    def chooses(self) -> bool:
        """Whether its products depend on the adapter that each row is computed with."""
        return any(stage.chooses for stage in ([self.stage] if self.stage else self.kind.stages))

    @property
    def uses_cache(self) -> bool:
        """Whether its run uses the layer's cache: a whole layer, or the end of such a stage."""
        if self.kind is None:
            return False
        if self.stage is None:
            return self.expert is None
        return self.ends_stage and "cache" in self.stage.finish.reads

    @cached_property
    def signature(self) -> tuple:
        """The key of the programs compiled for this tile; equal for all layers of a kind."""
        kind = self.kind and self.kind.name
        stage = self.stage and self.stage.name
        parts = ((part.leaf, part.shape, part.dtype, part.form) for part in self.parts)
        return (kind, stage, self.n_devices, self.joined, *parts)

    def products(self) -> dict[str, int]:
        """Product -> the number of its rows that this tile gives, of all hosts."""
        heights, found = self.heights, {}
        for group in self.stage.groups:
            if group.leaves[0] in heights:
                hosts = self.hosts_of(group.leaves[0])
                found[group.product] = heights[group.leaves[0]] * (hosts.n if hosts else 1)
        return found
