"""What a form of encoding has beside the weights, as one small file of a converted folder.

These are scales of a layer's inputs, and shapes that are said again. No run of ours reads them; an
export in the published form writes them.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jlayer.checkpoint.encoded import form_of
from jlayer.checkpoint.safetensors import BITS_OF_SMALL
from jlayer.convert.sources.files import FileSource, Place, TensorInfo
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.base import BODY
from jlayer.families.registry import is_beside, layer_of
from jlayer.sizes import human
from jlayer.spec import STORED_BYTES, ModelConfig
from jlayer.strict import parse_json_object

# A scale is a number, a shape is two; a table of a row's length is still small.
MOST_BYTES = 1 << 20
# A dtype of so many bytes, as which numbers of any other are read.
_OF_SIZE = {1: "uint8", 2: "float16", 4: "int32", 8: "int64"}


@dataclass(frozen=True)
class Beside:
    """A tensor that is no weight: what it is, and its bytes."""

    info: TensorInfo
    content: bytes


def read_beside(cfg: ModelConfig, tables: Iterable[Mapping[str, tuple]]) -> dict[str, Beside]:
    """The tensors beside the weights of a published folder, by their published names; none of a
    form that no export gives back.

    `tables`: by file, name -> a Place, and what the file says of the tensor. Raises CheckpointError
    where a file changed, UnsupportedModelError for a large tensor, or StorageError.
    """
    form = form_of(cfg)
    if form is None or not form.is_exported:
        return {}
    entries = {
        _in_layers(name): entry
        for table in tables
        for name, entry in table.items()
        if is_beside(cfg, name)
    }
    seen = {name: _as_read(*entry) for name, entry in entries.items()}
    source = FileSource(seen, {name: (place,) for name, (place, _) in entries.items()})
    try:
        return {
            name: Beside(TensorInfo(info.dtype, tuple(info.shape)), b"".join(source.chunks(name)))
            for name, (_, info) in entries.items()
        }
    finally:
        source.close()


def encode_beside(found: Mapping[str, Beside]) -> bytes:
    """The bytes of the file, name -> [dtype, shape, bytes in base64]; `decode_beside` reads them.
    Without spaces: a model of 70,000 experts' matrices has as many of these tensors, or twice."""
    body = {
        name: [one.info.dtype, one.info.shape, base64.b64encode(one.content).decode()]
        for name, one in found.items()
    }
    return (json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n").encode()


def decode_beside(raw: bytes, *, where: str) -> dict[str, Beside]:
    """Name -> tensor, of a file of a layered folder. Raises CheckpointError where an entry has
    another form, or UnsupportedModelError for a dtype that no file of ours can hold."""
    return {
        name: _decoded(name, row, where) for name, row in parse_json_object(raw, what=where).items()
    }


def _in_layers(name):
    """A name with what stands before those of layers, which checkpoints may leave out."""
    is_short = layer_of(name) is None and layer_of(BODY + name) is not None
    return BODY + name if is_short else name


def _as_read(place: Place, info):
    if bits := BITS_OF_SMALL.get(info.dtype):
        seen = TensorInfo("uint8", (math.prod(info.shape) * bits // 8,))
    else:
        seen = TensorInfo(_OF_SIZE[_item_bytes(info.dtype)], tuple(info.shape))
    if seen.n_bytes > MOST_BYTES:
        raise UnsupportedModelError(
            f"{place.file.path}: tensor {place.name} is no weight by its name and has "
            f"{human(seen.n_bytes)}, supported: up to {human(MOST_BYTES)}; leave it out of the file"
        )
    return seen


def _item_bytes(dtype):
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _decoded(name, row, where):
    try:
        dtype, shape, data = row
        if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("dtype or shape")
        info = TensorInfo(dtype, tuple(shape))
        content = base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: entry {name!a:.80} is damaged ({error})") from None
    if info.dtype not in STORED_BYTES:
        raise UnsupportedModelError(
            f"{where}: {name!a:.80} is {info.dtype!a:.40}, supported in an export: "
            f"{', '.join(STORED_BYTES)}; keep the published folder"
        )
    if len(content) != info.n_bytes:
        raise CheckpointError(
            f"{where}: {name!a:.80} has {len(content)} bytes, expected {info.n_bytes}"
        )
    return Beside(info, content)
