"""Checkpoints as torch.save writes them, and archives put together by hand, that no torch would."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from jlayer.checkpoint.layout import MANIFEST
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFETENSORS_INDEX = "model.safetensors.index.json"


def refused(source: Path, target: Path, words, *, begun: bool = False, **options) -> str:
    """Converts what must be refused, and returns the refusal, which holds `words`.

    `begun`: only the weights tell, so that the target may hold files, but not as a finished one.
    """
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, target, **options)
    message = str(caught.value)
    assert type(caught.value).exit_code == 3
    for word in words:
        assert word in message
    assert "\n" not in message
    assert begun or not target.exists()
    assert not (target / MANIFEST).exists()
    assert not list(target.glob("*.jlayer-tmp"))
    return message


def as_bin(source: Path, target: Path) -> Path:
    """A copy of a folder of safetensors with its weights in pickles, sharded as they are."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    for path in sorted(target.glob("*.safetensors")):
        torch.save(load_file(path), target / _bin_name(path.name))
        path.unlink()
    if (target / SAFETENSORS_INDEX).exists():
        index = json.loads((target / SAFETENSORS_INDEX).read_text())
        weight_map = {name: _bin_name(shard) for name, shard in index["weight_map"].items()}
        (target / BIN_INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        (target / SAFETENSORS_INDEX).unlink()
    return target


def write_archive(path: Path, entries: dict[str, bytes], *, compressed: tuple[str, ...] = ()):
    """A zip of these entries, in their order; those named in `compressed` are deflated."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            how = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, how)


def read_archive(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _bin_name(name):
    return name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
