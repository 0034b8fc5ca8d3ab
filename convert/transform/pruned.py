"""A source without some of its layers: those that are left have new numbers, and the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jlayer.checkpoint.layout import BESIDE, CONFIG, PRUNED
from jlayer.config import model_config
from jlayer.convert.sources.beside import decode_beside, encode_beside
from jlayer.convert.sources.files import Chunk, Place, Room, Source
from jlayer.convert.sources.open import CheckedSource
from jlayer.errors import CheckpointError, UsageError
from jlayer.families.fewer import Renumbering, config_with_fewer, fewer_layers
from jlayer.families.holders import text_only
from jlayer.strict import parse_json_object, read_small_file


@dataclass(frozen=True)
class Pruning:
    """Which layers are left out of a model of `n_layers`: the numbers `dropped`, in order. `asked`:
    what was asked for, for JSON; a run that asks for the same may take the layers from here.
    `found`: what they were chosen by, for JSON."""

    n_layers: int
    dropped: tuple[int, ...]
    asked: dict
    found: dict

    def as_dict(self) -> dict:
        return {**vars(self), "dropped": list(self.dropped)}

    @classmethod
    def from_dict(cls, raw: dict, *, where: str) -> Pruning:
        """Of what `as_dict` gives. Raises CheckpointError for another form."""
        try:
            found = cls(raw["n_layers"], tuple(raw["dropped"]), raw["asked"], raw["found"])
            check_dropped(found.n_layers, found.dropped, where=where)
        except (KeyError, TypeError, UsageError) as error:
            raise CheckpointError(
                f"{where}: what it says of layers that are left out is damaged ({error!a:.120}); "
                "start again with --overwrite"
            ) from None
        return found


def check_dropped(n_layers: int, dropped: Sequence[int], *, where: str) -> None:
    """Raises UsageError unless these are numbers of layers, each once and in order, and not all."""
    known = list(dropped) == sorted(set(dropped)) and set(dropped) <= set(range(n_layers))
    if not known or not 1 <= len(dropped) < n_layers:
        raise UsageError(
            f"{where}: found {', '.join(map(str, dropped)) or 'no'} layers to leave out, expected "
            f"1 to {n_layers - 1} of the numbers 0 to {n_layers - 1}, in order"
        )


def pruned(checked: CheckedSource, pruning: Pruning) -> CheckedSource:
    """The same source without the layers; a side file says which.

    Raises UsageError where the source has no such layers, UnsupportedModelError where its config
    cannot be renumbered, CheckpointError or StorageError.
    """
    n_layers = checked.cfg.num_hidden_layers
    if pruning.n_layers != n_layers:
        raise UsageError(
            f"{checked.folder}: has {n_layers} layers, and the ones to leave out are of a model of "
            f"{pruning.n_layers}; start again with --overwrite"
        )
    check_dropped(n_layers, pruning.dropped, where=checked.folder)
    left = Renumbering(n_layers, pruning.dropped)
    before = _pruned_before(checked)
    made = {"pruned": [*before, pruning.as_dict()]}
    # Sorted, as a journal gives them back: the same bytes once a run is resumed.
    content = (json.dumps(made, indent=2, sort_keys=True) + "\n").encode()
    sides = {**checked.side_files, PRUNED: content}
    if BESIDE in sides:
        beside = decode_beside(_content(sides[BESIDE]), where=BESIDE)
        sides[BESIDE] = encode_beside(left.names(beside))
    quantization = checked.quantization and checked.quantization.with_fewer(checked.cfg, left)
    return replace(
        checked,
        cfg=fewer_layers(checked.cfg, pruning.dropped),
        config_bytes=_config_bytes(checked, pruning.dropped),
        tensors=PrunedSource(checked.tensors, left),
        side_files=sides,
        quantization=quantization,
    )


def prunings_of(raw: bytes, *, where: str) -> list[Pruning]:
    """What a folder's side file says of layers that were left out, first to last. Raises
    CheckpointError."""
    found = parse_json_object(raw, what=where).get("pruned")
    if not isinstance(found, list):
        raise CheckpointError(f"{where}: has no list of what was left out; remove this file")
    return [Pruning.from_dict(one, where=where) for one in found]


def _pruned_before(checked):
    file = checked.side_files.get(PRUNED)
    if file is None:
        return []
    return [one.as_dict() for one in prunings_of(_content(file), where=PRUNED)]


def _content(file):
    return file if isinstance(file, bytes) else read_small_file(file.real)


def _config_bytes(checked, dropped):
    where = os.path.join(checked.folder, CONFIG)
    raw = text_only(json.loads(checked.config_bytes), where=where)
    found = config_with_fewer(
        *(raw, checked.cfg, dropped),
        read=lambda raw: model_config(raw, where=where),
        where=where,
    )
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


class PrunedSource:
    """The tensors of the layers that are left, by their new names."""

    def __init__(self, source: Source, left: Renumbering):
        self._source = source
        self._old = left.names({name: name for name in source.tensors})
        self.tensors = {new: source.tensors[old] for new, old in self._old.items()}
        self.close = source.close

    def where(self, name: str) -> str:
        old = self._old[name]
        return self._source.where(old) + (f" ({old} there)" if old != name else "")

    def places_of(self, name: str) -> tuple[Place, ...]:
        return self._source.places_of(self._old[name])

    def chunks(self, name: str, room: Room | None = None) -> Iterator[Chunk]:
        return self._source.chunks(self._old[name], room)
