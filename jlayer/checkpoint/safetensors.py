"""Reads and checks the header of a safetensors file; every weight file is opened through it.

The library's own reader accepts duplicate names, white space, path-like names and a million empty
tensors; this one does not. It reads only the header and returns the position of each tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from jlayer.encodings.plain import INPUTS_FIRST
from jlayer.errors import CheckpointError, StorageError
from jlayer.spec import ALIGNMENT, DTYPES, STORED_DTYPES
from jlayer.strict import (
    GIT_LFS,
    MAX_KEYS,
    is_tensor_name,
    open_regular,
    parse_json_object,
    without_collection,
)

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = MAX_KEYS - 1  # one key may be __metadata__
MAX_DIMS = 8
LENGTH_BYTES = 8  # the header's own length, little-endian, before the header

_KEYS = {"dtype", "shape", "data_offsets"}
# Every dtype of the format -> its name in numpy or ml_dtypes, and bits an element. A tensor that a
# model has no use for may have any of them; one that it needs is refused by name.
_DTYPES = {word: (name, 8 * n_bytes) for word, (name, n_bytes) in STORED_DTYPES.items()} | {
    "BOOL": ("bool", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "U32": ("uint32", 32),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
}
_WORDS = {name: (word, bits) for word, (name, bits) in _DTYPES.items()}
# Bits of a number, of the dtypes that share bytes.
BITS_OF_SMALL = {name: bits for name, bits in _DTYPES.values() if bits % 8}
_PICKLE = "a pickle, not safetensors; take the model's checkpoint of safetensors files"
# First bytes of other files that people have under a .safetensors name, and what to tell them.
_NOT_SAFETENSORS = (
    (GIT_LFS, "a Git LFS pointer, not the weights; run: git lfs pull"),
    (b"<!doctype", "an HTML page, not safetensors; fetch the file again"),
    (b"<html", "an HTML page, not safetensors; fetch the file again"),
    (
        b"pk\x03\x04",
        "a zip archive (a pickle of torch?), not safetensors; name it pytorch_model.bin",
    ),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"gguf", "a GGUF file, not safetensors; take the model's checkpoint of safetensors files"),
)


class TensorEntry(NamedTuple):
    """One tensor in a file: numpy's name of its dtype, its shape, and the position of its bytes.

    `offset` counts from the start of the file. A tuple, since a header may hold 200,000 of them.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def form(self) -> str:
        """The name of its encoding."""
        return self.dtype

    def seen_as(self, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
        """The same bytes as numbers of another dtype, or in another shape."""
        return TensorEntry(dtype, shape, self.offset, self.n_bytes)


class InputsFirstEntry(TensorEntry):
    """The same of a matrix of this shape, [out, in], whose numbers lie as [in, out]."""

    __slots__ = ()

    @property
    def form(self) -> str:
        return INPUTS_FIRST[self.dtype].name


@dataclass(frozen=True)
class Header:
    """A checked header.

    `tensors`: in the order of their bytes, which fill the file from `data_start` to its end.
    `metadata`: what else is said of the file.
    """

    tensors: dict[str, TensorEntry]
    data_start: int
    file_bytes: int
    metadata: dict[str, str]


def read_header(path: str | os.PathLike) -> Header:
    """The header of the safetensors file at `path`, without reading its data.

    Raises CheckpointError (missing, not a regular file, not safetensors, cut off, inconsistent)
    or StorageError.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(64), size, path)
            file.seek(LENGTH_BYTES)
            raw = file.read(length)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) != length:
        raise CheckpointError(
            f"{path}: header is cut off, expected {length} bytes, found {len(raw)}"
        )
    return parse_header(raw, file_bytes=size, where=os.fspath(path))


def encode_tensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[bytes, dict[str, TensorEntry]]:
    """(the bytes of a file before its data, the entry of each tensor).

    `tensors`: the dtype and shape of each, in the order of their bytes. `metadata`: what else is
    said of the file. The header is padded with spaces (which the format allows) so that the data
    begins at a multiple of ALIGNMENT.
    """
    raw, at = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, (dtype, shape) in tensors.items():
        word, bits = _WORDS[dtype]
        begin, at = at, at + math.prod(shape) * bits // 8
        raw[name] = {"dtype": word, "shape": list(shape), "data_offsets": [begin, at]}
    text = json.dumps(raw, separators=(",", ":")).encode()
    data_start = -(-(LENGTH_BYTES + len(text)) // ALIGNMENT) * ALIGNMENT
    text = text.ljust(data_start - LENGTH_BYTES, b" ")
    entries = {}
    for name, (dtype, shape) in tensors.items():
        begin, end = raw[name]["data_offsets"]
        entries[name] = TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, entries


def parse_header(raw: bytes, *, file_bytes: int, where: str) -> Header:
    """Parses `raw`, the header of a file of `file_bytes` bytes.

    Raises CheckpointError; its message starts with `where`.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: header starts with {raw[:8]!r}, expected '{{'")
    with without_collection():
        data_start = LENGTH_BYTES + len(raw)
        tensors = parse_json_object(
            raw, what=f"{where}: header", convert=lambda found: _entry(found, data_start)
        )
        metadata = _metadata(tensors.pop("__metadata__", None), where)
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(
                f"{where}: {len(tensors)} tensors, over the limit of {MAX_TENSORS}"
            )
        end, in_order = data_start, True
        for name, entry in tensors.items():
            if type(entry) is not TensorEntry or not is_tensor_name(name):
                raise _refusal(where, name, _reason(name, entry))
            in_order = in_order and entry.offset == end
            end = entry.offset + entry.n_bytes
        if not in_order:  # rare; sorting 200,000 entries is slow
            by_place = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].n_bytes))
            tensors = dict(by_place)
        _check_tiling(tensors, data_start, file_bytes, where)
    return Header(tensors, data_start, file_bytes, metadata)


