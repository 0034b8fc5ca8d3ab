"""What is checked of a pruning before its layers are chosen, and what an earlier run has chosen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from jlayer.checkpoint.layout import CONFIG, MANIFEST, PRUNED
from jlayer.config import model_config
from jlayer.convert.job import refuse_quantized, refuse_rows
from jlayer.convert.sources.open import open_source
from jlayer.convert.target.journal import JOURNAL, describe_source, read_journal
from jlayer.convert.target.write import check_target
from jlayer.convert.transform.pruned import Pruning, prunings_of
from jlayer.errors import UsageError
from jlayer.families.fewer import check_renumbered, config_with_fewer
from jlayer.families.holders import text_only
from jlayer.gguf.parts import model_at
from jlayer.spec import ModelConfig
from jlayer.strict import is_there, read_small_file


@dataclass(frozen=True)
class ToPrune:
    """A source of which layers can be left out. `digest`: of what tells it from others, as a
    conversion that goes on does: its config, and its files by their sizes and times."""

    cfg: ModelConfig
    digest: str
    raw: dict
    where: str

    @property
    def n_layers(self) -> int:
        return self.cfg.num_hidden_layers

    def check(self, dropped: Sequence[int]) -> None:
        """Raises UnsupportedModelError where no config can say what is left without these."""
        config_with_fewer(
            *(self.raw, self.cfg, tuple(sorted(dropped))),
            read=lambda raw: model_config(raw, where=self.where),
            where=self.where,
        )


def check_to_prune(
    source: str | os.PathLike, target: str, *, n_dropped: int, keep: Sequence[int] = ()
) -> ToPrune:
    """Whether so many layers of a source can be left out in `target`.

    Raises UsageError, UnsupportedModelError, CheckpointError or StorageError.
    """
    source = model_at(source)
    check_target(target, source=source)
    refuse_rows(source)
    refuse_quantized(source)
    checked = open_source(source)
    try:
        described = describe_source(checked, dtype=None, quantization=None, restorable=False)
    finally:
        checked.tensors.close()
    n_layers = checked.cfg.num_hidden_layers
    wrong = [layer for layer in keep if not 0 <= layer < n_layers]
    if wrong:
        raise UsageError(
            f"--keep: found {', '.join(map(str, wrong))}, expected numbers of the layers of "
            f"{source}, 0 to {n_layers - 1}"
        )
    most = n_layers - max(1, len(set(keep)))
    if not 1 <= n_dropped <= most:
        kept = f", {len(set(keep))} of which --keep keeps" if keep else ""
        raise UsageError(
            f"--drop-layers: found {n_dropped}, and {source} has {n_layers} layers{kept}; expected "
            f"from 1 to {most}"
        )
    where = os.path.join(source, CONFIG)
    raw = text_only(json.loads(checked.config_bytes), where=where)
    check_renumbered(raw, where=where)
    del described["folder"]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return ToPrune(checked.cfg, digest, raw, where)


def pruning_there(target: str) -> Pruning | None:
    """What an unfinished or finished run has left out in `target`; None: nothing is there.

    Raises UsageError where something else is there, CheckpointError or StorageError.
    """
    if is_there(os.path.join(target, JOURNAL)):
        found = read_journal(target).source.get("pruned")
        if found is not None:
            return Pruning.from_dict(found, where=os.path.join(target, JOURNAL))
    elif not is_there(os.path.join(target, MANIFEST)):
        return None
    elif is_there(path := os.path.join(target, PRUNED)):
        return prunings_of(read_small_file(path), where=path)[-1]
    raise UsageError(
        f"{target}: holds a conversion of a model with all its layers; name another folder, or "
        "replace it with --overwrite"
    )
