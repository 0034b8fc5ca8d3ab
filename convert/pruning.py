"""What is checked of a pruning before its layers are chosen, and what an earlier run has chosen."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from jlayer.checkpoint.layout import CONFIG, MANIFEST, PRUNED
from jlayer.convert.job import refuse_quantized, refuse_rows
from jlayer.convert.sources.open import open_source
from jlayer.convert.target.journal import JOURNAL, read_journal
from jlayer.convert.target.write import check_target
from jlayer.convert.transform.pruned import Pruning, prunings_of
from jlayer.errors import UsageError
from jlayer.families.fewer import check_renumbered
from jlayer.families.holders import text_only
from jlayer.gguf.parts import model_at
from jlayer.strict import is_there, read_small_file


def check_to_prune(
    source: str | os.PathLike, target: str, *, n_dropped: int, keep: Sequence[int] = ()
) -> int:
    """Whether so many layers of a source can be left out in `target`: returns how many it has.

    Raises UsageError, UnsupportedModelError, CheckpointError or StorageError.
    """
    source = model_at(source)
    check_target(target, source=source)
    refuse_rows(source)
    refuse_quantized(source)
    checked = open_source(source)
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
    check_renumbered(text_only(json.loads(checked.config_bytes), where=where), where=where)
    return n_layers


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
