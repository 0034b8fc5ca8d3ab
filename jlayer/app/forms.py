"""The form in which a folder has a model's weights, by the names of its files: which runs as it is,
which is to be converted, and which files of it are missing.

Reads indexes and small metadata alone. Whether the weights are those of the config is checked by
their readers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass

from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.foreign import kinds_of, refuse_other_forms
from jlayer.checkpoint.layout import CONFIG, INDEX, MANIFEST, is_weight_file
from jlayer.checkpoint.source import MODEL_PICKLE, SINGLE, read_weight_map, regular_file
from jlayer.errors import CheckpointError
from jlayer.gguf.parts import models_in
from jlayer.strict import is_there

LAYERED, SAFETENSORS, BIN, META, ORBAX = "layered", "safetensors", "bin", "meta", "orbax"
GGUF = "GGUF"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_META = re.compile(r"consolidated\.[0-9]{2}\.pth")
# As Orbax names them; see convert/sources/orbax.py, which is imported where one of them is there.
_METADATA, _ITEMS, _UNFINISHED = "_METADATA", ("default", "params", "items"), "orbax-checkpoint-tmp"


@dataclass(frozen=True)
class Form:
    """A form of weights. `runs`: without converting. `files`: those of the weights, where their
    names are known; `missing`: those of them that are not there. `config`: the folder that has
    config.json."""

    name: str
    runs: bool
    files: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    config: str = ""


def holds_ours(folder: str, names: Collection[str]) -> bool:
    """Whether a folder that holds `names` has weights in a form that is read here."""
    ours = {MANIFEST, SINGLE, INDEX} & set(names)
    named = any(MODEL_PICKLE.fullmatch(name) or is_weight_file(name) for name in names)
    return bool(ours) or named or _is_orbax(folder, names) or len(models_in(names)) == 1


def holds_weights(folder: str, names: Collection[str]) -> bool:
    """Whether a folder that holds `names` has weights in any form."""
    others = (name.endswith(".safetensors") or kinds_of([name]) for name in names)
    return holds_ours(folder, names) or any(others)


def form_of(folder: str, names: Collection[str]) -> Form | None:
    """The form of the weights in a folder that holds `names`; None where it has none.

    Raises CheckpointError (an index or metadata that is damaged), UnsupportedModelError (another
    form, by its name) or StorageError.
    """
    if MANIFEST in names:
        return Form(LAYERED, runs=True, files=_there(folder, names, is_weight_file), config=folder)
    for name, runs, single, index in (
        (SAFETENSORS, True, SINGLE, INDEX),
        (BIN, False, _BIN, _BIN_INDEX),
    ):
        if {single, index} & set(names):
            return _indexed(folder, names, name, runs, single, index)
    if any(_META.fullmatch(name) for name in names):
        files = _there(folder, names, _META.fullmatch)
        return Form(META, runs=False, files=files, config=folder)
    if _is_orbax(folder, names) or any(name.isdigit() for name in names):
        found = _orbax(folder, names)
        if found is not None:
            return found
    if any(is_weight_file(name) for name in names):
        raise CheckpointError(
            f"{folder}: layers without their manifest.json: its conversion did not end; run the "
            "same jlayer convert again, which resumes it"
        )
    refuse_other_forms(folder, names)
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise CheckpointError(
            f"{folder}: no {SINGLE} and no {INDEX}, only {listed(others)}; fetch the index"
        )
    return None


def _indexed(folder, names, name, runs, single, index):
    """The form of one file, or of those that an index lists."""
    files = [single]
    if single not in names:
        if not is_there(os.path.join(folder, index)):  # a link whose blob was removed
            return Form(name, runs, missing=(index,), config=folder)
        files = sorted(set(read_weight_map(regular_file(folder, index)).values()))
    missing = [file for file in files if not is_there(os.path.join(folder, file))]
    there = [os.path.join(folder, file) for file in files if file not in missing]
    return Form(name, runs, tuple(there), tuple(missing), folder)


def _there(folder, names, is_one):
    return tuple(os.path.join(folder, name) for name in sorted(names) if is_one(name))


def _is_orbax(folder, names):
    items = (item for item in _ITEMS if item in names)
    unfinished = any(_UNFINISHED in name for name in (*names, os.path.basename(folder)))
    return (
        _METADATA in names
        or unfinished
        or any(os.path.exists(os.path.join(folder, item, _METADATA)) for item in items)
    )


def _orbax(folder, names):
    """An Orbax checkpoint, whose config.json is there or one folder up; None where it is none."""
    from jlayer.convert.sources.orbax import find_checkpoint

    if find_checkpoint(folder, names) is None:
        return None
    above = os.path.dirname(os.path.abspath(folder))
    return Form(ORBAX, runs=False, config=folder if CONFIG in names else above)
