"""Published names behind other spellings: all under one prefix, or some without `model.`.

A trainer's wrapper puts `module.` before every name, a tree of arrays `params.`; a model that was
saved without its head has no `model.`. Nothing else in a name is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from jlayer.checkpoint.encoded import form_of
from jlayer.encodings.base import WHOLE
from jlayer.encodings.registry import piece_name, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.base import BODY, HEAD
from jlayer.families.registry import (
    is_dropped,
    is_of_another_part,
    layer_kinds,
    layer_tensor_name,
    published_tensors,
    stacked_tensors,
)
from jlayer.spec import ModelConfig, Role

Value = TypeVar("Value")
# Of several trees in one checkpoint (weights, and an optimiser's moments of each) this is the one
# of the weights.
_WEIGHTS = "params."


@dataclass(frozen=True)
class Names:
    """How one checkpoint spells a model's names. `lead` stands before those of the layers; `used`
    are the published names of all that the model has a use for, without those of pieces."""

    cfg: ModelConfig
    used: frozenset[str]
    lead: str = BODY

    def published(self, name: str) -> str:
        """The published name of a tensor, of a piece as `piece_name` has it; its own where the
        model knows none for it."""
        matrix, piece = self._found(name)
        return name if matrix is None else piece_name(matrix, piece)

    def is_used(self, name: str) -> bool:
        """Whether the model has a use for the tensor that a file or an index calls so."""
        return self._found(name)[0] in self.used

    def is_computed(self, name: str) -> bool:
        """Whether the tensor that a file or an index calls so is left out on purpose."""
        return is_dropped(self.cfg, self.published(name))

    def renamed(self, table: Mapping[str, Value], *, where: str) -> dict[str, Value]:
        """A file's tensors by their published names; of two spellings of a name in one file, the
        published one alone is taken for it."""
        found: dict[str, Value] = {}
        for name, value in table.items():
            published = self.published(name)
            published = name if published in table else published
            if published in found:
                raise CheckpointError(
                    f"{where}: tensor {published} is there under two other names, one of them "
                    f"{name!a}; which is meant cannot be known"
                )
            found[published] = value
        return found

    def _found(self, name):
        """(the published name of a tensor or of the matrix that it is of, the piece); (None, WHOLE)
        where the model knows none."""
        if name in self.used:
            return name, WHOLE
        form = form_of(self.cfg)
        split = form.split(name) if form else None
        for matrix, piece in filter(None, ((name, WHOLE), split, split_piece(name))):
            known = self._known(matrix) if piece is not None else None
            if known is not None and (piece == WHOLE or known in self.used):
                return known, piece
        return None, WHOLE

    def _known(self, name):
        starts = dict.fromkeys((self.lead, self.lead.removesuffix(BODY), ""))
        rests = [name[len(start) :] for start in starts if name.startswith(start)]
        spellings = dict.fromkeys([*rests, *(BODY + rest for rest in rests)])
        return next((known for known in spellings if self._is_known(known)), None)

    def _is_known(self, name):
        return name in self.used or is_dropped(self.cfg, name)


def names_in_use(cfg: ModelConfig, tables: Iterable[Iterable[str]], *, where: str) -> Names:
    """How a checkpoint spells the names in the tables of its files: as it does a norm of a layer.

    Raises CheckpointError where it holds several models.
    """
    leaves = layer_kinds(cfg)[0].leaves
    norm = next((leaf for leaf in leaves if leaf.role is Role.NORM), leaves[0])
    first = layer_tensor_name(cfg, norm, 0).removeprefix(BODY)
    ends = {first, _stacked(first)}
    leads = {
        name.removesuffix(end)
        for table in tables
        for name in table
        for end in ends
        if (name == end or name.endswith(f".{end}")) and not is_of_another_part(cfg, name)
    }
    published = {*published_tensors(cfg), *stacked_tensors(cfg), HEAD.published}
    used = frozenset(published | set(map(_stacked, published)))
    if not leads or leads & {BODY, ""}:
        return Names(cfg, used)
    chosen = leads if len(leads) == 1 else {lead for lead in leads if lead.startswith(_WEIGHTS)}
    if len(chosen) != 1:
        raise CheckpointError(
            f"{where}: holds {len(leads)} models, under {', '.join(map(ascii, sorted(leads)))}, "
            "expected one; save the one that is meant by itself"
        )
    return Names(cfg, used, chosen.pop())


def _stacked(name):
    """What an array is called that holds this tensor of the first layer and of all others."""
    return name.replace("layers.0.", "layers.", 1)