def _header_length(start, size, path):
    """The header's length, after checking it; `start` is the first 64 bytes of the file.

    Other formats are looked for only if the first bytes are no header: a header of 640 bytes begins
    like a pickle.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    fits = size >= LENGTH_BYTES and length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES)
    if not fits or start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        _refuse_other_formats(start, path)
    if size < LENGTH_BYTES:
        word = "empty" if size == 0 else "too short"
        raise CheckpointError(f"{path}: {word}, {size} bytes; fetch the file again")
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: header of {length} bytes expected, but the file has {size}; fetch it again"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header of {length} bytes, over the limit of {MAX_HEADER_BYTES}"
        )
    return length


def _refuse_other_formats(start, path):
    for magic, advice in _NOT_SAFETENSORS:
        if start.lstrip().lower().startswith(magic):
            raise CheckpointError(f"{path}: {advice}")


def _metadata(found, where):
    """The library takes null, too, for no metadata."""
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{where}: header: __metadata__ is not a map of strings")
    return found


def _entry(found, data_start):
    """A header object as a TensorEntry or, if it is invalid, the object itself.

    Called as soon as each object is parsed: all 200,000 objects at once take twice the memory.
    """
    if len(found) != len(_KEYS):
        return found
    try:
        dtype, shape, (begin, end) = found["dtype"], found["shape"], found["data_offsets"]
        name_of_dtype, item_bits = _DTYPES[dtype]
        n_bits = _n_elements(shape) * item_bits
    except (TypeError, ValueError, KeyError):  # a key is missing, or a value has another form
        return found
    if not _is_span(begin, end) or 8 * (end - begin) != n_bits or n_bits >= 1 << 66:
        return found
    return TensorEntry(name_of_dtype, tuple(shape), data_start + begin, end - begin)


def _reason(name, entry):
    """The reason why an entry was refused."""
    if not is_tensor_name(name):
        return "not a name that a tensor may have"
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return "header entry must hold dtype, shape and data_offsets alone"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    n_elements = _n_elements(shape)
    if n_elements is None:
        return f"shape {_short(shape)}, expected up to {MAX_DIMS} integers of 0 or more"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"dtype {_short(ascii(dtype))} is not known; supported: {', '.join(DTYPES)}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not _is_span(*offsets):
        expected = "two integers, neither negative nor inverted"
        return f"data_offsets {_short(offsets)}, expected {expected}"
    n_bits, n_bytes = n_elements * _DTYPES[dtype][1], offsets[1] - offsets[0]
    if n_bits >= 1 << 66:
        return f"shape {_short(shape)} overflows 64 bits"
    expected = f"{n_bits // 8} bytes" if n_bits % 8 == 0 else f"{n_bits} bits"
    known = "" if dtype in DTYPES else f" (supported for weights: {', '.join(DTYPES)})"
    return (
        f"shape {_short(shape)} of {dtype} takes {expected}, but its data_offsets give "
        f"{_short(n_bytes)}{known}"
    )


def _n_elements(shape):
    """The number of elements; None if `shape` is not a valid shape."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        return None
    product = 1
    for n in shape:
        if type(n) is not int or n < 0:
            return None
        product *= n
    return product


def _is_span(begin, end):
    return type(begin) is int and type(end) is int and 0 <= begin <= end


def _refusal(where, name, what):
    return CheckpointError(f"{where}: tensor {_short(ascii(name))}: {what}")


def _check_tiling(ordered, data_start, file_bytes, where):
    """Raises unless tensors fill the file from `data_start` to its end without gap or overlap."""
    at, previous, beyond = data_start, None, None
    for name, entry in ordered.items():
        if entry.offset != at:
            label = _short(ascii(name))
            if entry.offset < at:
                other = _short(ascii(previous))
                raise CheckpointError(f"{where}: tensors {other} and {label} overlap")
            gap = _short(entry.offset - at)
            raise CheckpointError(f"{where}: gap of {gap} bytes before tensor {label}")
        at, previous = entry.offset + entry.n_bytes, name
        if at > file_bytes and beyond is None:
            beyond = _short(ascii(name))
    if at > file_bytes:
        raise CheckpointError(
            f"{where}: cut off in tensor {beyond}: expected {_short(at)} bytes in the file, "
            f"found {file_bytes}; fetch it again"
        )
    if at < file_bytes:
        raise CheckpointError(f"{where}: {file_bytes - at} trailing bytes after the last tensor")


def _short(value):
    """A value from outside, as it may stand in a message: it may have thousands of digits."""
    try:
        text = str(value)
    except ValueError:  # more digits than Python prints
        return "of thousands of digits"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."
