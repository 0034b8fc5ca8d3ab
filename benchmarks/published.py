"""A layered folder under the names that published checkpoints have, without a second copy of the
weights: hard links (symbolic ones across file systems), an index, and a tokenizer where there is
none, since AirLLM asks for both.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

INDEX = "model.safetensors.index.json"
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1}
EMBEDDING = "model.embed_tokens.weight"  # and its pieces, where it is quantized


def published(folder: Path, work: Path) -> Path:
    """The checkpoint that the peers read: `folder` itself, or `work` with links into it where
    `folder` is layered."""
    if not (folder / "manifest.json").exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    own = json.loads((folder / INDEX).read_text())
    place = {"embed": -1, "final": 1}
    files = sorted(
        set(own["weight_map"].values()), key=lambda file: (place.get(file.split(".")[0], 0), file)
    )
    names = {
        file: f"model-{number:05}-of-{len(files):05}.safetensors"
        for number, file in enumerate(files, 1)
    }
    for file, name in names.items():
        _link(folder / file, work / name)
    own["weight_map"] = {tensor: names[file] for tensor, file in own["weight_map"].items()}
    (work / INDEX).write_text(json.dumps(own))
    for path in folder.glob("*.json"):
        if path.name not in (INDEX, "manifest.json"):
            (work / path.name).write_bytes(path.read_bytes())
    if not (work / "tokenizer.json").exists():
        _write_tokenizer(work)
    return work


def weight_bytes(folder: Path) -> int:
    """Bytes of weights that a token needs, by the headers: all but an embedding that is not the
    head too."""
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or (name.startswith(EMBEDDING) and not tied):
                continue
            total += math.prod(entry["shape"]) * WIDTHS[entry["dtype"]]
    return total


def _link(source, target):
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.absolute())


def _write_tokenizer(folder):
    words = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<s>"}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    text = {"version": "1.0", **dict.fromkeys(parts), "added_tokens": [], "model": words}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
