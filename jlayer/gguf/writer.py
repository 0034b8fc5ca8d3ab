"""The head of a GGUF file as bytes: the inverse of `reader`.

The layout is that of ggml's docs/gguf.md, version 3. Where a tensor's bytes lie follows from the
order, the types and the shapes, so the size of a file is known before any weight is read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from jlayer.gguf.reader import MAGIC, TYPES

VERSION = 3
ALIGNMENT = 32
# The numbers of the types of values that are written.
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_FORMS = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?"}
_OF_SCALAR = {bool: _BOOL, int: _U32, float: _F32, str: _STRING}
# Ids and kinds of tokens are signed in arrays, as llama.cpp's converter writes them.
_OF_ELEMENT = {**_OF_SCALAR, int: _I32}
_NUMBER_OF = {row.name: number for number, row in TYPES.items()}
_ROWS = {row.name: row for row in TYPES.values()}

Value = bool | int | float | str | tuple


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: the name of its type, as in `reader.TYPES`, and its shape, rows first."""

    type: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        row = _ROWS[self.type]
        assert self.shape[-1] % row.weights == 0, "a block would cross rows"
        return math.prod(self.shape) // row.weights * row.n_bytes


def encode_head(values: Mapping[str, Value], tensors: Mapping[str, NewTensor]) -> bytes:
    """The first bytes of a file, up to its first tensor.

    Each tensor follows at the next multiple of ALIGNMENT after the one before: see `padding`.
    `values`: integers become u32, numbers f32; an array has elements of one type, and is not empty.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_string(key), _typed(value)]
    offset = 0
    for name, tensor in tensors.items():
        axes = tensor.shape[::-1]  # the fastest first
        parts += [_string(name), struct.pack(f"<I{len(axes)}Q", len(axes), *axes)]
        parts.append(struct.pack("<IQ", _NUMBER_OF[tensor.type], offset))
        offset += tensor.n_bytes + len(padding(tensor.n_bytes))
    head = b"".join(parts)
    return head + padding(len(head))


def padding(n_bytes: int) -> bytes:
    """What follows so many bytes, up to the next tensor."""
    return bytes(-n_bytes % ALIGNMENT)


def _string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value):
    """A value after the number of its type."""
    if not isinstance(value, tuple):
        kind = _OF_SCALAR[type(value)]
        return struct.pack("<I", kind) + _element(kind, value)
    (element,) = {type(one) for one in value}
    kind = _OF_ELEMENT[element]
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    if kind == _STRING:
        return head + b"".join(map(_string, value))
    return head + struct.pack(f"<{len(value)}{_FORMS[kind]}", *value)


def _element(kind, value):
    return _string(value) if kind == _STRING else struct.pack("<" + _FORMS[kind], value)
