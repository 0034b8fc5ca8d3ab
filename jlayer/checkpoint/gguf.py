"""Opens a GGUF model to run it in place or to convert it: its config, and where each tensor lies.

The head is read by `jlayer.gguf`. Names, shapes and dtypes go through the checks of a published
folder. No weights are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace

from jlayer.checkpoint.agree import EXTRA, check_tensors, listed
from jlayer.checkpoint.encoded import table_of
from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.checkpoint.source import Published, SourceFile, Stored, regular_file
from jlayer.config import model_config
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.registry import piece_name
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.registry import is_latent_matrix, is_matrix, published_tensors
from jlayer.gguf.config import config_of, encoded
from jlayer.gguf.names import layer_of, published
from jlayer.gguf.parts import open_head
from jlayer.gguf.reader import Head
from jlayer.spec import ITEM_BYTES, ModelConfig


def open_gguf(path: str, *, allow_extra: bool = False) -> Published:
    """Opens the GGUF model at `path`, its first part where it is split. `allow_extra`: tensors that
    the model has no use for are left out.

    Raises CheckpointError, UnsupportedModelError or StorageError.
    """
    head = open_head(path)
    raw = config_of(head)
    cfg, notes = model_config(raw, where=path), []
    files = {part: _file(part) for part in head.parts}
    tables, encodings = _tables(head, cfg, files, notes)
    quantization = Quantization.as_found(table_of(cfg, encodings))
    label = None if allow_extra else f"{EXTRA} (jlayer convert --allow-extra leaves them out)"
    copies_of = check_tensors(
        path, cfg, tables, [], notes, quantization=quantization, extra_label=label
    )
    tensors = {name: (copies[0][0].file, copies[0][1]) for name, copies in copies_of.items()}
    fingerprint = _fingerprint(encoded(raw), head, files)
    return Published(cfg, quantization, tensors, fingerprint, tuple(notes))


def _file(path) -> SourceFile:
    return regular_file(os.path.dirname(path) or os.curdir, os.path.basename(path))


def _tables(head: Head, cfg: ModelConfig, files: Mapping[str, SourceFile], notes):
    """(by file, name of a published tensor or its piece -> (place, entry); published tensor -> the
    name of its encoding). Layers that guess further tokens are left out."""
    _refuse_unknown(head)
    shapes = published_tensors(cfg)
    tables, encodings, further = {path: {} for path in files}, {}, set()
    first = cfg.num_hidden_layers
    for name, tensor in head.tensors.items():
        if (layer := layer_of(name)) is not None and first <= layer < first + cfg.n_further:
            further.add(name)
            continue
        for own, part in published(cfg.model_type, name, tensor):
            part = _as_row(part, shapes.get(own))
            entry = TensorEntry(part.type, part.shape, part.offset, part.n_bytes)
            if part.type in BLOCKS and own in shapes:
                _check_is_matrix(own, name, part, shapes[own])
                encodings[own] = part.type
                (piece, (dtype, shape)), *_ = BLOCKS[part.type].pieces(part.shape).items()
                entry = TensorEntry(dtype, shape, part.offset, part.n_bytes)
                own = piece_name(own, piece)
            tables[part.path][own] = (Stored(name, files[part.path]), entry)
    if further:
        names = listed(sorted(further))
        notes.append(f"{head.path}: left out, since they guess further tokens: {names}")
    return tables, encodings


def _as_row(part, shape):
    """A tensor, with axes of one as published. A matrix of one row is a vector in files of 2024,
    and may be one today; taps of a convolution have two axes."""
    is_same = shape is not None and _beyond_one(shape) == _beyond_one(part.shape)
    return replace(part, shape=shape) if is_same else part


def _beyond_one(shape):
    return [size for size in shape if size != 1]


def _check_is_matrix(own, name, part, shape):
    if part.shape != shape:
        raise CheckpointError(
            f"{part.path}: tensor {name} is {list(part.shape)}, by the metadata {list(shape)}; "
            "fetch the file again"
        )
    if not is_matrix(own, shape) and not is_latent_matrix(own):
        raise UnsupportedModelError(
            f"{part.path}: tensor {name} is {part.type}, but {own} is used whole, and supported as "
            f"plain numbers alone ({', '.join(ITEM_BYTES)}); take a file in which it is"
        )


def _refuse_unknown(head):
    """Raises UnsupportedModelError where tensors are in encodings that are not known here."""
    unknown: dict[str, list[str]] = {}
    for name, tensor in head.tensors.items():
        if tensor.type not in ITEM_BYTES and tensor.type not in BLOCKS:
            unknown.setdefault(tensor.type, []).append(name)
    if unknown:
        said = "; ".join(f"{kind}: {listed(names[:3])}" for kind, names in unknown.items())
        raise UnsupportedModelError(
            f"{head.path}: tensors in encodings that are not supported ({said}); supported: "
            f"{', '.join((*ITEM_BYTES, *BLOCKS))}"
        )


def _fingerprint(config_bytes, head, files):
    """A hash over the config, where each tensor lies, and each file's size and time of the last
    change."""
    digest = hashlib.sha256(config_bytes)
    for file in files.values():
        blob = os.path.basename(file.real) if os.path.islink(file.path) else None
        digest.update(repr((file.name, file.n_bytes, blob or file.identity[-1])).encode())
    for name, tensor in head.tensors.items():
        digest.update(repr((name, tensor.type, tensor.shape, tensor.offset)).encode())
    return digest.hexdigest()
